//! How the server is set up: one list of settings, with the same names in a file, in the environment and on the command
//! line. Flags outrank the environment, the environment outranks the file.

mod file;
mod load;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use clap::builder::BoolishValueParser;
use clap::{ArgAction, Args, ValueEnum};
use pegaflow_engine::{
    ByteSize, CodecChoice, EngineConfig, IoEngineChoice, LoadPolicy, NvmeConfig, NvmeDrive, PolicyChoice, Result,
    WriteBudget,
};

use crate::{Access, Role, ServerTls, TcpService, TlsFiles, Tokens};

pub use file::{Setting, Source};
pub use load::{Loaded, load, told};

/// Everything that can be set. A file has the long names of the options with `_` for `-`; environment variables begin with
/// `PEGAFLOW_`.
#[derive(Debug, Clone, Args)]
pub struct Settings {
    /// A file of settings, in TOML: `capacity = "512GiB"`. Flags and environment variables outrank it.
    #[arg(long, env = "PEGAFLOW_CONFIG", value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Directory of the store, made if missing, on ext4 or XFS. Without it blocks live in DRAM only.
    #[arg(long, env = "PEGAFLOW_PATH", value_name = "DIR", alias = "nvme")]
    pub path: Option<PathBuf>,
    /// Bytes of the store in its directory, taken from the file system at once. At least four regions. May change from
    /// start to start.
    #[arg(long, env = "PEGAFLOW_CAPACITY", value_name = "SIZE", default_value = "16GiB", alias = "nvme-capacity")]
    pub capacity: ByteSize,
    /// A further drive of the store; repeat it for more, in the order in which they joined, new ones last. One that is no
    /// longer given is retired: its blocks are gone.
    #[arg(long = "drive", env = "PEGAFLOW_DRIVE", value_name = "DIR=SIZE", value_delimiter = ',')]
    pub drives: Vec<NvmeDrive>,
    /// Bytes of one region, fixed when the store is made. Default: what the store has, for a new one 1/64 of the capacity, within 16 MiB to 256 MiB.
    #[arg(long, env = "PEGAFLOW_REGION", value_name = "SIZE")]
    pub region: Option<ByteSize>,
    /// What may be written to the drive, on average: 500GiB/day, or 1.5dwpd (drive writes per day; the drive counts as
    /// large as the store). Default: no bound.
    #[arg(long, env = "PEGAFLOW_WRITE_BUDGET", value_name = "BUDGET")]
    pub write_budget: Option<WriteBudget>,
    /// How much of a region may be written again before it is reclaimed, in percent: its most used blocks. At most 50.
    #[arg(long, env = "PEGAFLOW_REINSERT_PERCENT", value_name = "PERCENT", default_value_t = 25)]
    pub reinsert_percent: u32,
    /// How often the drive is asked for its health, in seconds, 10 to 86400; 0 for never.
    #[arg(long, env = "PEGAFLOW_HEALTH_INTERVAL", value_name = "SECONDS", default_value_t = 600)]
    pub health_interval: u64,
    /// Whether the blocks that were in DRAM come back from the drive after a start, in the background: on or off.
    #[arg(long, env = "PEGAFLOW_WARM_START", value_name = "BOOL", value_parser = BoolishValueParser::new(),
          action = ArgAction::Set, default_value = "true")]
    pub warm_start: bool,
    /// How often it is noted which blocks these are, in seconds, 1 to 86400; also at a stop.
    #[arg(long, env = "PEGAFLOW_HOT_SET_INTERVAL", value_name = "SECONDS", default_value_t = 600)]
    pub hot_set_interval: u64,
    /// A file with the key of an encrypted store: 64 hexadecimal digits, nobody else's to read (openssl rand -hex 32).
    /// Decided when the store is made. Default: not encrypted.
    #[arg(long, env = "PEGAFLOW_ENCRYPTION_KEY_FILE", value_name = "FILE")]
    pub encryption_key_file: Option<PathBuf>,
    /// A command that prints that key, instead of the file; a shell runs it at every open of the store.
    #[arg(long, env = "PEGAFLOW_ENCRYPTION_KEY_COMMAND", value_name = "COMMAND")]
    pub encryption_key_command: Option<String>,
    /// Bytes of DRAM for blocks, taken at start.
    #[arg(long, env = "PEGAFLOW_DRAM", value_name = "SIZE", default_value = "4GiB")]
    pub dram: ByteSize,
    /// Who decides what stays in DRAM and what is written to the drive: pegaflow, which learns, or lru, fifo, s3fifo, arc.
    #[arg(long, env = "PEGAFLOW_POLICY", value_name = "POLICY", default_value_t = PolicyChoice::default())]
    pub policy: PolicyChoice,
    /// The part of DRAM that is guaranteed, in equal parts, to namespaces (models, tenants) that asked for something within ten
    /// minutes, in percent; what nobody needs is lent. At most 100; 0: no shares.
    #[arg(long, env = "PEGAFLOW_GUARANTEED_PERCENT", value_name = "PERCENT", default_value_t = 50)]
    pub guaranteed_percent: u32,
    /// Ask for 2 MiB pages.
    #[arg(long, env = "PEGAFLOW_HUGE_PAGES", value_name = "BOOL", value_parser = BoolishValueParser::new(), action = ArgAction::Set,
          num_args = 0..=1, require_equals = true, default_value = "false", default_missing_value = "true")]
    pub huge_pages: bool,
    /// How the store reads and writes.
    #[arg(long, env = "PEGAFLOW_IO_ENGINE", value_enum, default_value_t = IoEngine::Auto)]
    io_engine: IoEngine,
    /// Bytes a second at which records are checked while the drive is idle; 0: never.
    #[arg(long, env = "PEGAFLOW_SCRUB", value_name = "SIZE", default_value = "8MiB")]
    pub scrub: ByteSize,
    /// Whether blocks are compressed on the drive, without loss.
    #[arg(long, env = "PEGAFLOW_CODEC", value_enum, default_value_t = CodecOption::Auto)]
    codec: CodecOption,
    /// Whether blocks that are found are loaded: auto (where that is expected to be faster than computing them), always,
    /// never, or shadow (always, but decisions are made and recorded). `pegaflow load-policy` changes it while it runs.
    #[arg(long, env = "PEGAFLOW_LOAD_POLICY", value_name = "POLICY", default_value_t = LoadPolicy::Auto)]
    pub load_policy: LoadPolicy,
    /// The Unix socket. Default: $XDG_RUNTIME_DIR/pegaflow/pegaflow.sock, or /tmp/pegaflow-UID/pegaflow.sock.
    #[arg(long, env = "PEGAFLOW_SOCKET", value_name = "PATH")]
    pub socket: Option<PathBuf>,
    /// Also listen on this TCP address; needs --tls-cert, --tls-key and --tokens, or --insecure-loopback.
    #[arg(long, env = "PEGAFLOW_TCP", value_name = "ADDRESS")]
    pub tcp: Option<SocketAddr>,
    /// The server's certificate for TCP, and those up to its authority, in PEM. SIGHUP reads it, its key and the tokens again.
    #[arg(long, env = "PEGAFLOW_TLS_CERT", value_name = "FILE")]
    pub tls_cert: Option<PathBuf>,
    /// The private key of the certificate, in PEM, nobody else's to read.
    #[arg(long, env = "PEGAFLOW_TLS_KEY", value_name = "FILE")]
    pub tls_key: Option<PathBuf>,
    /// Authorities of clients, in PEM: then each client needs a certificate of theirs, too.
    #[arg(long, env = "PEGAFLOW_TLS_CLIENT_CA", value_name = "FILE")]
    pub tls_client_ca: Option<PathBuf>,
    /// Who may do what over TCP: one token a line, as `pegaflow token new` prints it; nobody else's to read.
    #[arg(long, env = "PEGAFLOW_TOKENS", value_name = "FILE")]
    pub tokens: Option<PathBuf>,
    /// Accept plain TCP on a loopback address, which every user of this host can reach.
    #[arg(long, env = "PEGAFLOW_INSECURE_LOOPBACK", value_name = "BOOL", value_parser = BoolishValueParser::new(), action = ArgAction::Set,
          num_args = 0..=1, require_equals = true, default_value = "false", default_missing_value = "true")]
    pub insecure_loopback: bool,
    /// What everybody may do who reaches that address: read-only, operator or engine.
    #[arg(long, env = "PEGAFLOW_INSECURE_LOOPBACK_ROLE", value_name = "ROLE", default_value_t = Role::ReadOnly)]
    pub insecure_loopback_role: Role,
    /// Address of /health, /ready and /metrics, or `off`.
    #[arg(long, env = "PEGAFLOW_HTTP", value_name = "ADDRESS|off", default_value = "127.0.0.1:9464")]
    http: HttpAddress,
    /// The longest time for stopping, in seconds: operations end, what is in DRAM becomes durable.
    #[arg(long, env = "PEGAFLOW_SHUTDOWN_TIMEOUT", value_name = "SECONDS", default_value_t = 30,
          value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub shutdown_timeout: u64,
    /// What to log on standard error: error, warn, info, debug, trace, or directives such as `pegaflow_engine=debug`.
    #[arg(long, env = "PEGAFLOW_LOG", value_name = "FILTER", default_value = "info")]
    pub log: String,
    /// How: lines of text, or one JSON object for each.
    #[arg(long, env = "PEGAFLOW_LOG_FORMAT", value_enum, default_value_t = LogFormat::Text)]
    pub log_format: LogFormat,
    /// An OpenTelemetry collector to which traces and metrics are pushed over OTLP (gRPC): http://127.0.0.1:4317. Default: none.
    #[arg(long, env = "PEGAFLOW_OTLP_ENDPOINT", value_name = "URL")]
    otlp_endpoint: Option<OtlpEndpoint>,
    /// The share of lookups, loads and saves that are traced, 0 to 1.
    #[arg(long, env = "PEGAFLOW_TRACE_SAMPLE", value_name = "RATIO", default_value_t = 0.01)]
    pub(crate) trace_sample: f64,
    /// How often all metrics are pushed there, in seconds, 1 to 3600; 0: never.
    #[arg(long, env = "PEGAFLOW_OTLP_METRICS_INTERVAL", value_name = "SECONDS", default_value_t = 30)]
    otlp_metrics_interval: u64,
}

/// An address of a collector.
#[derive(Debug, Clone)]
struct OtlpEndpoint(tonic::transport::Endpoint);

impl FromStr for OtlpEndpoint {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let bad = |_| "give http://HOST:PORT; a collector on this host takes it on to TLS".to_owned();
        let is_http = text.strip_prefix("http://").is_some_and(|rest| rest.contains(':'));
        let endpoint =
            tonic::transport::Endpoint::from_shared(text.to_owned()).map_err(|error| bad(error.to_string()))?;
        if is_http { Ok(Self(endpoint)) } else { Err(bad(String::new())) }
    }
}

/// What a line of the log looks like.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// For people.
    Text,
    /// For collectors of logs: `timestamp`, `level`, `target`, `fields` with `message`, and `spans` with what it is about.
    Json,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum IoEngine {
    /// io_uring where it works, else pread and pwrite.
    Auto,
    /// io_uring, or an error.
    #[value(alias = "io_uring", alias = "uring")]
    IoUring,
    /// pread and pwrite.
    Psync,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum CodecOption {
    /// By the type of the numbers, where it saves room and this machine decodes as fast as the drive reads.
    Auto,
    /// The same, however fast the drive reads: for room and wear.
    Always,
    /// Stored as they are; what is compressed already stays readable.
    None,
}

#[derive(Debug, Clone, Copy)]
struct HttpAddress(Option<SocketAddr>);

impl FromStr for HttpAddress {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        if text == "off" {
            return Ok(Self(None));
        }
        text.parse().map(|address| Self(Some(address))).map_err(|_| "give ADDRESS:PORT or off".to_owned())
    }
}

impl Settings {
    /// What of them is the engine's.
    pub fn engine(&self) -> EngineConfig {
        let nvme = self.path.as_ref().map(|path| NvmeConfig {
            region: self.region,
            scrub: self.scrub,
            more_drives: self.drives.clone(),
            io_engine: match self.io_engine {
                IoEngine::Auto => IoEngineChoice::Auto,
                IoEngine::IoUring => IoEngineChoice::IoUring,
                IoEngine::Psync => IoEngineChoice::Psync,
            },
            codec: match self.codec {
                CodecOption::Auto => CodecChoice::Auto,
                CodecOption::Always => CodecChoice::Always,
                CodecOption::None => CodecChoice::None,
            },
            write_budget: self.write_budget,
            reinsert_percent: self.reinsert_percent,
            health_interval_s: self.health_interval,
            warm_start: self.warm_start,
            hot_set_interval_s: self.hot_set_interval,
            encryption_key_file: self.encryption_key_file.clone(),
            encryption_key_command: self.encryption_key_command.clone(),
            ..NvmeConfig::new(path, self.capacity)
        });
        EngineConfig {
            load_policy: self.load_policy,
            dram: self.dram,
            huge_pages: self.huge_pages,
            policy: self.policy,
            guaranteed_percent: self.guaranteed_percent,
            shared_dram: true,
            nvme,
            ..EngineConfig::default()
        }
    }

    /// What does not go together, or is outside of a limit.
    fn problems(&self) -> Vec<String> {
        // The engine's names of what has another place here.
        let named = |problem: &String| problem.replace("nvme.more_drives", "drive").replace("nvme.", "");
        let mut problems: Vec<String> = self.engine().problems().iter().map(named).collect();
        for (name, is_given) in [
            ("region", self.region.is_some()),
            ("drive", !self.drives.is_empty()),
            ("write_budget", self.write_budget.is_some()),
            ("encryption_key_file", self.encryption_key_file.is_some()),
            ("encryption_key_command", self.encryption_key_command.is_some()),
        ] {
            if is_given && self.path.is_none() {
                problems.push(format!("{name} is given without a store; give path, the directory of its home"));
            }
        }
        if let Some(address) = self.tcp {
            let given = [("tls_cert", &self.tls_cert), ("tls_key", &self.tls_key), ("tokens", &self.tokens)];
            let missing: Vec<&str> = given.iter().filter(|(_, file)| file.is_none()).map(|(name, _)| *name).collect();
            let wants_tls = missing.len() < given.len() || self.tls_client_ca.is_some();
            match (wants_tls, self.insecure_loopback) {
                (true, true) => problems.push("insecure_loopback and a certificate are both given; give one".into()),
                (true, false) if !missing.is_empty() => {
                    problems.push(format!("tcp is given without {}; it needs all three", missing.join(", ")));
                }
                (false, false) => problems.push(
                    "tcp is given: anybody could connect; give tls_cert, tls_key and tokens, or accept plain loopback with insecure_loopback".into(),
                ),
                _ => {}
            }
            if !wants_tls && !address.ip().is_loopback() {
                problems.push(format!(
                    "tcp is {address}, which is not loopback; give it tls_cert, tls_key and tokens, or 127.0.0.1:PORT"
                ));
            }
        }
        if !(0.0..=1.0).contains(&self.trace_sample) {
            problems.push(format!("trace_sample is {}; give 0 to 1", self.trace_sample));
        }
        if self.otlp_metrics_interval > 3600 {
            problems
                .push(format!("otlp_metrics_interval is {}; give 1 to 3600 seconds, or 0", self.otlp_metrics_interval));
        }
        if let Err(error) = tracing_subscriber::EnvFilter::try_new(&self.log) {
            problems.push(format!("log '{}' can not be read: {error}", self.log));
        }
        problems
    }

    /// The TCP side of the server, with its files read.
    ///
    /// # Errors
    /// As [`ServerTls::read`] and [`Tokens::read`].
    pub fn tcp_service(&self) -> Result<Option<TcpService>> {
        let Some(address) = self.tcp else { return Ok(None) };
        let (Some(certificate), Some(key), Some(tokens)) = (&self.tls_cert, &self.tls_key, &self.tokens) else {
            let access = Arc::new(Access::everybody(self.insecure_loopback_role));
            return Ok(Some(TcpService { address, tls: None, access }));
        };
        let (certificate, key, client_authorities) = (certificate.clone(), key.clone(), self.tls_client_ca.clone());
        let tls = Some(Arc::new(ServerTls::read(TlsFiles { certificate, key, client_authorities })?));
        let access = Arc::new(Access::tokens(Tokens::read(tokens)?));
        Ok(Some(TcpService { address, tls, access }))
    }

    /// The directories of the store with the bytes that it takes of each, its home first; none without a store.
    pub fn drives_in_all(&self) -> Vec<(PathBuf, u64)> {
        let home = self.path.iter().map(|path| (path.clone(), self.capacity.0));
        home.chain(self.drives.iter().map(|drive| (drive.path.clone(), drive.capacity.0))).collect()
    }

    /// Where traces and metrics are pushed, if anywhere.
    pub(crate) fn otlp_endpoint(&self) -> Option<&tonic::transport::Endpoint> {
        self.otlp_endpoint.as_ref().map(|endpoint| &endpoint.0)
    }

    /// How often metrics are; zero: never.
    pub(crate) fn otlp_metrics_interval(&self) -> Duration {
        Duration::from_secs(self.otlp_metrics_interval)
    }

    /// Where the HTTP server listens, if it does.
    pub fn http_address(&self) -> Option<SocketAddr> {
        self.http.0
    }
}
