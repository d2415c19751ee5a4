//! Stands before every RPC that comes over TCP: who asks, may he, does he ask too often. What is refused is answered
//! here and logged; nothing of it reaches the service.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Instant;

use futures::future::Either;
use pegaflow_engine::{Error, ErrorKind};
use tonic::body::Body;
use tonic::codegen::http::{Request, Response};

use super::{Access, Client, Peer, may_call};
use crate::status::to_status;

/// Puts the check before a service.
#[derive(Debug, Clone)]
pub(crate) struct AccessLayer {
    access: Arc<Access>,
    refused: Arc<AtomicU64>,
}

impl AccessLayer {
    pub(crate) fn new(access: Arc<Access>) -> Self {
        Self { access, refused: Arc::default() }
    }
}

impl<S> tower::Layer<S> for AccessLayer {
    type Service = Checked<S>;

    fn layer(&self, inner: S) -> Checked<S> {
        Checked { inner, layer: self.clone() }
    }
}

/// Who asks, for the service.
#[derive(Debug, Clone)]
pub(crate) struct Caller(pub(crate) Arc<Client>);

/// A service behind the check.
#[derive(Debug, Clone)]
pub(crate) struct Checked<S> {
    inner: S,
    layer: AccessLayer,
}

impl<S: tower::Service<Request<Body>, Response = Response<Body>>> tower::Service<Request<Body>> for Checked<S> {
    type Response = Response<Body>;
    type Error = S::Error;
    type Future = Either<std::future::Ready<Result<Response<Body>, S::Error>>, S::Future>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, mut request: Request<Body>) -> Self::Future {
        match self.layer.check(&request) {
            Ok(client) => {
                request.extensions_mut().insert(Caller(client));
                Either::Right(self.inner.call(request))
            }
            Err(error) => {
                let peer = request.extensions().get::<Peer>().map(|peer| peer.address);
                let refused = self.layer.refused.fetch_add(1, Ordering::Relaxed) + 1;
                if refused.is_power_of_two() {
                    tracing::warn!(?peer, rpc = request.uri().path(), refused, %error, "a request was refused");
                }
                Either::Left(std::future::ready(Ok(to_status(&error).into_http())))
            }
        }
    }
}

impl AccessLayer {
    fn check(&self, request: &Request<Body>) -> Result<Arc<Client>, Error> {
        let denied = |message: String| Error::new(ErrorKind::PermissionDenied, message);
        let authorization = request.headers().get("authorization").map(|value| value.as_bytes());
        let client = self
            .access
            .identify(authorization)
            .ok_or_else(|| denied("the server knows no such token; give one of its file (--token-file)".into()))?;
        let path = request.uri().path();
        if !may_call(client.role, path) {
            let rpc = path.rsplit('/').next().unwrap_or_default();
            return Err(denied(format!("{} has the role {}, which may not call {rpc}", client.name, client.role)));
        }
        if !client.may_ask(Instant::now()) {
            return Err(Error::new(ErrorKind::Busy, format!("{} asks too often; ask again later", client.name)));
        }
        if let Some(peer) = request.extensions().get::<Peer>() {
            peer.admitted.store(true, Ordering::Relaxed);
        }
        Ok(client)
    }
}
