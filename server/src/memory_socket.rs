//! The second socket, `<socket>.mem`: a worker sends the 16-byte token that it got from ShareMemory and receives the
//! descriptor of the memory. A wrong token, a foreign user or a slow sender is cut off.

use std::collections::HashMap;
use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use pegaflow_engine::{Error, ErrorKind, Result};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt, Interest};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;

use crate::limits::{MEMORY_CONNECTIONS_MAX, TOKEN_BYTES};
use crate::transport::{accept_unix, is_trusted_peer};

/// A token: good once.
pub(crate) type Token = [u8; TOKEN_BYTES];

/// The byte that goes with a descriptor.
const GRANTED: u8 = 1;

/// Descriptors waiting to be fetched, by token. Bounded by the sessions and their memories.
#[derive(Default)]
pub(crate) struct Tokens {
    waiting: Mutex<HashMap<Token, (u64, OwnedFd)>>,
}

impl Tokens {
    /// Keeps a descriptor for whoever brings the token that is returned.
    pub(crate) fn add(&self, session: u64, fd: OwnedFd) -> Token {
        let token = rand::random();
        self.waiting.lock().insert(token, (session, fd));
        token
    }

    /// Forgets what a session has not fetched.
    pub(crate) fn forget(&self, session: u64) {
        self.waiting.lock().retain(|_, (owner, _)| *owner != session);
    }

    fn take(&self, token: &Token) -> Option<OwnedFd> {
        self.waiting.lock().remove(token).map(|(_, fd)| fd)
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
                Ok(Err(error)) => tracing::warn!("shared memory not handed over: {error:#}"),
                Err(_) => tracing::warn!("shared memory not handed over: no token within {timeout:?}"),
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
    let fd = tokens.take(&token).ok_or_else(|| Error::new(ErrorKind::NotFound, "unknown token"))?;
    stream
        .async_io(Interest::WRITABLE, || {
            let fds = [fd.as_fd()];
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            control.push(SendAncillaryMessage::ScmRights(&fds));
            let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
            rustix::net::sendmsg(&stream, &[IoSlice::new(&[GRANTED])], &mut control, flags)?;
            Ok(())
        })
        .await
        .map_err(failed("sending the descriptor"))
}

/// Fetches the descriptor for a token from the server's second socket.
///
/// # Errors
/// `PermissionDenied` if the socket belongs to another user, `NotFound` if the server does not know the token, `Timeout`,
/// `Io`.
///
/// # Cancel safety
/// Dropping it closes the connection; the token may be used up.
pub(crate) async fn fetch(path: &Path, token: &[u8], timeout: Duration) -> Result<OwnedFd> {
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
        stream.async_io(Interest::READABLE, || receive_fd(&stream)).await.map_err(failed)?.ok_or_else(|| {
            Error::new(ErrorKind::NotFound, format!("the server at {} did not know the token", path.display()))
        })
    };
    tokio::time::timeout(timeout, fetch).await.unwrap_or_else(|_| {
        Err(Error::new(ErrorKind::Timeout, format!("no answer from {} within {timeout:?}", path.display())))
    })
}

fn receive_fd(stream: &UnixStream) -> std::io::Result<Option<OwnedFd>> {
    let mut byte = [0];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
    rustix::net::recvmsg(stream, &mut [IoSliceMut::new(&mut byte)], &mut control, flags)?;
    let fd = control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
        _ => None,
    });
    Ok(fd.filter(|_| byte == [GRANTED]))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::shared_memory;

    const TIMEOUT: Duration = Duration::from_millis(300);

    async fn with_socket<F: Future<Output = ()>>(test: impl FnOnce(std::path::PathBuf, Arc<Tokens>) -> F) {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("s.mem");
        let tokens = Arc::new(Tokens::default());
        let listener = UnixListener::bind(&path).expect("bind");
        let server = tokio::spawn(serve(listener, Arc::clone(&tokens), TIMEOUT));
        test(path, tokens).await;
        server.abort();
    }

    fn kind(result: Result<OwnedFd>) -> Result<(), ErrorKind> {
        result.map(|_| ()).map_err(|error| error.kind())
    }

    #[tokio::test]
    async fn a_token_is_good_once_and_dies_with_its_session() {
        with_socket(|path, tokens| async move {
            let make = || shared_memory::create(64, 4, None).expect("memory").1;
            let (mine, other) = (tokens.add(1, make()), tokens.add(2, make()));
            let fd = fetch(&path, &mine, TIMEOUT).await.expect("known token");
            assert!(shared_memory::open(&fd, 64, 4).is_ok());
            assert_eq!(kind(fetch(&path, &mine, TIMEOUT).await), Err(ErrorKind::NotFound));
            tokens.forget(2);
            assert_eq!(kind(fetch(&path, &other, TIMEOUT).await), Err(ErrorKind::NotFound));
            assert_eq!(kind(fetch(&path, &[9; 16], TIMEOUT).await), Err(ErrorKind::NotFound));
        })
        .await;
    }

    #[tokio::test]
    async fn a_slow_sender_is_cut_off_and_holds_nobody_up() {
        with_socket(|path, tokens| async move {
            let mut slow = UnixStream::connect(&path).await.expect("connect");
            slow.write_all(&[1]).await.expect("first byte");
            let token = tokens.add(1, shared_memory::create(64, 4, None).expect("memory").1);
            assert!(fetch(&path, &token, TIMEOUT).await.is_ok(), "others are served meanwhile");
            // The server closes: a read ends, with or without an error. One byte a second never gets there.
            let mut end = [0];
            assert!(!matches!(slow.read(&mut end).await, Ok(1..)));
        })
        .await;
    }
}
