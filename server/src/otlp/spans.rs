//! Where ended spans wait to be pushed.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use opentelemetry::Context;
use opentelemetry::trace::TracerProvider;
use opentelemetry_sdk::error::OTelSdkResult;
use opentelemetry_sdk::trace::{Sampler, SdkTracer, SdkTracerProvider, Span, SpanData, SpanProcessor};
use tokio::sync::mpsc;

/// The most spans that wait; what comes beyond is dropped.
const WAITING_SPANS_MAX: usize = 4096;

/// What became of sampled spans.
#[derive(Debug, Default)]
pub(crate) struct SpanCounts {
    sent: AtomicU64,
    failed: AtomicU64,
    no_room: AtomicU64,
}

impl SpanCounts {
    /// `count` spans were pushed, or could not be.
    pub(crate) fn exported(&self, count: u64, is_sent: bool) {
        let counter = if is_sent { &self.sent } else { &self.failed };
        counter.fetch_add(count, Ordering::Relaxed);
    }

    /// Spans that the collector has taken, that it has not, and that had no room to wait.
    pub(crate) fn read(&self) -> [u64; 3] {
        [&self.sent, &self.failed, &self.no_room].map(|counter| counter.load(Ordering::Relaxed))
    }
}

/// The sampled spans of this process.
pub(crate) struct Spans {
    /// Starts them.
    pub(crate) tracer: SdkTracer,
    /// Those that have ended.
    pub(crate) ended: mpsc::Receiver<SpanData>,
    pub(crate) counts: Arc<SpanCounts>,
}

impl Spans {
    /// Samples this share of what begins, and all that belongs to it.
    pub(crate) fn new(share: f64) -> Self {
        let (queue, ended) = mpsc::channel(WAITING_SPANS_MAX);
        let counts = Arc::<SpanCounts>::default();
        let sampler = Sampler::ParentBased(Box::new(Sampler::TraceIdRatioBased(share)));
        let queue = Queue { queue, counts: Arc::clone(&counts) };
        let provider = SdkTracerProvider::builder().with_sampler(sampler).with_span_processor(queue).build();
        // The tracer keeps the provider alive.
        Self { tracer: provider.tracer("pegaflow"), ended, counts }
    }
}

#[derive(Debug)]
struct Queue {
    queue: mpsc::Sender<SpanData>,
    counts: Arc<SpanCounts>,
}

impl SpanProcessor for Queue {
    fn on_start(&self, _span: &mut Span, _context: &Context) {}

    fn on_end(&self, span: SpanData) {
        if self.queue.try_send(span).is_err() {
            self.counts.no_room.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn force_flush(&self) -> OTelSdkResult {
        Ok(())
    }

    fn shutdown_with_timeout(&self, _timeout: Duration) -> OTelSdkResult {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use opentelemetry::trace::Tracer;

    use super::*;

    #[test]
    fn spans_beyond_the_bound_are_dropped_and_counted() {
        let mut spans = Spans::new(1.0);
        for _ in 0..WAITING_SPANS_MAX + 3 {
            drop(spans.tracer.start("load"));
        }
        assert_eq!(spans.counts.read(), [0, 0, 3]);
        assert_eq!(spans.ended.try_recv().expect("the first").name, "load");
    }

    #[test]
    fn a_share_of_nothing_samples_nothing() {
        let mut spans = Spans::new(0.0);
        (0..100).for_each(|_| drop(spans.tracer.start("load")));
        assert!(spans.ended.try_recv().is_err());
    }
}
