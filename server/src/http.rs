//! HTTP for operators: `/health` (the process is alive), `/ready` (it is fit to serve, or 503 with the reason), `/metrics`
//! (Prometheus text), `/status` (the engine's counters and gauges as JSON) and `/`, a page that shows `/status.json`. Up
//! before the store is recovered, so that probes see progress. Reads only.

mod page;

use std::net::SocketAddr;
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use opentelemetry_proto::tonic::collector::metrics::v1::ExportMetricsServiceRequest;
use pegaflow_engine::{Error, ErrorKind, Result};
use tokio::net::TcpListener;

use crate::http_listener::HttpListener;
use crate::metrics::{Metrics, ServerGauges};
use crate::otlp::SpanCounts;
use crate::session::Sessions;

/// What HTTP answers from: empty until the server serves.
#[derive(Clone)]
pub struct Readiness {
    sessions: Arc<OnceLock<Arc<Sessions>>>,
    metrics: Metrics,
    spans: Arc<SpanCounts>,
    started: Instant,
}

impl Readiness {
    /// Not ready until a server is started with it.
    pub fn new(metrics: Metrics) -> Self {
        Self { sessions: Arc::default(), metrics, spans: Arc::default(), started: Instant::now() }
    }

    /// Also tells what became of these spans.
    pub(crate) fn with_spans(self, spans: Arc<SpanCounts>) -> Self {
        Self { spans, ..self }
    }

    pub(crate) fn spans(&self) -> &SpanCounts {
        &self.spans
    }

    pub(crate) fn serving(&self, sessions: &Arc<Sessions>) {
        if self.sessions.set(Arc::clone(sessions)).is_err() {
            tracing::warn!("HTTP already answers for another server of this process");
        }
    }

    fn ready(&self) -> Result<()> {
        match self.sessions.get() {
            Some(sessions) => sessions.engine().ready(),
            None => Err(Error::new(ErrorKind::Closed, "starting: the store is being opened and recovered")),
        }
    }

    fn text(&self) -> String {
        match self.sessions.get() {
            Some(sessions) => self.metrics.render(&sessions.engine().stats(), self.gauges(sessions)),
            None => self.metrics.render_starting(),
        }
    }

    /// All metrics for a collector; `None` until the server serves.
    pub(crate) fn otlp(&self) -> Option<ExportMetricsServiceRequest> {
        let sessions = self.sessions.get()?;
        Some(self.metrics.otlp(&sessions.engine().stats(), self.gauges(sessions)))
    }

    fn gauges(&self, sessions: &Sessions) -> ServerGauges {
        ServerGauges {
            sessions: sessions.count(),
            operations: sessions.operations(),
            is_ready: sessions.engine().ready().is_ok(),
            spans: self.spans.read(),
        }
    }
}

/// The HTTP server; it stops when dropped.
#[derive(Debug)]
pub struct HttpServer {
    address: SocketAddr,
    task: tokio::task::JoinHandle<()>,
}

impl HttpServer {
    /// Listens on `address` and answers from `readiness`. To be called inside a tokio runtime.
    ///
    /// # Errors
    /// `Io` or `PermissionDenied` if the address cannot be had.
    ///
    /// # Cancel safety
    /// Nothing is left behind when dropped.
    pub async fn start(address: SocketAddr, readiness: Readiness) -> Result<Self> {
        let listener = TcpListener::bind(address).await.map_err(|error| {
            Error::from_io(format!("cannot listen for HTTP on {address}; give another --http, or off"), error)
        })?;
        let address = listener.local_addr().map_err(|error| Error::from_io("address of the HTTP socket", error))?;
        if !address.ip().is_loopback() {
            tracing::warn!(%address, "HTTP health and metrics can be reached from other hosts, without a password");
        }
        let routes = Router::new()
            .route("/", get(page::page))
            .route("/status.json", get(page::status_json))
            .route("/health", get(|| async { "ok\n" }))
            .route("/ready", get(ready))
            .route("/metrics", get(metrics_text))
            .route("/status", get(status))
            .with_state(readiness);
        let task = tokio::spawn(async move {
            if let Err(error) = axum::serve(HttpListener::new(listener), routes).await {
                tracing::error!(%error, "HTTP stopped");
            }
        });
        Ok(Self { address, task })
    }

    /// The address in use.
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Drop for HttpServer {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn ready(State(readiness): State<Readiness>) -> Response {
    match readiness.ready() {
        Ok(()) => "ready\n".into_response(),
        Err(error) => {
            (StatusCode::SERVICE_UNAVAILABLE, format!("{}: {error:#}\n", error.kind().as_str())).into_response()
        }
    }
}

async fn status(State(readiness): State<Readiness>) -> Response {
    let stats = tokio::task::spawn_blocking(move || readiness.sessions.get().map(|sessions| sessions.engine().stats()));
    match stats.await {
        Ok(Some(stats)) => Json(stats).into_response(),
        Ok(None) => (StatusCode::SERVICE_UNAVAILABLE, "closed: starting\n").into_response(),
        Err(_) => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
    }
}

async fn metrics_text(State(readiness): State<Readiness>) -> Response {
    let text = tokio::task::spawn_blocking(move || readiness.text()).await;
    match text {
        Ok(text) => ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], text).into_response(),
        Err(_) => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
    }
}
