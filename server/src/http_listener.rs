//! Connections to the HTTP port: so many at once, and none that keeps the server waiting. What comes beyond is closed at
//! once, so that descriptors are left for others.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, Sleep, sleep, sleep_until};

use crate::limits::{HTTP_CONNECTIONS_MAX, HTTP_WAIT_MAX};
use crate::transport::ACCEPT_RETRY;

/// See the module.
pub(crate) struct HttpListener {
    listener: TcpListener,
    places: Arc<Semaphore>,
    refused: u64,
}

impl HttpListener {
    pub(crate) fn new(listener: TcpListener) -> Self {
        Self { listener, places: Arc::new(Semaphore::new(HTTP_CONNECTIONS_MAX)), refused: 0 }
    }
}

impl axum::serve::Listener for HttpListener {
    type Io = HttpConnection;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (HttpConnection, SocketAddr) {
        loop {
            match self.listener.accept().await {
                Ok((stream, address)) => match Arc::clone(&self.places).try_acquire_owned() {
                    Ok(place) => {
                        let waiting = Box::pin(sleep(HTTP_WAIT_MAX));
                        return (HttpConnection { stream, waiting, _place: place }, address);
                    }
                    Err(_) => {
                        self.refused += 1;
                        if self.refused.is_power_of_two() {
                            let refused = self.refused;
                            tracing::warn!(%address, refused, "too many HTTP connections; this one was closed");
                        }
                    }
                },
                Err(error) => {
                    tracing::warn!(%error, "cannot accept an HTTP connection; trying again");
                    sleep(ACCEPT_RETRY).await;
                }
            }
        }
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }
}

/// A connection that ends when the server got nothing done on it for a while: no answer begun, or none taken.
pub(crate) struct HttpConnection {
    stream: TcpStream,
    waiting: Pin<Box<Sleep>>,
    _place: OwnedSemaphorePermit,
}

impl HttpConnection {
    /// What a read or a write gives, unless it is late.
    fn or_late<T>(&mut self, cx: &mut Context<'_>, polled: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        match polled {
            Poll::Pending if self.waiting.as_mut().poll(cx).is_ready() => {
                Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
            }
            polled => polled,
        }
    }
}

impl AsyncRead for HttpConnection {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let polled = Pin::new(&mut self.stream).poll_read(cx, buf);
        // One byte now and then is no reason to wait longer.
        self.or_late(cx, polled)
    }
}

impl AsyncWrite for HttpConnection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let polled = Pin::new(&mut self.stream).poll_write(cx, buf);
        if polled.is_ready() {
            self.waiting.set(sleep_until(Instant::now() + HTTP_WAIT_MAX));
        }
        self.or_late(cx, polled)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
