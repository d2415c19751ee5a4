//! Prometheus metrics. The engine keeps its own counters; they are read when somebody scrapes, so that an idle server
//! does nothing. Names begin with `pegaflow_` (but for what every process has); counters end with `_total`; units are in
//! the names. What there is says [`table`].

mod metric;
mod process;
mod reference;
mod table;

use std::fmt::Write;
use std::time::SystemTime;

use metrics_exporter_prometheus::PrometheusBuilder;
use opentelemetry_proto::tonic::collector::metrics::v1::ExportMetricsServiceRequest;
use pegaflow_engine::{Latencies, Stats};

pub(crate) use metric::{Kind, Metric, Now, Sample, ServerGauges, Unit, Value};
use process::Process;
use table::GROUPS;

use crate::otlp;

/// The counters and gauges of one server as Prometheus text.
#[derive(Debug, Clone)]
pub struct Metrics {
    started: SystemTime,
}

impl Metrics {
    /// Of a process that starts now.
    pub fn new() -> Self {
        Self { started: SystemTime::now() }
    }

    /// The page `docs/metrics.md`: every metric with kind, unit, labels and meaning.
    pub fn reference() -> String {
        reference::reference()
    }

    pub(crate) fn render(&self, stats: &Stats, server: ServerGauges) -> String {
        let metrics = GROUPS.iter().flat_map(|group| group.metrics);
        text(metrics, &Now { stats, server, process: Process::read(self.started) })
    }

    /// The same, to be pushed to a collector.
    pub(crate) fn otlp(&self, stats: &Stats, server: ServerGauges) -> ExportMetricsServiceRequest {
        let metrics = GROUPS.iter().flat_map(|group| group.metrics);
        otlp::metrics_request(metrics, &Now { stats, server, process: Process::read(self.started) }, self.started)
    }

    /// The text while there is no engine yet.
    pub(crate) fn render_starting(&self) -> String {
        let metrics = GROUPS.iter().take(1).flat_map(|group| group.metrics);
        let (stats, server) = (Stats::default(), ServerGauges::default());
        text(metrics, &Now { stats: &stats, server, process: Process::read(self.started) })
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

/// A recorder of its own for each text: what is gone (a drive) is not in the next one.
fn text<'a>(metrics: impl Iterator<Item = &'a Metric>, now: &Now<'_>) -> String {
    let recorder = PrometheusBuilder::new().build_recorder();
    let handle = recorder.handle();
    let mut histograms = String::new();
    metrics::with_local_recorder(&recorder, || metrics.for_each(|metric| put(metric, now, &mut histograms)));
    handle.render() + &histograms
}

fn put(metric: &Metric, now: &Now<'_>, histograms: &mut String) {
    let (name, help) = (metric.name, metric.help);
    match metric.kind {
        Kind::Gauge => metrics::describe_gauge!(name, help),
        Kind::Counter => metrics::describe_counter!(name, help),
        // The crate's own histograms keep every value until somebody scrapes.
        Kind::Histogram => histograms.push_str(&format!("# HELP {name} {help}\n# TYPE {name} histogram\n")),
    }
    for sample in metric.samples(now) {
        let labels = metric.labels.iter().map(|label| label.name).zip(sample.labels);
        match sample.value {
            Value::Times(times) => put_times(name, &labels.collect::<Vec<_>>(), &times, histograms),
            Value::Number(number) => {
                let labels: Vec<_> = labels.map(|(name, value)| metrics::Label::new(name, value)).collect();
                match metric.kind {
                    Kind::Counter => metrics::counter!(name, labels).absolute(number as u64),
                    _ => metrics::gauge!(name, labels).set(number),
                }
            }
        }
    }
}

/// The labels of histograms have values that need no escapes.
fn put_times(name: &str, labels: &[(&str, String)], times: &Latencies, out: &mut String) {
    let labels: String = labels.iter().map(|(name, value)| format!("{name}=\"{value}\",")).collect();
    let count = times.count();
    let bounds = times.cumulative().map(|(bound, count)| (bound.to_string(), count));
    for (bound, count) in bounds.chain([("+Inf".to_owned(), count)]) {
        let _infallible = writeln!(out, "{name}_bucket{{{labels}le=\"{bound}\"}} {count}");
    }
    let labels = match labels.trim_end_matches(',') {
        "" => String::new(),
        labels => format!("{{{labels}}}"),
    };
    let sum = times.sum_ns as f64 / 1e9;
    let _infallible = write!(out, "{name}_sum{labels} {sum}\n{name}_count{labels} {count}\n\n");
}

#[cfg(test)]
mod tests {
    use super::*;
    use pegaflow_engine::{
        DriveSpeed, DriveUse, DriveWear, FetchTotals, LatencyStats, PoisonReason, SizeEstimate, WarmProgress, WarmState,
    };

    #[test]
    fn the_text_has_help_type_and_value_of_every_metric() {
        let metrics = Metrics::new();
        let drives = vec![DriveWear { drive: "nvme0".into(), used_percent: 12, ..DriveWear::default() }];
        let stats = Stats {
            saved_blocks: 7,
            dram_blocks: 3,
            nvme_degraded: Some(PoisonReason::NoSpace),
            io_engine: "psync".into(),
            refused_unproven_blocks: 5,
            warm_start: WarmProgress { state: WarmState::Running, read_bytes: 11, took_ms: 1500, ..Default::default() },
            fetched_request: FetchTotals { blocks: 4, wasted_bytes: 11, ..FetchTotals::default() },
            nvme_estimates: vec![SizeEstimate { percent_of_present: 200, capacity_bytes: 9, hit_permille: 125 }],
            drives,
            drive_uses: vec![DriveUse { path: "/nvme".into(), read_ceiling_permille: 250, ..DriveUse::default() }],
            latencies: LatencyStats {
                load_nvme: Latencies { counts: vec![0, 2, 1], sum_ns: 5000 },
                ..LatencyStats::default()
            },
            lookup_hit_blocks: 9,
            lookup_hit_dram_blocks: 4,
            drive_speeds: vec![DriveSpeed {
                path: "/nvme".into(),
                read_bytes_per_second: 7,
                read_depth_bytes: 8,
                ..DriveSpeed::default()
            }],
            ..Stats::default()
        };
        let text = metrics.render(&stats, ServerGauges { sessions: 2, ..ServerGauges::default() });
        for line in [
            "# HELP pegaflow_saved_blocks_total Blocks saved.",
            "# TYPE pegaflow_saved_blocks_total counter",
            "pegaflow_saved_blocks_total 7",
            "# TYPE pegaflow_dram_blocks gauge",
            "pegaflow_dram_blocks 3",
            "pegaflow_loaded_blocks_total{tier=\"nvme\"} 0",
            "pegaflow_nvme_degraded{reason=\"no_space\"} 1",
            "pegaflow_nvme_degraded{reason=\"device_gone\"} 0",
            "pegaflow_refused_blocks_total{reason=\"unproven\"} 5",
            "pegaflow_fetched_blocks_total{reason=\"request\"} 4",
            "pegaflow_fetched_wasted_bytes_total{reason=\"request\"} 11",
            "pegaflow_fetched_blocks_total{reason=\"hot_set\"} 0",
            "pegaflow_drive_used_percent{drive=\"nvme0\"} 12",
            "pegaflow_warm_start{state=\"running\"} 1",
            "pegaflow_warm_start{state=\"done\"} 0",
            "pegaflow_warm_start_read_bytes 11",
            "pegaflow_warm_start_seconds 1.5",
            "pegaflow_drive_read_bytes_per_second{path=\"/nvme\"} 7",
            "pegaflow_drive_read_depth_bytes{path=\"/nvme\"} 8",
            "pegaflow_drive_ceiling_used_ratio{path=\"/nvme\",direction=\"read\"} 0.25",
            "pegaflow_lookup_hit_blocks_total{tier=\"dram\"} 4",
            "pegaflow_lookup_hit_blocks_total{tier=\"nvme\"} 5",
            "# TYPE pegaflow_load_seconds histogram",
            "pegaflow_load_seconds_bucket{tier=\"nvme\",le=\"0.000001\"} 0",
            "pegaflow_load_seconds_bucket{tier=\"nvme\",le=\"0.000002\"} 2",
            "pegaflow_load_seconds_bucket{tier=\"nvme\",le=\"33.554432\"} 3",
            "pegaflow_load_seconds_bucket{tier=\"nvme\",le=\"+Inf\"} 3",
            "pegaflow_load_seconds_sum{tier=\"nvme\"} 0.000005",
            "pegaflow_load_seconds_count{tier=\"nvme\"} 3",
            "pegaflow_lookup_seconds_count 0",
            "pegaflow_sessions 2",
            "pegaflow_ready 0",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} not in\n{text}");
        }
        assert!(text.contains("io_engine=\"psync\""));
        assert!(text.contains("pegaflow_hit_ratio_estimate{tier=\"nvme\",percent=\"200\"} 0.125"), "{text}");
        assert!(!text.contains("pegaflow_drive_write_bytes_per_second{"), "what is not known is not told");
        for reason in PoisonReason::ALL {
            let text =
                metrics.render(&Stats { nvme_degraded: Some(reason), ..Stats::default() }, ServerGauges::default());
            let is_one = |line: &str| line.starts_with("pegaflow_nvme_degraded{") && line.ends_with(" 1");
            let ones: Vec<&str> = text.lines().filter(|line| is_one(line)).collect();
            assert_eq!(ones, [format!("pegaflow_nvme_degraded{{reason=\"{}\"}} 1", reason.as_str())]);
        }
        let names: Vec<_> = text.lines().filter(|line| line.starts_with("# TYPE")).collect();
        let helps = text.lines().filter(|line| line.starts_with("# HELP")).count();
        assert_eq!(names.len(), helps, "every metric is described");
        let later = metrics.render(&Stats { saved_blocks: 9, ..stats }, ServerGauges::default());
        assert!(later.contains("pegaflow_saved_blocks_total 9"));
    }

    #[test]
    fn what_is_gone_is_not_told_and_names_are_as_agreed() {
        let metrics = Metrics::new();
        let drives = vec![DriveWear { drive: "nvme0".into(), ..DriveWear::default() }];
        let with = metrics.render(&Stats { drives, ..Stats::default() }, ServerGauges::default());
        assert!(with.contains("{drive=\"nvme0\"}"));
        let without = metrics.render(&Stats::default(), ServerGauges::default());
        assert!(!without.contains("nvme0"), "a drive that is gone");
        let mut names: Vec<&str> = GROUPS.iter().flat_map(|group| group.metrics).map(|metric| metric.name).collect();
        for metric in GROUPS.iter().flat_map(|group| group.metrics) {
            let name = metric.name;
            assert!(name.starts_with("pegaflow_") || name.starts_with("process_"), "{name}");
            assert_eq!(name.ends_with("_total"), metric.kind == Kind::Counter, "{name}");
            assert!(metric.kind != Kind::Histogram || name.ends_with("_seconds"), "{name}");
            assert!(metric.help.ends_with('.') && !metric.help.contains('|'), "{name}: {}", metric.help);
        }
        names.sort_unstable();
        let all = names.len();
        names.dedup();
        assert_eq!(names.len(), all, "each name once");
    }
}
