//! The second socket, `<socket>.mem`: a worker sends the 16-byte token that it got from ShareArena and receives the
//! descriptor of the arena. A wrong token, a foreign user or a slow sender is cut off. The connection then stays: it tells
//! the server when the worker can touch the arena no more, by a byte or by the exit of its process. A connection that only
//! breaks tells nothing: of a process that is killed the sockets close before its GPU's copies have stopped.
#![expect(unsafe_code, reason = "asks the kernel for the peer's process descriptor, and waits for it")]

use std::collections::HashMap;
use std::io::{IoSlice, IoSliceMut, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use pegaflow_engine::{Error, ErrorKind, Result};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
};
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncReadExt, AsyncWriteExt, Interest};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;

use crate::limits::{MEMORY_CONNECTIONS_MAX, TOKEN_BYTES};
use crate::peer::Peer;
use crate::transport::{accept_unix, is_trusted_peer};

/// A token: good once.
pub(crate) type Token = [u8; TOKEN_BYTES];

/// The byte that goes with a descriptor.
const GRANTED: u8 = 1;

/// The byte that comes without a descriptor when the server cannot learn of the end of the worker's process.
const UNWATCHED: u8 = 2;

/// The byte with which a worker says that it can touch the arena no more.
const GOODBYE: u8 = 1;

/// What a token is good for.
pub(crate) struct Grant {
    pub(crate) session: u64,
    pub(crate) fd: OwnedFd,
    pub(crate) peer: Arc<Peer>,
}

/// Descriptors waiting to be fetched, by token: one for each session.
#[derive(Default)]
pub(crate) struct Tokens {
    waiting: Mutex<HashMap<Token, Grant>>,
}

impl Tokens {
    /// Keeps a descriptor for whoever brings the token that is returned; an earlier one of the session is void.
    pub(crate) fn add(&self, grant: Grant) -> Token {
        let token = rand::random();
        let mut waiting = self.waiting.lock();
        waiting.retain(|_, earlier| earlier.session != grant.session);
        waiting.insert(token, grant);
        token
    }

    /// Forgets what a session has not fetched.
    pub(crate) fn forget(&self, session: u64) {
        self.waiting.lock().retain(|_, grant| grant.session != session);
    }

    fn take(&self, token: &Token) -> Option<Grant> {
        self.waiting.lock().remove(token)
    }
}

/// Serves the second socket until it is dropped.
///
/// # Cancel safety
/// Dropping it stops accepting; a descriptor that was being sent may or may not arrive.
pub(crate) async fn serve(listener: UnixListener, tokens: Arc<Tokens>, timeout: Duration) {
    let permits = Arc::new(Semaphore::new(MEMORY_CONNECTIONS_MAX));
    loop {
        let Ok(permit) = Arc::clone(&permits).acquire_owned().await else { return };
        let stream = accept_unix(&listener).await;
        let tokens = Arc::clone(&tokens);
        tokio::spawn(async move {
            let _permit = permit;
            match tokio::time::timeout(timeout, hand_over(stream, &tokens)).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => tracing::warn!("the arena was not handed over: {error:#}"),
                Err(_) => tracing::warn!("the arena was not handed over: no token within {timeout:?}"),
            }
        });
    }
}

async fn hand_over(mut stream: UnixStream, tokens: &Tokens) -> Result<()> {
    let failed = |doing: &str| {
        let doing = doing.to_owned();
        move |error: std::io::Error| Error::from_io(doing, error)
    };
    let mut token = Token::default();
    stream.read_exact(&mut token).await.map_err(failed("reading the token"))?;
    let Grant { fd, peer, .. } = tokens.take(&token).ok_or_else(|| Error::new(ErrorKind::NotFound, "unknown token"))?;
    let process = process_of(&stream).and_then(|process| {
        // SAFETY: the descriptor is owned by the `AsyncFd` and closed only with it.
        Ok(unsafe { AsyncFd::register_with_interest(process, Interest::READABLE) }?)
    });
    if process.as_ref().is_err_and(|error| error.kind() == std::io::ErrorKind::Unsupported) {
        // Best effort: without it the worker only misses the reason.
        let _told = stream.write_all(&[UNWATCHED]).await;
    }
    let process = process.map_err(failed("watching the worker's process"))?;
    peer.arena_given();
    let sent = stream
        .async_io(Interest::WRITABLE, || {
            let fds = [fd.as_fd()];
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            control.push(SendAncillaryMessage::ScmRights(&fds));
            let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
            rustix::net::sendmsg(&stream, &[IoSlice::new(&[GRANTED])], &mut control, flags)?;
            Ok(())
        })
        .await;
    // It may have arrived even if sending failed, so the worker is watched all the same.
    tokio::spawn(watch(stream, process, peer));
    sent.map_err(failed("sending the descriptor"))
}

/// Waits until the worker can touch the arena no more.
async fn watch(mut stream: UnixStream, process: AsyncFd<OwnedFd>, peer: Arc<Peer>) {
    let mut byte = [0];
    let has_left = tokio::select! {
        read = stream.read(&mut byte) => matches!(read, Ok(1..)) && byte == [GOODBYE],
        _exited = process.readable() => true,
    };
    if !has_left {
        // The connection broke: its process is ending, and its copies with it, but only at its exit have they ended.
        let _exited = process.readable().await;
    }
    peer.arena_left();
}

/// A descriptor of the process at the other end, readable once it has exited, in whatever PID namespace it is.
fn process_of(stream: &UnixStream) -> std::io::Result<OwnedFd> {
    /// Linux 6.5; not in `libc` for all targets.
    const SO_PEERPIDFD: libc::c_int = 77;
    let mut fd: libc::c_int = -1;
    let mut length = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: the kernel writes one descriptor's number, for which there is room.
    let result = unsafe {
        libc::getsockopt(
            stream.as_raw_fd(),
            libc::SOL_SOCKET,
            SO_PEERPIDFD,
            std::ptr::from_mut(&mut fd).cast(),
            &raw mut length,
        )
    };
    if result == 0 && fd >= 0 {
        // SAFETY: the descriptor is new and nobody else's.
        return Ok(unsafe { OwnedFd::from_raw_fd(fd) });
    }
    // Before Linux 6.5: by number, which names the right process because it holds the connection open, see below.
    // A process of another PID namespace has no number here.
    let process = stream.peer_cred()?.pid().and_then(rustix::process::Pid::from_raw).ok_or_else(|| {
        std::io::Error::new(
            std::io::ErrorKind::Unsupported,
            "it is in another PID namespace, and Linux is older than 6.5",
        )
    })?;
    let process = rustix::process::pidfd_open(process, rustix::process::PidfdFlags::empty())?;
    let mut byte = [0; 1];
    match stream.try_read(&mut byte) {
        Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => Ok(process),
        _ => Err(std::io::Error::from(std::io::ErrorKind::ConnectionReset)),
    }
}

/// A worker's end of the connection; dropped, it tells the server that this process can touch the arena no more.
///
/// Not a socket of the runtime: it says goodbye also when that has ended.
pub(crate) struct ArenaConnection(std::os::unix::net::UnixStream);

impl Drop for ArenaConnection {
    fn drop(&mut self) {
        // It does not block; a server that does not read it has ended.
        let _told = (&self.0).write(&[GOODBYE]);
    }
}

/// Fetches the descriptor for a token from the server's second socket, with the connection to keep for as long as this
/// process may touch the arena.
///
/// # Errors
/// `PermissionDenied` if the socket belongs to another user, `NotFound` if the server does not know the token,
/// `Unsupported` if it cannot watch this process, `Timeout`, `Io`.
///
/// # Cancel safety
/// Dropping it closes the connection; the token may be used up.
pub(crate) async fn fetch(path: &Path, token: &[u8], timeout: Duration) -> Result<(OwnedFd, ArenaConnection)> {
    let fetch = async {
        let failed = |error: std::io::Error| Error::from_io(format!("fetching memory over {}", path.display()), error);
        let mut stream = UnixStream::connect(path).await.map_err(failed)?;
        if !is_trusted_peer(&stream) {
            return Err(Error::new(
                ErrorKind::PermissionDenied,
                format!("{} belongs to another user; start the server as the same user", path.display()),
            ));
        }
        stream.write_all(token).await.map_err(failed)?;
        let fd = match stream.async_io(Interest::READABLE, || receive_fd(&stream)).await.map_err(failed)? {
            (GRANTED, Some(fd)) => fd,
            (UNWATCHED, _) => {
                let message = format!(
                    "the server at {} cannot learn of the end of this process, which is in another PID namespace: that takes \
                     Linux 6.5; give both the same PID namespace (docker run --pid, Kubernetes: shareProcessNamespace)",
                    path.display()
                );
                return Err(Error::new(ErrorKind::Unsupported, message));
            }
            _ => {
                let message = format!("the server at {} did not know the token", path.display());
                return Err(Error::new(ErrorKind::NotFound, message));
            }
        };
        Ok((fd, ArenaConnection(stream.into_std().map_err(failed)?)))
    };
    tokio::time::timeout(timeout, fetch).await.unwrap_or_else(|_| {
        Err(Error::new(ErrorKind::Timeout, format!("no answer from {} within {timeout:?}", path.display())))
    })
}

/// The byte that came (0 for the end of the stream), and the descriptor with it.
fn receive_fd(stream: &UnixStream) -> std::io::Result<(u8, Option<OwnedFd>)> {
    let mut byte = [0];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
    rustix::net::recvmsg(stream, &mut [IoSliceMut::new(&mut byte)], &mut control, flags)?;
    let fd = control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
        _ => None,
    });
    Ok((byte[0], fd))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use pegaflow_engine::{ByteSize, Engine, EngineConfig};

    use super::*;

    const TIMEOUT: Duration = Duration::from_millis(300);

    async fn with_socket<F: Future<Output = ()>>(test: impl FnOnce(std::path::PathBuf, Arc<Tokens>, Engine) -> F) {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("s.mem");
        let tokens = Arc::new(Tokens::default());
        let listener = UnixListener::bind(&path).expect("bind");
        let config = EngineConfig { dram: ByteSize::mib(16), shared_dram: true, ..EngineConfig::default() };
        let engine = Engine::open(config).expect("opens");
        let server = tokio::spawn(serve(listener, Arc::clone(&tokens), TIMEOUT));
        test(path, tokens, engine).await;
        server.abort();
    }

    fn grant(engine: &Engine, session: u64, peer: &Arc<Peer>) -> Grant {
        let fd = engine.shared_arena().expect("shared").0.try_clone_to_owned().expect("a descriptor");
        Grant { session, fd, peer: Arc::clone(peer) }
    }

    fn kind(result: Result<(OwnedFd, ArenaConnection)>) -> Result<(), ErrorKind> {
        result.map(|_| ()).map_err(|error| error.kind())
    }

    #[tokio::test]
    async fn a_token_is_good_once_and_dies_with_its_session() {
        with_socket(|path, tokens, engine| async move {
            let peer = Arc::default();
            let (mine, other) = (tokens.add(grant(&engine, 1, &peer)), tokens.add(grant(&engine, 2, &peer)));
            let (fd, _connection) = fetch(&path, &mine, TIMEOUT).await.expect("known token");
            let (_, id, bytes) = engine.shared_arena().expect("shared");
            assert!(pegaflow_engine::ArenaView::map(fd.as_fd(), id, bytes).is_ok());
            assert_eq!(kind(fetch(&path, &mine, TIMEOUT).await), Err(ErrorKind::NotFound));
            tokens.forget(2);
            assert_eq!(kind(fetch(&path, &other, TIMEOUT).await), Err(ErrorKind::NotFound));
            assert_eq!(kind(fetch(&path, &[9; 16], TIMEOUT).await), Err(ErrorKind::NotFound));
        })
        .await;
    }

    #[tokio::test]
    async fn a_worker_has_left_the_arena_when_it_says_so_and_not_when_its_connection_breaks() {
        with_socket(|path, tokens, engine| async move {
            for says_goodbye in [true, false] {
                let peer = Arc::new(Peer::default());
                let token = tokens.add(grant(&engine, 1, &peer));
                let (_fd, connection) = fetch(&path, &token, TIMEOUT).await.expect("known token");
                assert!(peer.has_arena());
                if says_goodbye {
                    drop(connection);
                    while peer.has_arena() {
                        tokio::time::sleep(Duration::from_millis(1)).await;
                    }
                } else {
                    // As a process that is killed: its sockets close first.
                    rustix::net::shutdown(&connection.0, rustix::net::Shutdown::Both).expect("open");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    assert!(peer.has_arena(), "this process still lives");
                }
            }
        })
        .await;
    }

    #[tokio::test]
    async fn a_slow_sender_is_cut_off_and_holds_nobody_up() {
        with_socket(|path, tokens, engine| async move {
            let mut slow = UnixStream::connect(&path).await.expect("connect");
            slow.write_all(&[1]).await.expect("first byte");
            let token = tokens.add(grant(&engine, 1, &Arc::default()));
            assert!(fetch(&path, &token, TIMEOUT).await.is_ok(), "others are served meanwhile");
            // The server closes: a read ends, with or without an error. One byte a second never gets there.
            let mut end = [0];
            assert!(!matches!(slow.read(&mut end).await, Ok(1..)));
        })
        .await;
    }
}
