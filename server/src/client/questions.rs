//! Lookups over the server's third socket: the caller writes its question and reads the answer in its own thread. The
//! connection is made in the background, once for each session; until it is there, and whenever it breaks, lookups go
//! over gRPC.

use std::io::{ErrorKind as IoErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use pegaflow_engine::{Error, ErrorKind, Result};
use prost::Message;
use tokio::runtime::Runtime;

use crate::limits::MESSAGE_BYTES_MAX;
use crate::lookup_socket::{HEADER_BYTES, frame};
use crate::proto::lookup_answer::Answer;
use crate::proto::{LookupAnswer, LookupReply, LookupRequest};
use crate::transport::{is_trusted_peer, lookup_socket_path};

/// How long after one attempt to connect the next may follow.
const RETRY: Duration = Duration::from_secs(1);
/// How long an attempt may take.
const CONNECT_MAX: Duration = Duration::from_secs(1);

/// The connection for lookups, if there is one.
#[derive(Default)]
pub(super) struct Questions {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    connection: Option<UnixStream>,
    /// When it was last tried to make one.
    tried: Option<Instant>,
}

impl Questions {
    /// The answer; `None` if it has to be asked for over gRPC.
    pub(super) fn ask(
        self: &Arc<Self>,
        request: &LookupRequest,
        socket: &Path,
        runtime: &Runtime,
        timeout: Duration,
    ) -> Option<Result<LookupReply>> {
        let deadline = Instant::now() + timeout;
        // Two threads that look up at once are rare; the second does not wait for the first.
        let mut state = self.state.try_lock()?;
        let Some(connection) = state.connection.take() else {
            if state.tried.is_none_or(|tried| tried.elapsed() >= RETRY) {
                state.tried = Some(Instant::now());
                runtime.spawn(Arc::clone(self).connect(lookup_socket_path(socket)));
            }
            return None;
        };
        match exchange(&connection, request, deadline) {
            Ok(answer) => {
                state.connection = Some(connection);
                Some(reply_of(answer))
            }
            // What still comes would be taken for the next answer: this connection is not used again.
            Err(error) if matches!(error.kind(), IoErrorKind::WouldBlock | IoErrorKind::TimedOut) => {
                Some(Err(Error::new(ErrorKind::Timeout, format!("no answer from the server within {timeout:?}"))))
            }
            Err(error) => {
                tracing::debug!(%error, "the connection for lookups broke");
                None
            }
        }
    }

    async fn connect(self: Arc<Self>, path: PathBuf) {
        let connected = tokio::time::timeout(CONNECT_MAX, tokio::net::UnixStream::connect(&path)).await;
        let Ok(Ok(stream)) = connected else {
            tracing::debug!(path = %path.display(), "no connection for lookups: they go over gRPC");
            return;
        };
        if !is_trusted_peer(&stream) {
            tracing::warn!(path = %path.display(), "the socket for lookups belongs to another user: it is not used");
            return;
        }
        let blocking = stream.into_std().and_then(|stream| stream.set_nonblocking(false).map(|()| stream));
        self.state.lock().connection = blocking.ok();
    }
}

fn reply_of(answer: LookupAnswer) -> Result<LookupReply> {
    match answer.answer {
        Some(Answer::Found(reply)) => Ok(reply),
        Some(Answer::Refused(refusal)) => {
            let kind = ErrorKind::ALL.into_iter().find(|kind| kind.as_str() == refusal.kind);
            Err(Error::new(kind.unwrap_or(ErrorKind::Io), refusal.message))
        }
        None => Err(Error::new(
            ErrorKind::Unsupported,
            "an answer of an unknown kind; the server is newer than this client",
        )),
    }
}

/// One question and its answer. After an error the connection is of no use any more.
fn exchange(connection: &UnixStream, question: &LookupRequest, deadline: Instant) -> std::io::Result<LookupAnswer> {
    let mut connection = InTime { connection, deadline };
    connection.write_all(&frame(question))?;
    let mut length = [0; HEADER_BYTES];
    connection.read_exact(&mut length)?;
    let length = u32::from_le_bytes(length) as usize;
    if length > MESSAGE_BYTES_MAX {
        return Err(IoErrorKind::InvalidData.into());
    }
    let mut answer = vec![0; length];
    connection.read_exact(&mut answer)?;
    Ok(LookupAnswer::decode(answer.as_slice())?)
}

/// Reads and writes that end at a deadline, all together.
struct InTime<'a> {
    connection: &'a UnixStream,
    deadline: Instant,
}

impl InTime<'_> {
    fn left(&self) -> std::io::Result<Option<Duration>> {
        match self.deadline.saturating_duration_since(Instant::now()) {
            Duration::ZERO => Err(IoErrorKind::TimedOut.into()),
            left => Ok(Some(left)),
        }
    }
}

impl Read for InTime<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        self.connection.set_read_timeout(self.left()?)?;
        (&mut &*self.connection).read(buffer)
    }
}

impl Write for InTime<'_> {
    fn write(&mut self, buffer: &[u8]) -> std::io::Result<usize> {
        self.connection.set_write_timeout(self.left()?)?;
        (&mut &*self.connection).write(buffer)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(20);

    struct Asker {
        questions: Arc<Questions>,
        socket: PathBuf,
        runtime: Runtime,
    }

    impl Asker {
        fn ask(&self, timeout: Duration) -> Option<Result<LookupReply>> {
            self.questions.ask(&LookupRequest::default(), &self.socket, &self.runtime, timeout)
        }

        /// Whether there is a connection within the patience of the test.
        fn connects(&self) -> bool {
            assert!(self.ask(PATIENCE).is_none(), "nobody waits for the connection");
            let until = Instant::now() + PATIENCE;
            while self.questions.state.lock().connection.is_none() && Instant::now() < until {
                std::thread::sleep(Duration::from_millis(1));
            }
            self.questions.state.lock().connection.is_some()
        }
    }

    /// Somebody who asks, and the listener of the server that the test plays.
    fn played(dir: &tempfile::TempDir) -> (Asker, UnixListener) {
        let socket = dir.path().join("s");
        let listener = UnixListener::bind(lookup_socket_path(&socket)).expect("bind");
        let runtime = Runtime::new().expect("starts");
        (Asker { questions: Arc::default(), socket, runtime }, listener)
    }

    fn answer(stream: &UnixStream, answer: Answer) {
        let mut connection = InTime { connection: stream, deadline: Instant::now() + PATIENCE };
        let mut length = [0; HEADER_BYTES];
        connection.read_exact(&mut length).expect("a question");
        connection.read_exact(&mut vec![0; u32::from_le_bytes(length) as usize]).expect("all of it");
        connection.write_all(&frame(&LookupAnswer { answer: Some(answer) })).expect("taken");
    }

    #[test]
    fn answers_and_refusals_arrive() {
        let dir = tempfile::tempdir().expect("a directory");
        let (asker, listener) = played(&dir);
        assert!(asker.connects());
        let server = std::thread::spawn(move || {
            let (stream, _) = listener.accept().expect("connected");
            answer(&stream, Answer::Found(LookupReply { hit_blocks: 5, ..LookupReply::default() }));
            let refusal = crate::proto::Refusal { kind: "busy".into(), message: "so many".into() };
            answer(&stream, Answer::Refused(refusal));
        });
        assert_eq!(asker.ask(PATIENCE).expect("answered").expect("found").hit_blocks, 5);
        let refused = asker.ask(PATIENCE).expect("answered").expect_err("refused");
        assert_eq!((refused.kind(), refused.message()), (ErrorKind::Busy, "so many"));
        server.join().expect("ends");
        assert!(asker.ask(PATIENCE).is_none(), "the server has gone: gRPC knows more");
    }

    #[test]
    fn a_late_answer_is_a_timeout_and_never_the_answer_to_another_question() {
        let dir = tempfile::tempdir().expect("a directory");
        let (asker, listener) = played(&dir);
        assert!(asker.connects());
        let late = asker.ask(Duration::from_millis(20)).expect("asked").expect_err("nobody answers");
        assert_eq!(late.kind(), ErrorKind::Timeout);
        let (stream, _) = listener.accept().expect("connected");
        assert!(asker.ask(PATIENCE).is_none(), "and not before some time has passed");
        let _gone = InTime { connection: &stream, deadline: Instant::now() + PATIENCE }
            .write_all(&frame(&LookupAnswer { answer: Some(Answer::Found(LookupReply::default())) }));
        asker.questions.state.lock().tried = None;
        assert!(asker.connects(), "another connection");
    }

    #[test]
    fn without_the_third_socket_lookups_go_over_grpc() {
        let dir = tempfile::tempdir().expect("a directory");
        let (asker, listener) = played(&dir);
        drop(listener);
        for _ in 0..3 {
            assert!(asker.ask(PATIENCE).is_none());
            asker.questions.state.lock().tried = None;
        }
    }
}
