//! One connection to the server, and what has to be done on it before a worker can work: session, registration, arena. A
//! connection is used for one session and never connects again by itself.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use futures::future::BoxFuture;
use hyper_util::rt::TokioIo;
use pegaflow_engine::{Error, ErrorKind, Result};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};
use tokio_rustls::client::TlsStream;
use tokio_rustls::rustls::pki_types::ServerName;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::service::Interceptor;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Channel, Endpoint as Transport, Uri};
use tonic::{Status, Streaming};

use super::arena::{self, MappedArena, SessionArena};
use super::config::{ClientConfig, Endpoint, Registration, Token};
use crate::limits::{MESSAGE_BYTES_MAX, TOKEN_BYTES};
use crate::proto::pega_flow_client::PegaFlowClient;
use crate::proto::session_event::Event;
use crate::proto::{OpenSessionRequest, SessionEvent, ShareArenaRequest};
use crate::status::from_status;
use crate::transport::is_trusted_peer;
use crate::{memory_socket, memory_socket_path, wire};

pub(super) type Rpc = PegaFlowClient<InterceptedService<Channel, Bearer>>;

/// Shows the token with every request, if there is one.
#[derive(Clone)]
pub(super) struct Bearer(Option<MetadataValue<Ascii>>);

impl Bearer {
    fn new(token: Option<&Token>) -> Result<Self> {
        let value = token.map(|token| format!("Bearer {}", token.as_str()).parse::<MetadataValue<Ascii>>()).transpose();
        let mut value = value.map_err(|_| Error::new(ErrorKind::InvalidInput, "this is no token"))?;
        if let Some(value) = &mut value {
            value.set_sensitive(true);
        }
        Ok(Self(value))
    }
}

impl Interceptor for Bearer {
    fn call(&mut self, mut request: tonic::Request<()>) -> Result<tonic::Request<()>, Status> {
        if let Some(value) = &self.0 {
            request.metadata_mut().insert("authorization", value.clone());
        }
        Ok(request)
    }
}

/// HTTP/2 windows, as on the server.
const STREAM_WINDOW_BYTES: u32 = MESSAGE_BYTES_MAX as u32;
const CONNECTION_WINDOW_BYTES: u32 = 4 * STREAM_WINDOW_BYTES;

/// Pings of an otherwise idle connection.
const KEEPALIVE: Duration = Duration::from_secs(20);
/// As many heartbeats may be missed before the server is taken for dead.
const SILENT_HEARTBEATS: u32 = 4;

/// A live session.
pub(super) struct Link {
    pub(super) rpc: Rpc,
    pub(super) session: u64,
    pub(super) events: Streaming<SessionEvent>,
    /// Silence longer than this means that the server is gone.
    pub(super) silence_max: Duration,
}

/// A single attempt to connect; its channel cannot connect a second time, to what might be another server.
struct ConnectOnce(Option<Endpoint>);

/// Either kind of socket.
trait Socket: AsyncRead + AsyncWrite + Send + Unpin {}

impl Socket for UnixStream {}
impl Socket for TcpStream {}
impl Socket for TlsStream<TcpStream> {}

impl tower::Service<Uri> for ConnectOnce {
    type Response = TokioIo<Box<dyn Socket>>;
    type Error = std::io::Error;
    type Future = BoxFuture<'static, Result<Self::Response, Self::Error>>;

    fn poll_ready(&mut self, _cx: &mut Context<'_>) -> Poll<Result<(), std::io::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _uri: Uri) -> Self::Future {
        let endpoint = self.0.take();
        Box::pin(async move {
            match endpoint {
                Some(Endpoint::Unix(path)) => {
                    let stream = UnixStream::connect(path).await?;
                    if !is_trusted_peer(&stream) {
                        return Err(std::io::Error::from(std::io::ErrorKind::PermissionDenied));
                    }
                    Ok(TokioIo::new(Box::new(stream) as Box<dyn Socket>))
                }
                Some(Endpoint::Tcp(address)) => {
                    let stream = TcpStream::connect(address).await?;
                    stream.set_nodelay(true)?;
                    Ok(TokioIo::new(Box::new(stream) as Box<dyn Socket>))
                }
                Some(Endpoint::Tls { host, port, tls }) => {
                    let connector = tls.connector().map_err(std::io::Error::other)?;
                    let name = ServerName::try_from(host.clone()).map_err(std::io::Error::other)?;
                    let stream = TcpStream::connect((host.as_str(), port)).await?;
                    stream.set_nodelay(true)?;
                    let stream = connector.connect(name, stream).await?;
                    Ok(TokioIo::new(Box::new(stream) as Box<dyn Socket>))
                }
                None => Err(std::io::Error::from(std::io::ErrorKind::NotConnected)),
            }
        })
    }
}

/// Connects and opens a session, within the configuration's RPC timeout.
///
/// # Errors
/// `Closed` if no server is there, `PermissionDenied` if the socket belongs to another user, `Busy`, `Timeout`.
///
/// # Cancel safety
/// Dropping it closes the connection, which ends the session.
pub(super) async fn connect(config: ClientConfig) -> Result<Link> {
    let timeout = config.rpc_timeout;
    within(timeout, "connecting", async {
        // The address is only a name: the connector knows where to go.
        let channel = Transport::from_static("http://pegaflow.local")
            .initial_stream_window_size(STREAM_WINDOW_BYTES)
            .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
            .http2_keep_alive_interval(KEEPALIVE)
            .keep_alive_timeout(KEEPALIVE)
            .connect_with_connector(ConnectOnce(Some(config.endpoint.clone())))
            .await
            .map_err(|error| no_server(&config.endpoint, &error))?;
        let mut rpc = Rpc::new(InterceptedService::new(channel, Bearer::new(config.token.as_ref())?))
            .max_decoding_message_size(MESSAGE_BYTES_MAX)
            .max_encoding_message_size(MESSAGE_BYTES_MAX);
        let request = OpenSessionRequest {
            client_name: config.name.clone(),
            client_version: env!("CARGO_PKG_VERSION").into(),
            client_kind: "client".into(),
        };
        let mut events = rpc.open_session(request).await.map_err(|status| from_status(&status))?.into_inner();
        let first = events.message().await.map_err(|status| from_status(&status))?;
        let Some(SessionEvent { event: Some(Event::Opened(opened)) }) = first else {
            return Err(Error::new(
                ErrorKind::Unsupported,
                "the server did not open the session; is it a PegaFlow server?",
            ));
        };
        let heartbeat = Duration::from_millis(u64::from(opened.heartbeat_ms).clamp(100, 60_000));
        Ok(Link { rpc, session: opened.session, events, silence_max: heartbeat * SILENT_HEARTBEATS })
    })
    .await
}

fn no_server(endpoint: &Endpoint, error: &tonic::transport::Error) -> Error {
    let mut cause: &dyn std::error::Error = error;
    let mut io = None;
    while let Some(source) = cause.source() {
        cause = source;
        io = source.downcast_ref::<std::io::Error>().or(io);
    }
    // What an I/O error was made of is not among its sources.
    if let Some(inner) = io.and_then(std::io::Error::get_ref) {
        if let Some(problem) = inner.downcast_ref::<Error>() {
            return problem.clone();
        }
        if let Some(problem) = inner.downcast_ref::<tokio_rustls::rustls::Error>() {
            let message =
                format!("the server at {endpoint} cannot be trusted, or does not trust this client: {problem}");
            return Error::new(ErrorKind::PermissionDenied, message);
        }
    }
    if io.is_some_and(|io| io.kind() == std::io::ErrorKind::PermissionDenied) {
        return Error::new(
            ErrorKind::PermissionDenied,
            format!("the server at {endpoint} belongs to another user; start it as the same user"),
        );
    }
    Error::new(ErrorKind::Closed, format!("no server at {endpoint} ({cause}); start one with: pegaflow-server"))
}

/// Runs `work`, at most `timeout`.
pub(super) async fn within<T>(timeout: Duration, what: &str, work: impl Future<Output = Result<T>>) -> Result<T> {
    tokio::time::timeout(timeout, work)
        .await
        .unwrap_or_else(|_| Err(Error::new(ErrorKind::Timeout, format!("{what} took longer than {timeout:?}"))))
}

/// Registers the worker on a live session and maps the arena, unless it is the one that is mapped already.
///
/// # Errors
/// The server's refusal, the device's, or `Unsupported` over TCP, which cannot pass memory.
///
/// # Cancel safety
/// Dropping it leaves a session that is partly registered; registering again is allowed.
pub(super) async fn register(
    mut rpc: Rpc,
    session: u64,
    registration: Registration,
    mapped: Option<Arc<MappedArena>>,
    config: ClientConfig,
) -> Result<Arc<SessionArena>> {
    let timeout = config.rpc_timeout;
    let request = wire::register_request(session, &registration.spec, registration.memory.layout().blocks());
    within(timeout, "registering", async {
        rpc.register(request).await.map(drop).map_err(|status| from_status(&status))
    })
    .await?;
    let Endpoint::Unix(socket) = &config.endpoint else {
        return Err(Error::new(
            ErrorKind::Unsupported,
            "loads and saves need the server's memory, which TCP cannot pass; use the server's Unix socket",
        ));
    };
    let shared = within(timeout, "sharing the arena", async {
        rpc.share_arena(ShareArenaRequest { session }).await.map_err(|status| from_status(&status))
    })
    .await?
    .into_inner();
    if shared.token.len() != TOKEN_BYTES {
        return Err(Error::new(ErrorKind::InvalidInput, format!("a token of {} bytes", shared.token.len())));
    }
    let id = wire::arena(&shared.arena)?;
    let (fd, connection) = memory_socket::fetch(&memory_socket_path(socket), &shared.token, timeout).await?;
    let mapped = match mapped.filter(|mapped| mapped.id() == id) {
        Some(mapped) => mapped,
        None => Arc::new(MappedArena::new(arena::map(fd.as_fd(), id, shared.bytes)?, registration.memory)?),
    };
    Ok(Arc::new(SessionArena { mapped, _connection: connection }))
}

/// Whether a server that refused a registration would refuse it again: then there is no point in repeating it.
pub(super) fn is_refusal(kind: ErrorKind) -> bool {
    matches!(
        kind,
        ErrorKind::InvalidInput | ErrorKind::GeometryMismatch | ErrorKind::Unsupported | ErrorKind::PermissionDenied
    )
}

/// Whether the session cannot be used any more after this answer: it does not come from the server's service but from the
/// transport, so nobody knows whether the server acts on the request.
pub(super) fn is_link_broken(status: &Status) -> bool {
    crate::status::kind_of(status).is_none() && status.code() != tonic::Code::OutOfRange
}
