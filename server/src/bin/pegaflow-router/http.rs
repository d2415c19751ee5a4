//! What is answered to whom: requests that generate go through [`Generator`], `/health` and `/metrics` are the router's own, all else
//! is passed on to an engine.

use std::time::{Duration, Instant};

use axum::body::{Body, to_bytes};
use axum::extract::{Request, State};
use axum::http::{Method, Response, StatusCode};
use axum::response::IntoResponse;
use axum::routing::get;
use metrics_exporter_prometheus::PrometheusHandle;

use crate::affinity::Beginning;
use crate::engines::Stage;
use crate::generate::{Generator, error};
use crate::metrics;
use crate::plan::{Kind, Plan, to_be_sent};

/// A request may have so many bytes, as pictures in it are long.
const REQUEST_BYTES_MAX: usize = 64 << 20;
/// And take so long to come.
const REQUEST_MAX: Duration = Duration::from_secs(60);

/// All routes.
pub(crate) fn routes(generator: Generator, handle: PrometheusHandle) -> axum::Router {
    axum::Router::new()
        .route("/health", get(health))
        .route("/metrics", get(move || async move { handle.render() }))
        .fallback(serve)
        .with_state(generator)
}

async fn health(State(generator): State<Generator>) -> Response<Body> {
    match generator.engines.problem() {
        None => "ok\n".into_response(),
        Some(problem) => (StatusCode::SERVICE_UNAVAILABLE, format!("{problem}\n")).into_response(),
    }
}

async fn serve(State(generator): State<Generator>, request: Request) -> Response<Body> {
    let began = Instant::now();
    let (parts, body) = request.into_parts();
    let path = parts.uri.path_and_query().map_or("/", |path| path.as_str()).to_owned();
    let body = match tokio::time::timeout(REQUEST_MAX, to_bytes(body, REQUEST_BYTES_MAX)).await {
        Ok(Ok(body)) => body,
        Ok(Err(problem)) => {
            metrics::ended(metrics::End::Refused);
            let message = format!("{problem}; a request may have {REQUEST_BYTES_MAX} bytes");
            return error(StatusCode::PAYLOAD_TOO_LARGE, "invalid_request_error", &message);
        }
        Err(_) => {
            metrics::ended(metrics::End::Refused);
            let message = format!("the request did not come within {REQUEST_MAX:?}");
            return error(StatusCode::REQUEST_TIMEOUT, "invalid_request_error", &message);
        }
    };
    match Kind::of(parts.uri.path()) {
        Some(kind) if parts.method == Method::POST => {
            let plan = Plan::new(kind, path, &parts.headers, &body);
            generator.generate(plan, began).await
        }
        _ => pass_on(&generator, parts, &path, body.into()).await,
    }
}

/// To one engine, once, as it is.
async fn pass_on(generator: &Generator, parts: axum::http::request::Parts, path: &str, body: Body) -> Response<Body> {
    let Some(engine) = generator.engines.choose(Stage::Decode, &Beginning::default(), &[], &[]) else {
        return error(StatusCode::BAD_GATEWAY, "engine_unavailable", "no engine answers");
    };
    let headers = to_be_sent(&parts.headers);
    let sent = generator.engines.send(&engine, (parts.method, path), &headers, body);
    match tokio::time::timeout(generator.settings.timeout, sent).await {
        Ok(Ok(response)) => response,
        Ok(Err(why)) => {
            generator.engines.is_lost(&engine, &why);
            error(StatusCode::BAD_GATEWAY, "engine_unavailable", &format!("{}: {why}", engine.name))
        }
        Err(_) => error(StatusCode::GATEWAY_TIMEOUT, "engine_unavailable", "the engine does not answer in time"),
    }
}
