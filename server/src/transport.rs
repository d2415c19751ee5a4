//! Where the server listens: a Unix socket that only its user can reach, two more for descriptors and for lookups beside it,
//! and loopback TCP if asked for. A stale socket is replaced, a living server never.

use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use futures::Stream;
use pegaflow_engine::{Error, ErrorKind, Result};
use rustix::fs::{FlockOperation, Mode, OFlags};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, UnixListener, UnixStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tonic::transport::server::Connected;

use crate::access::{Access, Role};
use crate::limits::CONNECTIONS_MAX;
use crate::tls::ServerTls;

/// The longest path of a socket that leaves room for the suffix of the second one; the kernel's limit is 107.
const SOCKET_PATH_BYTES_MAX: usize = 103;
/// How long to wait after an accept failed, for example for want of descriptors.
pub(crate) const ACCEPT_RETRY: Duration = Duration::from_millis(200);

/// The default socket: `$XDG_RUNTIME_DIR/pegaflow/pegaflow.sock`, or `/tmp/pegaflow-<uid>/pegaflow.sock`.
pub fn default_socket_path() -> PathBuf {
    let directory = match std::env::var_os("XDG_RUNTIME_DIR") {
        Some(runtime) if Path::new(&runtime).is_absolute() => PathBuf::from(runtime).join("pegaflow"),
        _ => PathBuf::from(format!("/tmp/pegaflow-{}", rustix::process::geteuid().as_raw())),
    };
    directory.join("pegaflow.sock")
}

/// The second socket beside `socket`: `<socket>.mem`.
pub fn memory_socket_path(socket: &Path) -> PathBuf {
    with_suffix(socket, ".mem")
}

/// The third socket beside `socket`: `<socket>.ask`.
pub(crate) fn lookup_socket_path(socket: &Path) -> PathBuf {
    with_suffix(socket, ".ask")
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

/// Whether the process at the other end runs as the same user or as root.
pub(crate) fn is_trusted_peer(stream: &UnixStream) -> bool {
    let uid = stream.peer_cred().map(|peer| peer.uid());
    uid.is_ok_and(|uid| uid == 0 || uid == rustix::process::geteuid().as_raw())
}

/// Accepts the next connection of a trusted user; others are closed at once.
///
/// # Cancel safety
/// Nothing is lost when dropped.
pub(crate) async fn accept_unix(listener: &UnixListener) -> UnixStream {
    loop {
        match listener.accept().await {
            Ok((stream, _)) if is_trusted_peer(&stream) => return stream,
            Ok((stream, _)) => {
                tracing::warn!(peer = ?stream.peer_cred().ok(), "connection of another user refused");
            }
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection; trying again");
                tokio::time::sleep(ACCEPT_RETRY).await;
            }
        }
    }
}

/// The open listening sockets; the socket files are removed when dropped.
#[derive(Debug)]
pub struct Listeners {
    pub(crate) rpc: UnixListener,
    pub(crate) memory: UnixListener,
    pub(crate) lookups: UnixListener,
    pub(crate) tcp: Option<Tcp>,
    pub(crate) files: SocketFiles,
}

/// The TCP side of a server.
#[derive(Debug, Clone)]
pub struct TcpService {
    /// Where to listen. Without TLS a loopback address.
    pub address: SocketAddr,
    /// Without it, whoever can reach the address can read along.
    pub tls: Option<Arc<ServerTls>>,
    /// Who may do what there.
    pub access: Arc<Access>,
}

#[derive(Debug)]
pub(crate) struct Tcp {
    pub(crate) listener: TcpListener,
    pub(crate) tls: Option<Arc<ServerTls>>,
    pub(crate) access: Arc<Access>,
}

/// The socket files and the lock that makes them ours.
#[derive(Debug)]
pub(crate) struct SocketFiles {
    path: PathBuf,
    _lock: OwnedFd,
}

impl SocketFiles {
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for SocketFiles {
    fn drop(&mut self) {
        for path in [self.path.clone(), memory_socket_path(&self.path), lookup_socket_path(&self.path)] {
            if let Err(error) = std::fs::remove_file(&path)
                && error.kind() != io::ErrorKind::NotFound
            {
                tracing::warn!(%error, path = %path.display(), "cannot remove the socket");
            }
        }
    }
}

impl Listeners {
    /// Binds `socket`, `<socket>.mem` and `<socket>.ask`, and `tcp` if given. Makes the last directory of the path if missing. To be
    /// called inside a tokio runtime.
    ///
    /// # Errors
    /// `Locked` if a server already answers there, `InvalidInput` for a path that is too long or no socket, or a TCP
    /// address that is not loopback; `PermissionDenied` for a directory that others may write, `Io`.
    ///
    /// # Cancel safety
    /// Dropping it may leave socket files behind; the next start replaces them.
    pub async fn bind(socket: &Path, tcp: Option<SocketAddr>) -> Result<Self> {
        let access = || Arc::new(Access::everybody(Role::ReadOnly));
        let tcp = tcp.map(|address| TcpService { address, tls: None, access: access() });
        Self::bind_with(socket, tcp).await
    }

    /// As [`Listeners::bind`], where everybody is read-only over TCP, with all that there is to say of that.
    ///
    /// # Errors
    /// As there.
    ///
    /// # Cancel safety
    /// As there.
    pub async fn bind_with(socket: &Path, tcp: Option<TcpService>) -> Result<Self> {
        if socket.as_os_str().len() > SOCKET_PATH_BYTES_MAX {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                format!(
                    "the socket path {} has {} bytes; give at most {SOCKET_PATH_BYTES_MAX}",
                    socket.display(),
                    socket.as_os_str().len()
                ),
            ));
        }
        if let Some(tcp) = tcp.as_ref().filter(|tcp| tcp.tls.is_none() && !tcp.address.ip().is_loopback()) {
            let message = format!(
                "TCP address {} is not loopback; give it a certificate and a key, or 127.0.0.1:PORT, or use the Unix socket",
                tcp.address
            );
            return Err(Error::new(ErrorKind::InvalidInput, message));
        }
        prepare_directory(socket)?;
        let lock = lock(socket)?;
        let (memory_socket, lookup_socket) = (memory_socket_path(socket), lookup_socket_path(socket));
        for path in [socket, &memory_socket, &lookup_socket] {
            check_replaceable(path).await?;
        }
        // The first socket comes last: whoever can connect to it finds all.
        let memory = bind_owner_only(&memory_socket, socket)?;
        let lookups = bind_owner_only(&lookup_socket, socket)?;
        let rpc = bind_owner_only(socket, socket)?;
        let files = SocketFiles { path: socket.to_owned(), _lock: lock };
        let tcp = match tcp {
            Some(TcpService { address, tls, access }) => {
                let bound = TcpListener::bind(address).await;
                let listener = bound.map_err(|error| Error::from_io(format!("cannot listen on {address}"), error))?;
                Some(Tcp { listener, tls, access })
            }
            None => None,
        };
        Ok(Self { rpc, memory, lookups, tcp, files })
    }

    /// The TCP address in use, if any.
    pub fn tcp_address(&self) -> Option<SocketAddr> {
        self.tcp.as_ref().and_then(|tcp| tcp.listener.local_addr().ok())
    }
}

/// Makes the socket's directory, for us alone, if it is missing; the default directory must be ours alone.
fn prepare_directory(socket: &Path) -> Result<()> {
    let directory = match socket.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    match std::fs::DirBuilder::new().mode(0o700).create(directory) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        Err(error) => return Err(refused_by_system(&format!("cannot make directory {}", directory.display()), error)),
    }
    let data = std::fs::symlink_metadata(directory)
        .map_err(|error| Error::from_io(format!("cannot read {}", directory.display()), error))?;
    let denied = |why: String| {
        Error::new(ErrorKind::PermissionDenied, format!("the socket directory {} {why}", directory.display()))
    };
    if socket == default_socket_path() {
        let uid = rustix::process::geteuid().as_raw();
        if !data.is_dir() || data.uid() != uid {
            return Err(denied(format!("is not a directory of user {uid}; remove it or give --socket")));
        }
        if data.mode() & 0o077 != 0 {
            return Err(denied(format!("has mode {:o}; make it 700 (chmod 700)", data.mode() & 0o777)));
        }
    }
    Ok(())
}

/// The system's error, with the remedy where nothing may be written.
fn refused_by_system(doing: &str, source: io::Error) -> Error {
    let error = Error::from_io(doing, source);
    if error.kind() != ErrorKind::PermissionDenied {
        return error;
    }
    let user = rustix::process::geteuid().as_raw();
    let message = format!("{}; give a --socket in a directory that user {user} may write", error.message());
    Error::new(ErrorKind::PermissionDenied, message)
}

/// Takes `<socket>.lck`; it is held as long as the descriptor lives, however the process ends.
fn lock(socket: &Path) -> Result<OwnedFd> {
    let path = with_suffix(socket, ".lck");
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let fd = rustix::fs::open(&path, flags, Mode::RUSR | Mode::WUSR)
        .map_err(|error| refused_by_system(&format!("cannot open {}", path.display()), error.into()))?;
    match rustix::fs::flock(&fd, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(fd),
        Err(rustix::io::Errno::WOULDBLOCK) => Err(answered(socket)),
        Err(error) => Err(Error::from_io(format!("cannot lock {}", path.display()), error.into())),
    }
}

fn answered(socket: &Path) -> Error {
    Error::new(
        ErrorKind::Locked,
        format!("a server already uses the socket {}; stop it or give another --socket", socket.display()),
    )
}

/// A path is free, or holds a socket that nobody answers.
async fn check_replaceable(path: &Path) -> Result<()> {
    let data = match std::fs::symlink_metadata(path) {
        Ok(data) => data,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(Error::from_io(format!("cannot read {}", path.display()), error)),
    };
    if !data.file_type().is_socket() {
        return Err(Error::new(
            ErrorKind::InvalidInput,
            format!("{} is there and is not a socket; move it away or give another --socket", path.display()),
        ));
    }
    match UnixStream::connect(path).await {
        Ok(_) => Err(answered(path)),
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            tracing::info!(path = %path.display(), "replacing a stale socket");
            Ok(())
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(Error::from_io(format!("cannot tell whether a server answers at {}", path.display()), error)),
    }
}

/// Binds under a name of our own, restricts it to the owner, then moves it to `path`: at no moment is there a socket at
/// `path` that others can open.
fn bind_owner_only(path: &Path, socket: &Path) -> Result<UnixListener> {
    let failed = |error: io::Error| Error::from_io(format!("cannot listen on {}", path.display()), error);
    let fresh = with_suffix(socket, ".new");
    match std::fs::remove_file(&fresh) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(error)),
        _ => {}
    }
    let listener = UnixListener::bind(&fresh).map_err(failed)?;
    std::fs::set_permissions(&fresh, std::fs::Permissions::from_mode(0o600)).map_err(failed)?;
    std::fs::rename(&fresh, path).map_err(failed)?;
    Ok(listener)
}

/// A connection that counts against the bound as long as it lives.
pub(crate) struct Bounded<T> {
    io: T,
    _permit: OwnedSemaphorePermit,
}

impl<T> Connected for Bounded<T> {
    type ConnectInfo = ();

    fn connect_info(&self) {}
}

impl<T: AsyncRead + Unpin> AsyncRead for Bounded<T> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_read(cx, buf)
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Bounded<T> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }
}

/// The connections of a Unix socket, of trusted users only, bounded.
pub(crate) fn unix_connections(listener: UnixListener) -> impl Stream<Item = io::Result<Bounded<UnixStream>>> + Send {
    let permits = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    futures::stream::unfold((listener, permits), |(listener, permits)| async move {
        let permit = Arc::clone(&permits).acquire_owned().await.ok()?;
        let io = accept_unix(&listener).await;
        Some((Ok(Bounded { io, _permit: permit }), (listener, permits)))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn bind(path: &Path) -> Result<Listeners, ErrorKind> {
        Listeners::bind(path, None).await.map_err(|error| error.kind())
    }

    #[tokio::test]
    async fn sockets_are_for_their_owner_only_and_go_away() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("made/p.sock");
        let listeners = bind(&path).await.expect("free");
        let all = [path.clone(), memory_socket_path(&path), lookup_socket_path(&path)];
        for socket in &all {
            let mode = std::fs::metadata(socket).expect("there").mode();
            assert_eq!(mode & 0o777, 0o600, "{}", socket.display());
        }
        assert_eq!(std::fs::metadata(dir.path().join("made")).expect("there").mode() & 0o777, 0o700);
        drop(listeners);
        assert!(!all.iter().any(|socket| socket.exists()));
    }

    #[tokio::test]
    async fn a_stale_socket_is_replaced_a_living_one_is_not() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("p.sock");
        drop(std::os::unix::net::UnixListener::bind(&path).expect("bind"));
        drop(std::os::unix::net::UnixListener::bind(memory_socket_path(&path)).expect("bind"));
        let first = bind(&path).await.expect("stale sockets do not count");
        assert_eq!(bind(&path).await.err(), Some(ErrorKind::Locked), "our own server");
        assert!(UnixStream::connect(&path).await.is_ok(), "the first is unharmed");
        drop(first);
        let foreign = std::os::unix::net::UnixListener::bind(&path).expect("bind");
        assert_eq!(bind(&path).await.err(), Some(ErrorKind::Locked), "a server that knows nothing of our lock");
        drop(foreign);
        assert!(bind(&path).await.is_ok());
    }

    #[tokio::test]
    async fn what_is_no_socket_is_left_alone() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("p.sock");
        std::fs::write(&path, "precious").expect("write");
        assert_eq!(bind(&path).await.err(), Some(ErrorKind::InvalidInput));
        assert_eq!(std::fs::read(&path).expect("read"), b"precious");
    }

    #[tokio::test]
    async fn paths_and_addresses_are_checked_at_their_limits() {
        let dir = tempfile::tempdir().expect("a directory");
        let base = dir.path().join("");
        for (length, ok) in [(102, true), (103, true), (104, false)] {
            let name = "x".repeat(length - base.as_os_str().len());
            let bound = bind(&base.join(name)).await;
            assert_eq!(bound.is_ok(), ok, "{length}: {:?}", bound.err());
        }
        let path = base.join("p.sock");
        let tcp = |address: &str| Listeners::bind(&path, Some(address.parse().expect("an address")));
        assert_eq!(tcp("0.0.0.0:0").await.err().map(|e| e.kind()), Some(ErrorKind::InvalidInput));
        assert!(tcp("127.0.0.1:0").await.expect("loopback").tcp_address().is_some());
    }
}
