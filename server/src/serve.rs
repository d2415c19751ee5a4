//! The running server: listeners, RPC service and sessions around one engine, and their orderly end. Data enters through
//! the sockets and goes to the engine; this module only starts and stops.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use pegaflow_engine::{Engine, Error, ErrorKind, Result};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tonic::transport::Server as Transport;

use crate::access::AccessLayer;
use crate::http::Readiness;
use crate::limits::{CONNECTION_REQUESTS_MAX, MESSAGE_BYTES_MAX};
use crate::proto::pega_flow_server::PegaFlowServer;
use crate::service::Service;
use crate::session::Sessions;
use crate::tcp;
use crate::transport::{Listeners, SocketFiles, Tcp, unix_connections};
use crate::{lookup_socket, memory_socket};

/// HTTP/2 windows: a full message goes out without waiting for the other side.
const STREAM_WINDOW_BYTES: u32 = MESSAGE_BYTES_MAX as u32;
const CONNECTION_WINDOW_BYTES: u32 = 4 * STREAM_WINDOW_BYTES;
/// The keys of a lookup come in one frame, not in 16 KiB pieces that each wake somebody.
const FRAME_BYTES: u32 = 1 << 20;
/// A client that answers no ping for this long is gone.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(20);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(20);

/// How long connections get to close after everything else is done.
const GRACE_MIN: Duration = Duration::from_millis(200);
const GRACE_MAX: Duration = Duration::from_secs(2);

/// How a server serves. The engine has its own configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServerConfig {
    /// How long a client of the second socket may take to send its token. Default: 2 s.
    pub memory_socket_timeout: Duration,
}

impl Default for ServerConfig {
    fn default() -> Self {
        Self { memory_socket_timeout: Duration::from_secs(2) }
    }
}

impl ServerConfig {
    /// Checks every field against its limits.
    ///
    /// # Errors
    /// `InvalidInput`.
    pub fn validate(&self) -> Result<()> {
        if self.memory_socket_timeout.is_zero() {
            return Err(Error::new(ErrorKind::InvalidInput, "memory_socket_timeout is 0; give more"));
        }
        Ok(())
    }
}

/// A server that serves.
pub struct Server {
    sessions: Arc<Sessions>,
    stop: watch::Sender<bool>,
    rpc: Vec<JoinHandle<Result<(), tonic::transport::Error>>>,
    memory: JoinHandle<()>,
    lookups: JoinHandle<()>,
    files: SocketFiles,
}

impl Server {
    /// The engine that is served.
    pub(crate) fn engine(&self) -> &Engine {
        self.sessions.engine()
    }

    /// Serves `engine` on `listeners` until [`Server::stop`]. To be called inside a tokio runtime.
    pub fn start(engine: Engine, listeners: Listeners, config: &ServerConfig, readiness: &Readiness) -> Self {
        let sessions = Sessions::new(engine);
        let service = Arc::new(Service::new(Arc::clone(&sessions)));
        let (stop, stopped) = watch::channel(false);
        let transport = || {
            Transport::builder()
                .concurrency_limit_per_connection(CONNECTION_REQUESTS_MAX)
                .max_concurrent_streams(CONNECTION_REQUESTS_MAX as u32)
                .initial_stream_window_size(STREAM_WINDOW_BYTES)
                .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
                .max_frame_size(FRAME_BYTES)
                .http2_keepalive_interval(Some(KEEPALIVE_INTERVAL))
                .http2_keepalive_timeout(Some(KEEPALIVE_TIMEOUT))
        };
        let served = || {
            PegaFlowServer::from_arc(Arc::clone(&service))
                .max_decoding_message_size(MESSAGE_BYTES_MAX)
                .max_encoding_message_size(MESSAGE_BYTES_MAX)
        };
        let stopped = || {
            let mut stopped = stopped.clone();
            async move {
                let _ended = stopped.wait_for(|stop| *stop).await;
            }
        };
        let Listeners { rpc, memory, lookups, tcp, files } = listeners;
        let mut tasks = vec![tokio::spawn(
            transport().add_service(served()).serve_with_incoming_shutdown(unix_connections(rpc), stopped()),
        )];
        if let Some(Tcp { listener, tls, access }) = tcp {
            let serve = transport()
                .layer(AccessLayer::new(access))
                .add_service(served())
                .serve_with_incoming_shutdown(tcp::connections(listener, tls), stopped());
            tasks.push(tokio::spawn(serve));
        }
        let memory = tokio::spawn(memory_socket::serve(memory, sessions.tokens(), config.memory_socket_timeout));
        let lookups = tokio::spawn(lookup_socket::serve(lookups, Arc::clone(&sessions)));
        readiness.serving(&sessions);
        Self { sessions, stop, rpc: tasks, memory, lookups, files }
    }

    /// The sockets' path.
    pub fn socket(&self) -> PathBuf {
        self.files.path().to_owned()
    }

    /// Open sessions.
    pub fn sessions(&self) -> usize {
        self.sessions.count()
    }

    /// Stops in order: no new connections and sessions, operations in flight end, the engine flushes and closes, clients
    /// see the end of their streams. At most `timeout`, after which what is left is cut off.
    ///
    /// # Errors
    /// What the engine's close gives: what was reported durable is durable all the same.
    ///
    /// # Cancel safety
    /// Dropping it cuts everything off.
    pub async fn stop(self, timeout: Duration) -> Result<()> {
        let deadline = Instant::now() + timeout;
        self.sessions.refuse_new();
        let Self { sessions, stop, rpc, memory, lookups, files } = self;
        // A client that looks for a server now finds none instead of one that refuses.
        drop(files);
        memory.abort();
        lookups.abort();
        stop.send_replace(true);
        if tokio::time::timeout(timeout / 2, sessions.drained()).await.is_err() {
            tracing::warn!(operations = sessions.operations(), "operations still in flight; they are cut off");
        }
        let engine = sessions.engine().clone();
        let closed = tokio::task::spawn_blocking(move || engine.close(deadline)).await;
        sessions.end_streams();
        let grace = deadline.saturating_duration_since(Instant::now()).clamp(GRACE_MIN, GRACE_MAX);
        for mut task in rpc {
            match tokio::time::timeout(grace, &mut task).await {
                Ok(Ok(Err(error))) => tracing::warn!(%error, "a listener ended badly"),
                Ok(_) => {}
                Err(_) => task.abort(),
            }
        }
        closed.unwrap_or_else(|_| Err(Error::new(ErrorKind::Io, "closing the engine panicked; see the log")))
    }
}
