//! OpenTelemetry: sampled traces of lookups, loads and saves, and all metrics, pushed over OTLP (gRPC) to a collector. Off
//! without an endpoint. Spans wait in a bounded queue: while the collector does not take them they are dropped and
//! counted, and nothing else notices.

mod metrics;
mod spans;

use std::time::Duration;

use opentelemetry_proto::tonic::collector::metrics::v1::metrics_service_client::MetricsServiceClient;
use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::tonic::collector::trace::v1::trace_service_client::TraceServiceClient;
use opentelemetry_proto::transform::common::tonic::ResourceAttributesWithSchema;
use opentelemetry_proto::transform::trace::tonic::group_spans_by_resource_and_scope;
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::trace::SpanData;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::{Instant, MissedTickBehavior};
use tonic::Status;
use tonic::transport::{Channel, Endpoint};

use crate::http::Readiness;

pub(crate) use metrics::request as metrics_request;
pub(crate) use spans::{SpanCounts, Spans};

/// The most spans in one message.
const BATCH_SPANS_MAX: usize = 512;
/// How long the first span of a message waits for others.
const GATHERING: Duration = Duration::from_secs(1);
/// How long one message may take.
const SEND_MAX: Duration = Duration::from_secs(5);
/// How long what is left at a stop may take.
const STOP_MAX: Duration = Duration::from_secs(2);

/// Pushes until it is stopped.
pub(crate) struct Exporter {
    stop: watch::Sender<bool>,
    tasks: [JoinHandle<()>; 2],
}

impl Exporter {
    /// Pushes `spans` as they end and what `readiness` tells every `metrics_interval`, if that is not zero, to `endpoint`.
    /// To be called inside a tokio runtime.
    pub(crate) fn start(
        endpoint: &Endpoint,
        spans: mpsc::Receiver<SpanData>,
        readiness: Readiness,
        metrics_interval: Duration,
    ) -> Self {
        let channel = endpoint.clone().connect_timeout(SEND_MAX).timeout(SEND_MAX).connect_lazy();
        let (stop, stopped) = watch::channel(false);
        let spans = tokio::spawn(push_spans(channel.clone(), spans, readiness.clone(), stopped.clone()));
        let metrics = tokio::spawn(push_metrics(channel, readiness, metrics_interval, stopped));
        Self { stop, tasks: [spans, metrics] }
    }

    /// Pushes what is left, for a short while.
    ///
    /// # Cancel safety
    /// Dropped, the rest is lost.
    pub(crate) async fn stop(self) {
        self.stop.send_replace(true);
        let deadline = Instant::now() + STOP_MAX;
        for mut task in self.tasks {
            if tokio::time::timeout_at(deadline, &mut task).await.is_err() {
                task.abort();
            }
        }
    }
}

/// What every span and metric says of the server.
pub(crate) fn resource() -> Resource {
    let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
    let process = i64::from(std::process::id());
    Resource::builder_empty()
        .with_service_name("pegaflow")
        .with_attribute(opentelemetry::KeyValue::new("service.version", env!("CARGO_PKG_VERSION")))
        .with_attribute(opentelemetry::KeyValue::new("host.name", host))
        .with_attribute(opentelemetry::KeyValue::new("process.pid", process))
        .build()
}

async fn push_spans(
    channel: Channel,
    mut spans: mpsc::Receiver<SpanData>,
    readiness: Readiness,
    mut stopped: watch::Receiver<bool>,
) {
    let mut collector = TraceServiceClient::new(channel);
    let resource = ResourceAttributesWithSchema::from(&resource());
    let mut health = Health::default();
    let mut is_last = false;
    loop {
        let mut batch = Vec::new();
        if !is_last {
            tokio::select! {
                _ = stopped.wait_for(|stop| *stop) => is_last = true,
                first = spans.recv() => match first {
                    Some(first) => batch.push(first),
                    None => return,
                },
            }
        }
        if !is_last {
            // Others are given time to end.
            is_last = tokio::time::timeout(GATHERING, stopped.wait_for(|stop| *stop)).await.is_ok();
        }
        while batch.len() < BATCH_SPANS_MAX
            && let Ok(span) = spans.try_recv()
        {
            batch.push(span);
        }
        let (count, is_full) = (batch.len() as u64, batch.len() == BATCH_SPANS_MAX);
        if count > 0 {
            let resource_spans = group_spans_by_resource_and_scope(batch, &resource);
            let result = collector.export(ExportTraceServiceRequest { resource_spans }).await;
            readiness.spans().exported(count, result.is_ok());
            health.note("spans", result.err());
        }
        if is_last && !is_full {
            return;
        }
    }
}

async fn push_metrics(channel: Channel, readiness: Readiness, interval: Duration, mut stopped: watch::Receiver<bool>) {
    if interval.is_zero() {
        return;
    }
    let mut collector = MetricsServiceClient::new(channel);
    let mut health = Health::default();
    let mut ticks = tokio::time::interval_at(Instant::now() + interval, interval);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let is_last = tokio::select! {
            biased;
            _ = stopped.wait_for(|stop| *stop) => true,
            _ = ticks.tick() => false,
        };
        let readiness = readiness.clone();
        // It reads the engine's counters, which may wait for a lock.
        if let Ok(Some(request)) = tokio::task::spawn_blocking(move || readiness.otlp()).await {
            health.note("metrics", collector.export(request).await.err());
        }
        if is_last {
            return;
        }
    }
}

/// Says when the collector stops taking what is pushed, and when it takes it again.
#[derive(Default)]
struct Health {
    is_failing: bool,
}

impl Health {
    fn note(&mut self, what: &str, error: Option<Status>) {
        match (&error, self.is_failing) {
            (Some(status), false) => {
                let reason = format!("{:?}: {}", status.code(), status.message());
                tracing::warn!(target: "pegaflow_otlp", reason, "the OTLP collector does not take {what}; they are lost until it does");
            }
            (None, true) => tracing::info!(target: "pegaflow_otlp", "the OTLP collector takes {what} again"),
            _ => {}
        }
        self.is_failing = error.is_some();
    }
}
