//! The status page: one file without outside resources, and the JSON that it reads every second while somebody looks.

use std::time::{SystemTime, UNIX_EPOCH};

use axum::Json;
use axum::extract::State;
use axum::http::{HeaderName, HeaderValue, StatusCode, header};
use axum::response::{Html, IntoResponse, Response};
use pegaflow_engine::{DecisionRecord, ErrorKind, Stats};
use serde::Serialize;

use super::Readiness;

const PAGE: &str = include_str!("status.html");
/// Where the page has the nonce of its style and its script.
const NONCE: &str = "@nonce@";
/// How many of the latest decisions are told.
const DECISIONS: usize = 12;

/// `/status.json`, see docs/operations.md.
#[derive(Serialize)]
struct StatusJson {
    version: &'static str,
    unix_ms: u64,
    uptime_ms: u64,
    /// `starting`, `ready`, `degraded` or `stopping`.
    state: &'static str,
    /// Why it is not ready.
    reason: Option<String>,
    sessions: usize,
    operations: usize,
    /// As `/status`; `None` while it starts.
    stats: Option<Stats>,
    /// As `pegaflow explain`, the newest first.
    decisions: Vec<DecisionRecord>,
    /// Not told by this server.
    namespaces: Option<()>,
}

impl StatusJson {
    fn new(readiness: &Readiness) -> Self {
        let sessions = readiness.sessions.get();
        let (state, reason) = match readiness.ready() {
            Ok(()) => ("ready", None),
            Err(error) => {
                let state = match error.kind() {
                    ErrorKind::Poisoned => "degraded",
                    _ if sessions.is_none() => "starting",
                    _ => "stopping",
                };
                (state, Some(error.message().to_owned()))
            }
        };
        let millis = |time: std::time::Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        Self {
            version: env!("CARGO_PKG_VERSION"),
            unix_ms: millis(SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()),
            uptime_ms: millis(readiness.started.elapsed()),
            state,
            reason,
            sessions: sessions.map_or(0, |sessions| sessions.count()),
            operations: sessions.map_or(0, |sessions| sessions.operations()),
            stats: sessions.map(|sessions| sessions.engine().stats()),
            decisions: sessions.map(|sessions| sessions.engine().explain(None, DECISIONS)).unwrap_or_default(),
            namespaces: None,
        }
    }
}

pub(super) async fn status_json(State(readiness): State<Readiness>) -> Response {
    match tokio::task::spawn_blocking(move || StatusJson::new(&readiness)).await {
        Ok(status) => (headers(), Json(status)).into_response(),
        Err(_) => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
    }
}

/// The page, with a nonce of its own each time: no other style or script runs in it, and it asks no other host.
pub(super) async fn page() -> Response {
    let nonce = format!("{:032x}", rand::random::<u128>());
    let policy = format!(
        "default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; connect-src 'self'; img-src data:; \
         base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    );
    let policy = HeaderValue::from_str(&policy).map(|policy| [(header::CONTENT_SECURITY_POLICY, policy)]);
    match policy {
        Ok(policy) => (policy, headers(), Html(PAGE.replace(NONCE, &nonce))).into_response(),
        Err(_) => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
    }
}

fn headers() -> [(HeaderName, &'static str); 3] {
    [
        (header::CACHE_CONTROL, "no-store"),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::REFERRER_POLICY, "no-referrer"),
    ]
}
