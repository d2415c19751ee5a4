//! What the run needs of this process: whoever asks it to stop is heard, and a store that no server has open is served here,
//! over a socket that goes with the run.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use pegaflow_engine::{Engine, Error, Result};
use pegaflow_server::settings::Settings;
use pegaflow_server::{Listeners, Metrics, Readiness, Server, ServerConfig};
use tokio::runtime::Runtime;
use tokio::signal::unix::{SignalKind, signal};

/// Ends when it is dropped; what was reported durable is.
pub(super) struct Host {
    runtime: Runtime,
    served: Option<(Server, PathBuf, Duration)>,
}

impl Host {
    /// With settings, serves their store.
    ///
    /// # Errors
    /// What the store or the socket report.
    pub(super) fn start(settings: Option<&Settings>, stop: &Arc<AtomicBool>) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .map_err(|error| Error::from_io("cannot start the runtime", error))?;
        for kind in [SignalKind::terminate(), SignalKind::interrupt()] {
            let _inside = runtime.enter();
            let mut asked = signal(kind).map_err(|error| Error::from_io("cannot listen for signals", error))?;
            let stop = Arc::clone(stop);
            runtime.spawn(async move {
                asked.recv().await;
                stop.store(true, Ordering::Relaxed);
                // Asked twice: at once. What the journal says is durable.
                asked.recv().await;
                std::process::exit(1);
            });
        }
        let Some(settings) = settings else { return Ok(Self { runtime, served: None }) };
        let mut engine = settings.engine();
        // It lives for this run: nobody waits for what was hot before.
        if let Some(nvme) = &mut engine.nvme {
            nvme.warm_start = false;
        }
        let engine = Engine::open(engine)?;
        let default = pegaflow_server::default_socket_path();
        let socket = default.with_file_name(format!("prewarm-{}.sock", std::process::id()));
        let listeners = match runtime.block_on(Listeners::bind(&socket, None)) {
            Ok(listeners) => listeners,
            Err(error) => {
                engine.close(std::time::Instant::now() + Duration::from_secs(10)).ok();
                return Err(error);
            }
        };
        let readiness = Readiness::new(Metrics::new());
        let server = runtime.block_on(async { Server::start(engine, listeners, &ServerConfig::default(), &readiness) });
        let timeout = Duration::from_secs(settings.shutdown_timeout);
        Ok(Self { runtime, served: Some((server, socket, timeout)) })
    }

    /// Where the store is served.
    pub(super) fn socket(&self) -> Option<&Path> {
        self.served.as_ref().map(|(_, socket, _)| socket.as_path())
    }

    /// Closes the store.
    ///
    /// # Errors
    /// `Timeout`, or what the store reports.
    pub(super) fn end(mut self) -> Result<()> {
        let served = self.served.take();
        let ended = served.map_or(Ok(()), |(server, _, timeout)| self.runtime.block_on(server.stop(timeout)));
        self.runtime.shutdown_timeout(Duration::from_secs(1));
        ended
    }
}
