//! A router for several vLLM engines that share a PegaFlow server: one OpenAI address, engines that compute prompts apart
//! from engines that answer if wanted, and answers that outlive the engine that began them.
#![deny(unsafe_code)]

mod affinity;
mod answer;
mod engines;
mod generate;
mod http;
mod known_keys;
mod metrics;
mod plan;
mod serve;
mod servers;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use clap::Parser;
use pegaflow_server::client::{Endpoint, Token};
use pegaflow_server::{ClientTls, ExitStatus};

use self::engines::{Engines, Roles};
use self::servers::{ServerSettings, Servers};

/// One OpenAI address for several vLLM engines.
///
/// Requests go to the engine that has answered the longest part of their beginning, or whose PegaFlow server holds it,
/// unless others have clearly less to do. With --prefill and --decode prompts are computed by the former and answered by the latter, which load what was
/// computed from the PegaFlow server that they share. An engine that fails costs another try, also in the middle of an
/// answer where that can be continued: text, one choice, temperature 0 or a seed.
///
/// Exit status: 0 stopped in order, 1 failed, 2 invalid command line.
#[derive(Debug, Parser)]
#[command(name = "pegaflow-router", version)]
struct Options {
    /// Where to listen. Whoever reaches it can use the engines, unless they ask for a key themselves.
    #[arg(long, value_name = "ADDRESS:PORT", default_value = "127.0.0.1:8100")]
    listen: SocketAddr,
    /// An engine that computes prompts and answers, as http://HOST:PORT. May be repeated; 64 engines at most in all.
    /// With =SERVER the router asks that PegaFlow server, which is the engine's, what it holds: the path of a Unix socket,
    /// https://HOST:PORT with --ca and --token-file, or http://ADDRESS:PORT on loopback.
    #[arg(long, value_name = "URL[=SERVER]")]
    engine: Vec<String>,
    /// An engine that only computes prompts.
    #[arg(long, value_name = "URL[=SERVER]")]
    prefill: Vec<String>,
    /// An engine that only answers.
    #[arg(long, value_name = "URL[=SERVER]")]
    decode: Vec<String>,
    /// The longest wait for servers to say what they hold, in milliseconds. One that does not counts as holding nothing, and is
    /// not asked again for a second.
    #[arg(long, value_name = "MS", default_value_t = 20, value_parser = clap::value_parser!(u64).range(1..=1000))]
    ask_timeout: u64,
    /// The authorities that may vouch for servers at https://, in PEM.
    #[arg(long, env = "PEGAFLOW_CA", value_name = "FILE")]
    ca: Option<PathBuf>,
    /// A file with the token to show servers over TCP, of the role engine.
    #[arg(long, env = "PEGAFLOW_TOKEN_FILE", value_name = "FILE")]
    token_file: Option<PathBuf>,
    /// A certificate to show servers, in PEM, where they ask for one; with --client-key.
    #[arg(long, env = "PEGAFLOW_CLIENT_CERT", value_name = "FILE", requires = "client_key")]
    client_cert: Option<PathBuf>,
    /// The key of that certificate.
    #[arg(long, env = "PEGAFLOW_CLIENT_KEY", value_name = "FILE", requires = "client_cert")]
    client_key: Option<PathBuf>,
    /// Prompts of fewer bytes than this are computed by the engine that answers.
    #[arg(long, value_name = "BYTES", default_value_t = 1024)]
    prefill_from: usize,
    /// How often a request is tried in all, 1 to 10.
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=10))]
    tries: u32,
    /// The longest time until an engine begins to answer, in seconds; without streaming that is the whole answer.
    #[arg(long, value_name = "SECONDS", default_value_t = 600, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    timeout: u64,
    /// The longest pause within a streamed answer, in seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 120, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pause: u64,
    /// How often each engine is asked for its health, in milliseconds.
    #[arg(long, value_name = "MS", default_value_t = 1000, value_parser = clap::value_parser!(u64).range(50..=60_000))]
    health_interval: u64,
    /// Requests at once; more are refused with 503.
    #[arg(long, value_name = "N", default_value_t = 1024, value_parser = clap::value_parser!(u32).range(1..=65_536))]
    requests_max: u32,
    /// How long requests may go on after SIGTERM, in seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 30, value_parser = clap::value_parser!(u64).range(0..=3600))]
    drain: u64,
    /// What is logged, as RUST_LOG.
    #[arg(long, value_name = "FILTER", env = "PEGAFLOW_LOG", default_value = "info")]
    log: String,
}

fn main() -> ExitCode {
    let options = Options::parse();
    let engines = match engines(&options) {
        Ok(engines) => Arc::new(engines),
        Err(problem) => {
            eprintln!("pegaflow-router: {problem}");
            return ExitStatus::Usage.into();
        }
    };
    tracing_subscriber::fmt()
        .with_env_filter(tracing_subscriber::EnvFilter::new(&options.log))
        .with_writer(std::io::stderr)
        .init();
    let settings = generate::Settings {
        prefill_from: options.prefill_from,
        tries: options.tries,
        timeout: Duration::from_secs(options.timeout),
        pause: Duration::from_secs(options.pause),
        requests_max: options.requests_max as usize,
    };
    let service = serve::Service {
        listen: options.listen,
        health_interval: Duration::from_millis(options.health_interval),
        drain: Duration::from_secs(options.drain),
    };
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("pegaflow-router: cannot start threads: {error}");
            return ExitStatus::Failed.into();
        }
    };
    match runtime.block_on(service.run(engines, settings)) {
        Ok(()) => ExitStatus::Ok.into(),
        Err(problem) => {
            eprintln!("pegaflow-router: {problem}");
            ExitStatus::Failed.into()
        }
    }
}

fn engines(options: &Options) -> Result<Engines, String> {
    let of = |urls: &[String], roles: Roles| urls.iter().map(move |url| (url.clone(), roles)).collect::<Vec<_>>();
    let both = Roles { computes_prompts: true, answers: true };
    let all = [
        of(&options.engine, both),
        of(&options.prefill, Roles { answers: false, ..both }),
        of(&options.decode, Roles { computes_prompts: false, ..both }),
    ];
    let is_apart = !options.prefill.is_empty();
    if is_apart && options.decode.is_empty() && options.engine.is_empty() {
        return Err("--prefill is given and nobody answers; give --decode or --engine too".into());
    }
    if options.engine.is_empty() && options.decode.is_empty() {
        return Err("no engine is given; give --engine http://HOST:PORT, or --prefill and --decode".into());
    }
    let (urls, servers) = all.concat().into_iter().map(|(address, roles)| split(&address, roles)).unzip();
    Engines::new(urls, is_apart, self::servers(options, servers)?)
}

/// URL and SERVER of `URL[=SERVER]`.
fn split(address: &str, roles: Roles) -> ((String, Roles), Option<String>) {
    match address.split_once('=') {
        Some((url, server)) => ((url.to_owned(), roles), Some(server.to_owned())),
        None => ((address.to_owned(), roles), None),
    }
}

/// The servers, one for each engine that has one.
fn servers(options: &Options, addresses: Vec<Option<String>>) -> Result<Servers, String> {
    let identity = options.client_cert.clone().zip(options.client_key.clone());
    let tls = options.ca.clone().map(|authorities| ClientTls { authorities, identity });
    let endpoint = |address: Option<String>| address.map(|text| Endpoint::parse(&text, tls.as_ref())).transpose();
    let endpoints =
        addresses.into_iter().map(endpoint).collect::<Result<_, _>>().map_err(|error| format!("{error:#}"))?;
    let token = options.token_file.as_deref().map(Token::read).transpose().map_err(|error| format!("{error:#}"))?;
    Servers::start(endpoints, ServerSettings { token, ask_timeout: Duration::from_millis(options.ask_timeout) })
}
