//! The server as a process: starts the parts in order, prints one JSON line when ready, takes changed settings on SIGHUP,
//! and stops in order on SIGTERM or SIGINT.

use std::io::Stderr;
use std::time::{Duration, Instant};

use opentelemetry_sdk::trace::SdkTracer;
use pegaflow_engine::{Engine, Error, ErrorKind, Result};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer, reload};

use crate::otlp::{Exporter, Spans};
use crate::settings::{Loaded, LogFormat, Settings};
use crate::{
    ExitStatus, HttpServer, Listeners, Metrics, Readiness, Server, ServerConfig, TcpService, Tokens,
    default_socket_path,
};

/// Reads the settings anew.
type Reload<'a> = &'a (dyn Fn() -> std::result::Result<Loaded, Vec<String>> + Sync);
/// Changes what is logged; false if that failed.
type LogHandle = Box<dyn Fn(EnvFilter) -> bool>;

/// Runs the server until it is asked to stop. On SIGHUP `read` is asked for the settings: what can change while the
/// server runs does, and what takes a restart is named in the log.
///
/// # Errors
/// What the store, the sockets or the runtime report; `Timeout` if it did not end in order.
pub fn run_server(loaded: &Loaded, read: Reload<'_>) -> Result<()> {
    let settings = &loaded.settings;
    let spans = settings.otlp_endpoint().map(|_| Spans::new(settings.trace_sample));
    let tracer = spans.as_ref().map(|spans| spans.tracer.clone());
    let log = start_logging(&settings.log, settings.log_format, tracer);
    raise_open_files();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(std::thread::available_parallelism().map_or(2, |cores| cores.get().clamp(2, 4)))
        .max_blocking_threads(64)
        .thread_name("pegaflow-rpc")
        .enable_all()
        .build()
        .map_err(|error| Error::from_io("cannot start the runtime", error))?;
    let outcome = runtime.block_on(run(loaded, read, &log, spans));
    // Whatever hangs must not keep the process.
    runtime.shutdown_timeout(Duration::from_secs(1));
    outcome
}

/// Logs to standard error, and has sampled spans started by `tracer` where it is given.
fn start_logging(filter: &str, format: LogFormat, tracer: Option<SdkTracer>) -> LogHandle {
    let (filter, handle) = reload::Layer::new(EnvFilter::try_new(filter).unwrap_or_default());
    let log = tracing_subscriber::fmt::layer().with_writer(std::io::stderr as fn() -> Stderr).with_ansi(false);
    let log = match format {
        LogFormat::Text => log.boxed(),
        LogFormat::Json => log.json().with_current_span(false).boxed(),
    };
    // Whoever asks for traces does not have to ask for their logs.
    let ours =
        Targets::new().with_target("pegaflow", LevelFilter::DEBUG).with_target("pegaflow_otlp", LevelFilter::OFF);
    let traces = tracer.map(|tracer| {
        let layer = tracing_opentelemetry::layer().with_tracer(tracer);
        layer.with_location(false).with_threads(false).with_tracked_inactivity(false).with_filter(ours)
    });
    tracing_subscriber::registry().with(log.with_filter(filter)).with(traces).init();
    Box::new(move |filter| handle.reload(filter).is_ok())
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

async fn run(loaded: &Loaded, read: Reload<'_>, log: &LogHandle, spans: Option<Spans>) -> Result<()> {
    let settings = &loaded.settings;
    let mut stop = StopSignals::new()?;
    let mut hang_up =
        signal(SignalKind::hangup()).map_err(|error| Error::from_io("cannot listen for signals", error))?;
    report_file_size_limit()?;
    let metrics = Metrics::new();
    let mut readiness = Readiness::new(metrics);
    let exporter = spans.zip(settings.otlp_endpoint()).map(|(Spans { ended, counts, .. }, endpoint)| {
        readiness = readiness.clone().with_spans(counts);
        Exporter::start(endpoint, ended, readiness.clone(), settings.otlp_metrics_interval())
    });
    let http = match settings.http_address() {
        Some(address) => Some(HttpServer::start(address, readiness.clone()).await?),
        None => None,
    };
    let config = settings.engine();
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
                close(&engine, settings)?;
            }
            return Ok(());
        }
    };
    tracing::info!(took = ?opening.elapsed(), "the cache is open");
    let socket = settings.socket.clone().unwrap_or_else(default_socket_path);
    let tcp = settings.tcp_service();
    let access = tcp.as_ref().ok().cloned().flatten();
    let listening = match tcp {
        Ok(tcp) => Listeners::bind_with(&socket, tcp).await,
        Err(error) => Err(error),
    };
    let listeners = match listening {
        Ok(listeners) => listeners,
        Err(error) => {
            close(&engine, settings)?;
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
    let mut current = loaded.clone();
    loop {
        tokio::select! {
            () = stop.asked() => break,
            _ = hang_up.recv() => match read() {
                Ok(wanted) => {
                    reload(access.as_ref(), &wanted.settings);
                    change(&current, &wanted, &server, log);
                    current = wanted;
                }
                Err(problems) => {
                    problems.iter().for_each(|problem| tracing::error!(%problem, "the settings stay as they are"));
                }
            },
        }
    }
    let timeout = Duration::from_secs(current.settings.shutdown_timeout);
    tracing::info!(?timeout, "stopping: no new connections, operations end, the store is flushed");
    stop.exit_at_next();
    let stopped = server.stop(timeout).await.inspect(|()| tracing::info!("stopped"));
    if let Some(exporter) = exporter {
        exporter.stop().await;
    }
    stopped
}

/// Takes up a changed certificate and changed tokens. What can not be read changes nothing.
fn reload(tcp: Option<&TcpService>, settings: &Settings) {
    let Some(TcpService { tls: Some(tls), access, .. }) = tcp else { return };
    match tls.reload() {
        Ok(()) => tracing::info!("the TLS certificate was read again"),
        Err(error) => tracing::error!(%error, "the TLS certificate stays as it is"),
    }
    match settings.tokens.as_deref().map(Tokens::read).transpose() {
        Ok(Some(tokens)) => {
            tracing::info!(tokens = tokens.len(), "the tokens were read again");
            access.replace(tokens);
        }
        Ok(None) => {}
        Err(error) => tracing::error!(%error, "the tokens stay as they are"),
    }
}

/// Puts changed settings into effect, as far as that goes while the server runs.
fn change(current: &Loaded, wanted: &Loaded, server: &Server, log: &LogHandle) {
    let (mut is_same, engine) = (true, server.engine());
    for (before, after) in current.effective.iter().zip(&wanted.effective) {
        if before.values == after.values {
            continue;
        }
        is_same = false;
        let (name, before, value) = (after.name.as_str(), before.values.join(","), after.values.join(","));
        let is_done = match name {
            "log" => EnvFilter::try_new(&wanted.settings.log).is_ok_and(log),
            "load_policy" => {
                engine.set_load_policy(wanted.settings.load_policy);
                true
            }
            "guaranteed_percent" => engine.set_guaranteed_percent(wanted.settings.guaranteed_percent).is_ok(),
            "write_budget" => engine.set_write_budget(wanted.settings.write_budget).is_ok(),
            "scrub" => engine.set_scrub(wanted.settings.scrub).is_ok(),
            // Read when it is needed; and where the settings are is no setting of the server.
            "shutdown_timeout" | "config" | "tokens" => true,
            _ => false,
        };
        match is_done {
            true => tracing::info!(name, before, value, "a setting was changed"),
            false => tracing::warn!(name, before, value, "this setting was changed and takes a restart"),
        }
    }
    if is_same {
        tracing::info!("asked to read the settings again; none was changed");
    }
}

fn close(engine: &Engine, settings: &Settings) -> Result<()> {
    engine.close(Instant::now() + Duration::from_secs(settings.shutdown_timeout))
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
            std::process::exit(ExitStatus::Failed as i32);
        });
    }
}
