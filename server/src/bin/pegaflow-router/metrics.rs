//! What the router counts, for Prometheus. Labels are engines, stages and a few kinds.

use std::time::Duration;

use ::metrics::{counter, describe_counter, describe_gauge, describe_histogram, gauge, histogram};
use metrics_exporter_prometheus::{BuildError, Matcher, PrometheusBuilder, PrometheusHandle};

/// Bounds of times, in seconds.
const TIMES: [f64; 14] = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 120.0, 600.0];

/// What became of a request.
#[derive(Debug, Clone, Copy)]
pub(crate) enum End {
    /// Answered, whatever the engine said.
    Answered,
    /// Refused here: too many, or not understood.
    Refused,
    /// No engine could answer.
    Unanswered,
    /// An answer that had begun could not be ended.
    BrokenOff,
    /// The client went.
    Abandoned,
}

/// Begins to count. Once in a process.
pub(crate) fn install() -> Result<PrometheusHandle, BuildError> {
    let builder = PrometheusBuilder::new();
    let handle = builder.set_buckets_for_metric(Matcher::Suffix("_seconds".into()), &TIMES)?.install_recorder()?;
    describe_counter!("pegaflow_router_requests_total", "Requests that have ended, by how.");
    describe_counter!("pegaflow_router_tries_total", "Requests sent to engines, by engine and stage.");
    describe_counter!("pegaflow_router_failures_total", "Of these, those that got no good answer.");
    describe_counter!("pegaflow_router_resumed_total", "Answers that another engine went on with.");
    describe_counter!(
        "pegaflow_router_handoffs_total",
        "Prompts computed by one engine for another, by whether it worked."
    );
    describe_counter!(
        "pegaflow_router_choices_total",
        "Engines chosen, by stage and by what they have of the prompt: seen, dram, drive; load: nothing."
    );
    describe_counter!(
        "pegaflow_router_questions_total",
        "Questions to PegaFlow servers what they hold, by server and result: answered, failed, skipped."
    );
    describe_counter!("pegaflow_router_learned_total", "Answers of engines that have told keys of a prompt's blocks.");
    describe_histogram!(
        "pegaflow_router_prefill_seconds",
        "How long prompts took that were computed for another engine."
    );
    describe_histogram!("pegaflow_router_first_byte_seconds", "From a request to the first byte of its answer.");
    describe_gauge!("pegaflow_router_engine_up", "1: the engine's health is good.");
    describe_gauge!("pegaflow_router_engine_requests", "Requests that an engine has in flight from here.");
    Ok(handle)
}

pub(crate) fn ended(how: End) {
    let how = match how {
        End::Answered => "answered",
        End::Refused => "refused",
        End::Unanswered => "unanswered",
        End::BrokenOff => "broken_off",
        End::Abandoned => "abandoned",
    };
    counter!("pegaflow_router_requests_total", "end" => how).increment(1);
}

pub(crate) fn tried(engine: &str, stage: &'static str) {
    counter!("pegaflow_router_tries_total", "engine" => engine.to_owned(), "stage" => stage).increment(1);
}

pub(crate) fn failed(engine: &str, stage: &'static str) {
    counter!("pegaflow_router_failures_total", "engine" => engine.to_owned(), "stage" => stage).increment(1);
}

pub(crate) fn chosen(stage: &'static str, reason: &'static str) {
    counter!("pegaflow_router_choices_total", "stage" => stage, "reason" => reason).increment(1);
}

pub(crate) fn asked(server: &str, result: &'static str) {
    counter!("pegaflow_router_questions_total", "server" => server.to_owned(), "result" => result).increment(1);
}

pub(crate) fn learned() {
    counter!("pegaflow_router_learned_total").increment(1);
}

pub(crate) fn resumed() {
    counter!("pegaflow_router_resumed_total").increment(1);
}

pub(crate) fn handed_off(took: Option<Duration>) {
    let result = if took.is_some() { "done" } else { "failed" };
    counter!("pegaflow_router_handoffs_total", "result" => result).increment(1);
    if let Some(took) = took {
        histogram!("pegaflow_router_prefill_seconds").record(took);
    }
}

pub(crate) fn first_byte(took: Duration) {
    histogram!("pegaflow_router_first_byte_seconds").record(took);
}

pub(crate) fn up(engine: &str, is_up: bool) {
    gauge!("pegaflow_router_engine_up", "engine" => engine.to_owned()).set(if is_up { 1.0 } else { 0.0 });
}

pub(crate) fn in_flight(engine: &str, requests: usize) {
    gauge!("pegaflow_router_engine_requests", "engine" => engine.to_owned()).set(requests as f64);
}
