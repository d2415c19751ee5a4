//! Connections of clients, within bounds, until SIGTERM or SIGINT.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto::Builder;
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::Semaphore;

use crate::engines::Engines;
use crate::generate::{Generator, Settings};
use crate::{http, metrics};

/// More connections wait in the kernel's backlog.
const CONNECTIONS_MAX: usize = 4096;
/// The head of a request must come within this time, also after an answer.
const HEAD_MAX: Duration = Duration::from_secs(60);
const ACCEPT_RETRY: Duration = Duration::from_millis(200);

/// How the router is reached, and how it ends.
pub(crate) struct Service {
    pub(crate) listen: SocketAddr,
    pub(crate) health_interval: Duration,
    pub(crate) drain: Duration,
}

impl Service {
    /// Serves until a signal, then lets requests end. An error says what can not be had.
    pub(crate) async fn run(self, engines: Arc<Engines>, settings: Settings) -> Result<(), String> {
        let handle = metrics::install().map_err(|error| format!("metrics: {error}"))?;
        let listener = TcpListener::bind(self.listen)
            .await
            .map_err(|error| format!("cannot listen on {}: {error}; give another --listen", self.listen))?;
        let address = listener.local_addr().map_err(|error| format!("address of the socket: {error}"))?;
        let mut term = signal(SignalKind::terminate()).map_err(|error| format!("SIGTERM: {error}"))?;
        let mut interrupt = signal(SignalKind::interrupt()).map_err(|error| format!("SIGINT: {error}"))?;
        let looks: Vec<_> = (0..engines.all().len())
            .map(|number| tokio::spawn(look_after(Arc::clone(&engines), number, self.health_interval)))
            .collect();
        let routes = http::routes(Generator::new(engines, settings), handle);
        let graceful = GracefulShutdown::new();
        let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
        tracing::info!(%address, "ready");
        loop {
            let accepted = async {
                let place = Arc::clone(&places).acquire_owned().await;
                (place, listener.accept().await)
            };
            let (place, stream) = tokio::select! {
                (place, accepted) = accepted => match (place, accepted) {
                    (Ok(place), Ok((stream, _))) => (place, stream),
                    (_, Err(error)) => {
                        tracing::warn!(%error, "cannot accept a connection; trying again");
                        tokio::time::sleep(ACCEPT_RETRY).await;
                        continue;
                    }
                    (Err(_), _) => continue,
                },
                _ = term.recv() => break,
                _ = interrupt.recv() => break,
            };
            let _unimportant = stream.set_nodelay(true);
            let mut builder = Builder::new(TokioExecutor::new()).http1_only();
            builder.http1().timer(TokioTimer::new()).header_read_timeout(HEAD_MAX);
            let service = TowerToHyperService::new(routes.clone());
            let connection = builder.serve_connection(TokioIo::new(stream), service).into_owned();
            let connection = graceful.watch(connection);
            tokio::spawn(async move {
                if let Err(error) = connection.await {
                    tracing::debug!(error, "a connection ended");
                }
                drop(place);
            });
        }
        tracing::info!("stopping; requests may go on for {:?}", self.drain);
        drop(listener);
        if tokio::time::timeout(self.drain, graceful.shutdown()).await.is_err() {
            tracing::warn!("requests were cut off");
        }
        looks.iter().for_each(tokio::task::JoinHandle::abort);
        Ok(())
    }
}

/// Asks one engine for its health, again and again.
async fn look_after(engines: Arc<Engines>, number: usize, interval: Duration) {
    let Some(engine) = engines.all().get(number) else { return };
    loop {
        engines.look_at(engine).await;
        tokio::time::sleep(interval).await;
    }
}
