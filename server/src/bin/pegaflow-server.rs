//! The server: one store, one DRAM arena, shared by every inference engine of the host. Parses the command line, starts
//! the parts in order, prints one JSON line when ready, and stops in order on SIGTERM or SIGINT.
#![deny(unsafe_code)]

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::str::FromStr;
use std::time::{Duration, Instant};

use clap::{Parser, ValueEnum};
use pegaflow_engine::{
    ByteSize, CodecChoice, Engine, EngineConfig, Error, ErrorKind, IoEngineChoice, LoadPolicy, NvmeConfig, NvmeDrive,
    PolicyChoice, Result, WriteBudget,
};
use pegaflow_server::{
    ExitStatus, HttpServer, Listeners, Metrics, Readiness, Server, ServerConfig, default_socket_path,
};
use tokio::signal::unix::{Signal, SignalKind, signal};

/// A tiered KV cache for LLM engines: DRAM and NVMe, kept across restarts.
///
/// Exit status: 0 stopped in order, 1 other, 2 invalid command line or configuration, 3 store or socket in use by another
/// process, 4 foreign or newer store format, 5 permission denied, 6 no space, 7 input/output error.
#[derive(Debug, Parser)]
#[command(name = "pegaflow-server", version)]
struct Options {
    /// Directory of the store, made if missing, on ext4 or XFS. Without it blocks live in DRAM only.
    #[arg(long, env = "PEGAFLOW_PATH", value_name = "DIR", alias = "nvme")]
    path: Option<PathBuf>,
    /// Bytes of the store in its directory, taken from the file system at once. At least four regions. May change from
    /// start to start.
    #[arg(long, env = "PEGAFLOW_CAPACITY", value_name = "SIZE", default_value = "16GiB", alias = "nvme-capacity")]
    capacity: ByteSize,
    /// A further drive of the store; repeat it for more, in the order in which they joined, new ones last. One that is no
    /// longer given is retired: its blocks are gone.
    #[arg(long = "drive", env = "PEGAFLOW_DRIVE", value_name = "DIR=SIZE", value_delimiter = ',')]
    drives: Vec<NvmeDrive>,
    /// Bytes of one region, fixed when the store is made. Default: what the store has, for a new one 1/64 of the capacity, within 16 MiB to 256 MiB.
    #[arg(long, env = "PEGAFLOW_REGION", value_name = "SIZE")]
    region: Option<ByteSize>,
    /// What may be written to the drive, on average: 500GiB/day, or 1.5dwpd (drive writes per day; the drive counts as
    /// large as the store). Default: no bound.
    #[arg(long, env = "PEGAFLOW_WRITE_BUDGET", value_name = "BUDGET")]
    write_budget: Option<WriteBudget>,
    /// How much of a region may be written again before it is reclaimed, in percent: its most used blocks. At most 50.
    #[arg(long, env = "PEGAFLOW_REINSERT_PERCENT", value_name = "PERCENT", default_value_t = 25)]
    reinsert_percent: u32,
    /// How often the drive is asked for its health, in seconds, 10 to 86400; 0 for never.
    #[arg(long, env = "PEGAFLOW_HEALTH_INTERVAL", value_name = "SECONDS", default_value_t = 600)]
    health_interval: u64,
    /// Whether the blocks that were in DRAM come back from the drive after a start, in the background.
    #[arg(long, env = "PEGAFLOW_WARM_START", value_name = "on|off", default_value = "on", value_parser = on_or_off,
          action = clap::ArgAction::Set)]
    warm_start: bool,
    /// How often it is noted which blocks these are, in seconds, 1 to 86400; also at a stop.
    #[arg(long, env = "PEGAFLOW_HOT_SET_INTERVAL", value_name = "SECONDS", default_value_t = 600)]
    hot_set_interval: u64,
    /// Bytes of DRAM for blocks, taken at start.
    #[arg(long, env = "PEGAFLOW_DRAM", value_name = "SIZE", default_value = "4GiB")]
    dram: ByteSize,
    /// Who decides what stays in DRAM and what is written to the drive: pegaflow, which learns, or lru, fifo, s3fifo, arc.
    #[arg(long, env = "PEGAFLOW_POLICY", value_name = "POLICY", default_value_t = PolicyChoice::default())]
    policy: PolicyChoice,
    /// Ask for 2 MiB pages.
    #[arg(long, env = "PEGAFLOW_HUGE_PAGES")]
    huge_pages: bool,
    /// How the store reads and writes.
    #[arg(long, env = "PEGAFLOW_IO_ENGINE", value_enum, default_value_t = IoEngine::Auto)]
    io_engine: IoEngine,
    /// Bytes a second at which records are checked while the drive is idle; 0: never.
    #[arg(long, env = "PEGAFLOW_SCRUB", value_name = "SIZE", default_value = "8MiB")]
    scrub: ByteSize,
    /// Whether blocks are compressed on the drive, without loss.
    #[arg(long, env = "PEGAFLOW_CODEC", value_enum, default_value_t = CodecOption::Auto)]
    codec: CodecOption,
    /// Whether blocks that are found are loaded: auto (where that is expected to be faster than computing them), always,
    /// never, or shadow (always, but decisions are made and recorded). `pegaflow load-policy` changes it while it runs.
    #[arg(long, env = "PEGAFLOW_LOAD_POLICY", value_name = "POLICY", default_value_t = LoadPolicy::Auto)]
    load_policy: LoadPolicy,
    /// The Unix socket. Default: $XDG_RUNTIME_DIR/pegaflow/pegaflow.sock, or /tmp/pegaflow-UID/pegaflow.sock.
    #[arg(long, env = "PEGAFLOW_SOCKET", value_name = "PATH")]
    socket: Option<PathBuf>,
    /// Also listen on this loopback address, without encryption or password; needs --insecure-loopback.
    #[arg(long, env = "PEGAFLOW_TCP", value_name = "ADDRESS", requires = "insecure_loopback")]
    tcp: Option<SocketAddr>,
    /// Accept that every user of this host can reach the TCP address.
    #[arg(long, env = "PEGAFLOW_INSECURE_LOOPBACK")]
    insecure_loopback: bool,
    /// Address of /health, /ready and /metrics, or `off`.
    #[arg(long, env = "PEGAFLOW_HTTP", value_name = "ADDRESS|off", default_value = "127.0.0.1:9464")]
    http: HttpAddress,
    /// The longest time for stopping, in seconds: operations end, what is in DRAM becomes durable.
    #[arg(long, env = "PEGAFLOW_SHUTDOWN_TIMEOUT", value_name = "SECONDS", default_value_t = 30,
          value_parser = clap::value_parser!(u64).range(1..=3600))]
    shutdown_timeout: u64,
    /// What to log on standard error: error, warn, info, debug, trace, or directives such as `pegaflow_engine=debug`.
    #[arg(long, env = "PEGAFLOW_LOG", value_name = "FILTER", default_value = "info")]
    log: String,
    /// Check the configuration, print every problem, and end.
    #[arg(long)]
    validate: bool,
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

fn on_or_off(text: &str) -> std::result::Result<bool, String> {
    match text {
        "on" => Ok(true),
        "off" => Ok(false),
        _ => Err("give on or off".to_owned()),
    }
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

impl Options {
    fn engine(&self) -> EngineConfig {
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
            ..NvmeConfig::new(path, self.capacity)
        });
        EngineConfig {
            load_policy: self.load_policy,
            dram: self.dram,
            huge_pages: self.huge_pages,
            policy: self.policy,
            shared_dram: true,
            nvme,
            ..EngineConfig::default()
        }
    }

    /// Every problem of the configuration at once.
    fn check(&self) -> Result<()> {
        let mut problems = Vec::new();
        problems.extend(self.engine().validate().err().map(|error| error.message().to_owned()));
        if self.path.is_none() && self.region.is_some() {
            problems.push("--region is given without a store; give --path DIR".into());
        }
        if self.path.is_none() && !self.drives.is_empty() {
            problems.push("--drive is given without a store; give --path DIR for its home".into());
        }
        if self.path.is_none() && self.write_budget.is_some() {
            problems.push("--write-budget is given without a store; give --path DIR".into());
        }
        if let Some(address) = self.tcp.filter(|address| !address.ip().is_loopback()) {
            problems.push(format!("--tcp {address} is not loopback; give 127.0.0.1:PORT, or use the Unix socket"));
        }
        if let Err(error) = tracing_subscriber::EnvFilter::try_new(&self.log) {
            problems.push(format!("--log '{}' cannot be read: {error}", self.log));
        }
        if problems.is_empty() { Ok(()) } else { Err(Error::new(ErrorKind::InvalidInput, problems.join("; "))) }
    }
}

fn main() -> ExitCode {
    let options = Options::parse();
    let outcome = options.check().and_then(|()| {
        if options.validate {
            println!("the configuration is valid");
            return Ok(());
        }
        start_logging(&options.log);
        raise_open_files();
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(std::thread::available_parallelism().map_or(2, |cores| cores.get().clamp(2, 4)))
            .max_blocking_threads(64)
            .thread_name("pegaflow-rpc")
            .enable_all()
            .build()
            .map_err(|error| Error::from_io("cannot start the runtime", error))?;
        let outcome = runtime.block_on(run(&options));
        // Whatever hangs must not keep the process.
        runtime.shutdown_timeout(Duration::from_secs(1));
        outcome
    });
    match outcome {
        Ok(()) => ExitStatus::Ok.into(),
        Err(error) => {
            eprintln!("pegaflow-server: {error:#}");
            ExitStatus::from(error.kind()).into()
        }
    }
}

fn start_logging(filter: &str) {
    let filter = tracing_subscriber::EnvFilter::try_new(filter).unwrap_or_default();
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(false).init();
}

/// Every client takes a few descriptors: as many as the system allows.
fn raise_open_files() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit }) {
        tracing::warn!(%error, "cannot raise the limit of open files; fewer clients can connect");
    }
}

/// A write over the limit of file sizes (`ulimit -f`) ends a process silently, unless the signal has a handler: then the
/// write fails, and the error says what to do.
fn report_file_size_limit() -> Result<()> {
    let number = rustix::process::Signal::XFSZ.as_raw();
    // The handler stays when the stream goes.
    let handler = signal(SignalKind::from_raw(number)).map(drop);
    handler.map_err(|error| Error::from_io("cannot listen for signals", error))
}

async fn run(options: &Options) -> Result<()> {
    let mut stop = StopSignals::new()?;
    report_file_size_limit()?;
    let metrics = Metrics::new();
    metrics.install();
    let readiness = Readiness::new(metrics);
    let http = match options.http.0 {
        Some(address) => Some(HttpServer::start(address, readiness.clone()).await?),
        None => None,
    };
    let config = options.engine();
    let opening = Instant::now();
    let mut open = tokio::task::spawn_blocking(move || Engine::open(config));
    let engine = tokio::select! {
        opened = &mut open => {
            opened.unwrap_or_else(|_| Err(Error::new(ErrorKind::Io, "opening the store panicked; see the log")))?
        }
        () = stop.asked() => {
            tracing::info!("asked to stop while the store was being opened");
            stop.exit_at_next();
            if let Ok(Ok(engine)) = open.await {
                close(&engine, options)?;
            }
            return Ok(());
        }
    };
    tracing::info!(took = ?opening.elapsed(), "the cache is open");
    let socket = options.socket.clone().unwrap_or_else(default_socket_path);
    let listeners = match Listeners::bind(&socket, options.tcp).await {
        Ok(listeners) => listeners,
        Err(error) => {
            close(&engine, options)?;
            return Err(error);
        }
    };
    let ready = serde_json::json!({
        "ready": true,
        "socket": socket,
        "tcp": listeners.tcp_address().map(|address| address.to_string()),
        "http": http.as_ref().map(|http| http.address().to_string()),
        "recovered": engine.stats().recovered_records,
        "records": engine.stats().nvme_records,
        "pid": std::process::id(),
    });
    let server = Server::start(engine, listeners, &ServerConfig::default(), &readiness);
    // Whoever started the server may have gone; that is no reason to stop.
    let _told = std::io::Write::write_all(&mut std::io::stdout(), format!("{ready}\n").as_bytes());
    stop.asked().await;
    let timeout = Duration::from_secs(options.shutdown_timeout);
    tracing::info!(?timeout, "stopping: no new connections, operations end, the store is flushed");
    stop.exit_at_next();
    server.stop(timeout).await.inspect(|()| tracing::info!("stopped"))
}

fn close(engine: &Engine, options: &Options) -> Result<()> {
    engine.close(Instant::now() + Duration::from_secs(options.shutdown_timeout))
}

/// SIGTERM and SIGINT.
struct StopSignals {
    terminate: Signal,
    interrupt: Signal,
}

impl StopSignals {
    fn new() -> Result<Self> {
        let listen = |kind| signal(kind).map_err(|error| Error::from_io("cannot listen for signals", error));
        Ok(Self { terminate: listen(SignalKind::terminate())?, interrupt: listen(SignalKind::interrupt())? })
    }

    async fn asked(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }

    /// From now on a signal ends the process at once. What was reported durable is durable.
    fn exit_at_next(mut self) {
        tokio::spawn(async move {
            self.asked().await;
            eprintln!("pegaflow-server: second signal, ending at once");
            std::process::exit(ExitStatus::Other as i32);
        });
    }
}
