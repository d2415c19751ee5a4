//! The third socket, `<socket>.ask`: lookups without HTTP. A request stands in the way of its first token while it is looked
//! up, so the asker writes its question and reads the answer in its own thread: only the server has to be woken for it.
//! Either is one frame: the length of the message as a little-endian u32, at most 8 MiB, and the message, a
//! `LookupRequest` and a `LookupAnswer`. One question at a time on a connection. A foreign user, a frame that is too long or
//! does not arrive whole in time ends the connection; lookups over gRPC stay.

use std::io::{Error, ErrorKind, Result};
use std::sync::Arc;
use std::time::Duration;

use pegaflow_engine::ErrorKind::InvalidInput;
use prost::Message;
use prost::bytes::{Buf, Bytes, BytesMut};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::task::JoinSet;

use crate::limits::{MESSAGE_BYTES_MAX, SESSIONS_MAX};
use crate::proto::lookup_answer::Answer;
use crate::proto::{LookupAnswer, LookupRequest, Refusal};
use crate::service::look_up;
use crate::session::Sessions;
use crate::transport::accept_unix;

/// The bytes before a message: its length.
pub(crate) const HEADER_BYTES: usize = 4;
/// How long the rest of a frame may take after its first byte, and an answer to be taken.
const FRAME_WAIT_MAX: Duration = Duration::from_secs(2);
/// Room for a question of usual size, so that it comes with one read.
const READ_BYTES: usize = 16 << 10;

/// A message behind its length.
pub(crate) fn frame(message: &impl Message) -> Vec<u8> {
    let length = message.encoded_len();
    let mut frame = Vec::with_capacity(HEADER_BYTES + length);
    frame.extend((length as u32).to_le_bytes());
    // A vector grows, so there is always room.
    let _never_full = message.encode(&mut frame);
    frame
}

/// Serves the third socket until it is dropped. As many connections as there may be sessions; more wait in the backlog.
///
/// # Cancel safety
/// Dropping it closes all connections; a question that was being answered may have taken its lease.
pub(crate) async fn serve(listener: UnixListener, sessions: Arc<Sessions>) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            stream = accept_unix(&listener), if connections.len() < SESSIONS_MAX => {
                connections.spawn(answer_all(stream, Arc::clone(&sessions)));
            }
            Some(_ended) = connections.join_next() => {}
        }
    }
}

async fn answer_all(stream: UnixStream, sessions: Arc<Sessions>) {
    if let Err(error) = answer_each(stream, &sessions).await {
        tracing::warn!(%error, "a connection for lookups was closed");
    }
}

/// Answers until the client closes the connection.
async fn answer_each(mut stream: UnixStream, sessions: &Arc<Sessions>) -> Result<()> {
    let mut received = BytesMut::new();
    while let Some(question) = next_frame(&mut stream, &mut received).await? {
        let found = match LookupRequest::decode(question) {
            Ok(request) => look_up(sessions, request).await,
            Err(error) => Err(pegaflow_engine::Error::new(InvalidInput, format!("this is no lookup: {error}"))),
        };
        let answer = found.map_or_else(
            |error| Answer::Refused(Refusal { kind: error.kind().as_str().into(), message: format!("{error:#}") }),
            Answer::Found,
        );
        in_time(stream.write_all(&frame(&LookupAnswer { answer: Some(answer) }))).await?;
    }
    Ok(())
}

/// The next message; `None` when the client has closed the connection.
async fn next_frame(stream: &mut UnixStream, received: &mut BytesMut) -> Result<Option<Bytes>> {
    received.reserve(READ_BYTES);
    // The first byte comes when the client has a question, the rest at once.
    if received.is_empty() {
        match stream.read_buf(received).await {
            Ok(0) => return Ok(None),
            // It has gone without its answer.
            Err(error) if error.kind() == ErrorKind::ConnectionReset => return Ok(None),
            read => read?,
        };
    }
    let rest = async {
        while received.len() < HEADER_BYTES {
            read_more(stream, received).await?;
        }
        let length = received.get_u32_le() as usize;
        if length > MESSAGE_BYTES_MAX {
            let message = format!("a question of {length} bytes; give at most {MESSAGE_BYTES_MAX}");
            return Err(Error::new(ErrorKind::InvalidData, message));
        }
        received.reserve(length.saturating_sub(received.len()));
        while received.len() < length {
            read_more(stream, received).await?;
        }
        Ok(received.split_to(length).freeze())
    };
    in_time(rest).await.map(Some)
}

async fn read_more(stream: &mut UnixStream, received: &mut BytesMut) -> Result<()> {
    match stream.read_buf(received).await? {
        0 => Err(ErrorKind::UnexpectedEof.into()),
        _ => Ok(()),
    }
}

async fn in_time<T>(work: impl Future<Output = Result<T>>) -> Result<T> {
    let late = || Error::new(ErrorKind::TimedOut, format!("the client kept it waiting for {FRAME_WAIT_MAX:?}"));
    tokio::time::timeout(FRAME_WAIT_MAX, work).await.unwrap_or_else(|_| Err(late()))
}

#[cfg(test)]
mod tests {
    use pegaflow_engine::{ByteSize, Engine, EngineConfig};

    use super::*;

    async fn exchange(stream: &mut UnixStream, question: &[u8]) -> Result<LookupAnswer> {
        stream.write_all(question).await?;
        let mut length = [0; HEADER_BYTES];
        stream.read_exact(&mut length).await?;
        let mut answer = vec![0; u32::from_le_bytes(length) as usize];
        stream.read_exact(&mut answer).await?;
        Ok(LookupAnswer::decode(answer.as_slice())?)
    }

    fn kind(answer: LookupAnswer) -> String {
        match answer.answer {
            Some(Answer::Refused(refusal)) => refusal.kind,
            other => format!("{other:?}"),
        }
    }

    #[tokio::test]
    async fn what_is_no_lookup_is_refused_or_cut_off_and_holds_nobody_up() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("s.ask");
        let listener = UnixListener::bind(&path).expect("bind");
        let config = EngineConfig { dram: ByteSize::mib(16), ..EngineConfig::default() };
        let sessions = Sessions::new(Engine::open(config).expect("opens"));
        let server = tokio::spawn(serve(listener, sessions));
        let connect = || async { UnixStream::connect(&path).await.expect("connect") };

        let mut good = connect().await;
        let question = frame(&LookupRequest { session: 7, ..LookupRequest::default() });
        assert_eq!(kind(exchange(&mut good, &question).await.expect("an answer")), "not_found");
        let garbage = [&3_u32.to_le_bytes()[..], &[0xff; 3]].concat();
        assert_eq!(kind(exchange(&mut good, &garbage).await.expect("an answer")), "invalid_input");
        let two = [question.clone(), question.clone()].concat();
        assert_eq!(kind(exchange(&mut good, &two).await.expect("the first answer")), "not_found");
        assert_eq!(kind(exchange(&mut good, &[]).await.expect("the second")), "not_found");

        let mut long = connect().await;
        let too_long = frame(&LookupRequest { instance: "x".repeat(MESSAGE_BYTES_MAX), ..LookupRequest::default() });
        assert!(exchange(&mut long, &too_long).await.is_err(), "cut off and not taken in");
        let mut slow = connect().await;
        assert!(exchange(&mut slow, &question[..question.len() - 1]).await.is_err(), "cut off after the time");
        // The whole time without a question is allowed.
        assert_eq!(kind(exchange(&mut good, &question).await.expect("an answer")), "not_found");

        server.abort();
        assert!(exchange(&mut good, &question).await.is_err(), "connections end with the server");
    }
}
