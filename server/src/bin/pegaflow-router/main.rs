//! A router for several vLLM engines that share a PegaFlow server: one OpenAI address, engines that compute prompts apart
//! from engines that answer if wanted, and answers that outlive the engine that began them.
#![deny(unsafe_code)]

mod affinity;
mod answer;
mod engines;
mod generate;
mod http;
mod metrics;
mod plan;
mod serve;

use std::net::SocketAddr;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use clap::Parser;
use pegaflow_server::ExitStatus;

use self::engines::{Engines, Roles};

/// One OpenAI address for several vLLM engines.
///
/// Requests go to the engine that has answered the longest part of their beginning, unless others have clearly less to
/// do. With --prefill and --decode prompts are computed by the former and answered by the latter, which load what was
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
    #[arg(long, value_name = "URL")]
    engine: Vec<String>,
    /// An engine that only computes prompts.
    #[arg(long, value_name = "URL")]
    prefill: Vec<String>,
    /// An engine that only answers.
    #[arg(long, value_name = "URL")]
    decode: Vec<String>,
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
    Engines::new(all.concat(), is_apart)
}
