//! Connections over TCP: accepted within the bounds of the gate, encrypted if there is a certificate, closed if they do not
//! come to the point. A handshake runs beside the others: a slow client holds up nobody but itself.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};

use futures::Stream;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::time::{Instant, Sleep, sleep_until, timeout};
use tonic::transport::server::Connected;

use crate::access::{Gate, Peer, Place};
use crate::limits::{ADMISSION_MAX, HANDSHAKE_MAX};
use crate::tls::ServerTls;
use crate::transport::ACCEPT_RETRY;

/// Connections that wait to be served; they are taken at once.
const READY_MAX: usize = 64;

trait Io: AsyncRead + AsyncWrite + Send {}

impl<T: AsyncRead + AsyncWrite + Send> Io for T {}

/// A connection that has its place, and a time until which a request of it must have been let in.
pub(crate) struct TcpConnection {
    io: Pin<Box<dyn Io>>,
    place: Place,
    deadline: Pin<Box<Sleep>>,
}

/// Accepts connections until the stream is dropped.
pub(crate) fn connections(
    listener: TcpListener,
    tls: Option<Arc<ServerTls>>,
) -> impl Stream<Item = io::Result<TcpConnection>> + Send {
    let (sender, receiver) = mpsc::channel(READY_MAX);
    let accept = async move {
        let (gate, failed) = (Gate::new(), Arc::new(AtomicU64::new(0)));
        loop {
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                () = sender.closed() => return,
            };
            match accepted {
                Ok((stream, address)) => {
                    let Some(place) = gate.enter(address) else { continue };
                    let (sender, tls, failed) = (sender.clone(), tls.clone(), Arc::clone(&failed));
                    tokio::spawn(async move {
                        match timeout(HANDSHAKE_MAX, begin(stream, tls, place)).await.unwrap_or_else(|_| late()) {
                            // The receiver goes when the server stops.
                            Ok(connection) => drop(sender.send(Ok(connection)).await),
                            Err(error) => {
                                let failed = failed.fetch_add(1, Ordering::Relaxed) + 1;
                                if failed.is_power_of_two() {
                                    tracing::warn!(%address, failed, %error, "a TLS handshake failed");
                                }
                            }
                        }
                    });
                }
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a connection; trying again");
                    tokio::time::sleep(ACCEPT_RETRY).await;
                }
            }
        }
    };
    tokio::spawn(accept);
    futures::stream::unfold(receiver, |mut receiver| async move { Some((receiver.recv().await?, receiver)) })
}

fn late<T>() -> io::Result<T> {
    Err(io::Error::new(io::ErrorKind::TimedOut, format!("it was not done after {HANDSHAKE_MAX:?}")))
}

async fn begin(stream: TcpStream, tls: Option<Arc<ServerTls>>, place: Place) -> io::Result<TcpConnection> {
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!(%error, "TCP_NODELAY refused");
    }
    let io: Pin<Box<dyn Io>> = match tls {
        None => Box::pin(stream),
        Some(tls) => Box::pin(tls.acceptor().accept(stream).await?),
    };
    let deadline = Box::pin(sleep_until(Instant::now() + ADMISSION_MAX));
    Ok(TcpConnection { io, place, deadline })
}

impl Connected for TcpConnection {
    type ConnectInfo = Peer;

    fn connect_info(&self) -> Peer {
        self.place.peer.clone()
    }
}

impl AsyncRead for TcpConnection {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if !self.place.peer.admitted.load(Ordering::Relaxed) && self.deadline.as_mut().poll(cx).is_ready() {
            tracing::debug!(address = %self.place.peer.address, "closed: no request was let in");
            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
        }
        self.io.as_mut().poll_read(cx, buf)
    }
}

impl AsyncWrite for TcpConnection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.io.as_mut().poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.io.as_mut().poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.io.as_mut().poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.io.as_mut().poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }
}
