//! Prometheus metrics. The engine keeps its own counters; they are read when somebody scrapes, so that an idle server
//! does nothing. Names begin with `pegaflow_`; counters end with `_total`; units are in the names.

use std::sync::Arc;

use metrics_exporter_prometheus::{PrometheusBuilder, PrometheusHandle, PrometheusRecorder};
use pegaflow_engine::{LoadPolicy, PoisonReason, Stats, WarmState};

/// The counters and gauges of one server as Prometheus text.
#[derive(Clone)]
pub struct Metrics {
    recorder: Arc<PrometheusRecorder>,
    handle: PrometheusHandle,
}

/// What only the server knows.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct ServerGauges {
    pub(crate) sessions: usize,
    pub(crate) operations: usize,
    pub(crate) is_ready: bool,
}

impl Metrics {
    /// A recorder of its own.
    pub fn new() -> Self {
        let recorder = PrometheusBuilder::new().build_recorder();
        let handle = recorder.handle();
        let metrics = Self { recorder: Arc::new(recorder), handle };
        metrics::with_local_recorder(&*metrics.recorder, describe);
        metrics
    }

    /// Makes this the recorder of everything that the process measures with the `metrics` crate. Ignored if there is
    /// one already.
    pub fn install(&self) {
        if metrics::set_global_recorder(Arc::clone(&self.recorder)).is_err() {
            tracing::warn!("a metrics recorder is installed already; measurements of the engine go there");
        }
    }

    pub(crate) fn render(&self, stats: &Stats, server: ServerGauges) -> String {
        self.handle.run_upkeep();
        metrics::with_local_recorder(&*self.recorder, || record(stats, server));
        self.handle.render()
    }

    /// The text while there is no engine yet.
    pub(crate) fn render_starting(&self) -> String {
        metrics::with_local_recorder(&*self.recorder, || metrics::gauge!("pegaflow_ready").set(0.0));
        self.handle.render()
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

/// One table for names, help texts and where the values come from: gauges first, counters after them.
macro_rules! table {
    (gauges { $($gauge:literal, $gauge_field:ident, $gauge_help:literal;)* }
     counters { $($counter:literal, $counter_field:ident, $counter_help:literal;)* }) => {
        fn describe_engine() {
            $(metrics::describe_gauge!($gauge, $gauge_help);)*
            $(metrics::describe_counter!($counter, $counter_help);)*
        }
        fn record_engine(stats: &Stats) {
            $(metrics::gauge!($gauge).set(stats.$gauge_field as f64);)*
            $(metrics::counter!($counter).absolute(stats.$counter_field);)*
        }
    };
}

table! {
    gauges {
        "pegaflow_dram_capacity_bytes", dram_capacity_bytes, "Bytes of DRAM for blocks.";
        "pegaflow_dram_ready_bytes", dram_ready_bytes, "Bytes of DRAM taken so far; grows to the capacity after a start.";
        "pegaflow_dram_used_bytes", dram_used_bytes, "Bytes of DRAM slots in use.";
        "pegaflow_dram_dirty_bytes", dram_dirty_bytes, "Bytes in DRAM that are not yet durable.";
        "pegaflow_dram_blocks", dram_blocks, "Blocks in DRAM.";
        "pegaflow_nvme_capacity_bytes", nvme_capacity_bytes, "Bytes of the store's regions; 0 without a store.";
        "pegaflow_nvme_used_bytes", nvme_used_bytes, "Bytes of regions in use.";
        "pegaflow_nvme_records", nvme_records, "Records that lookups find.";
        "pegaflow_index_bytes", index_bytes, "Bytes of memory that the in-memory index takes.";
        "pegaflow_write_budget_day_bytes", write_budget_day_bytes, "Bytes a day that may be written; 0 without a bound.";
        "pegaflow_written_day_bytes", written_day_bytes, "Bytes of records written in the last 23 to 24 hours.";
        "pegaflow_index_log_bytes", index_log_bytes, "Bytes of memory that RocksDB, the log of the index, takes.";
        "pegaflow_index_filled_rows", index_filled_rows, "Rows that the in-memory index was filled with since open.";
        "pegaflow_index_rows", index_rows, "Rows that the in-memory index is to be filled with; an estimate until it is full.";
        "pegaflow_codec_decode_bytes_per_second", codec_decode_bytes_per_second, "Bytes of payload that the store's threads decode per second, measured at open.";
        "pegaflow_instances", instances, "Registered inference engines.";
        "pegaflow_leases", leases, "Live leases.";
        "pegaflow_engine_sessions", sessions, "Sessions of the engine, those that are ending included.";
        "pegaflow_engine_operations", operations, "Loads and saves in flight in the engine.";
    }
    counters {
        "pegaflow_lookup_blocks_total", lookup_blocks, "Blocks asked for in lookups.";
        "pegaflow_lookup_hit_blocks_total", lookup_hit_blocks, "Blocks found in lookups.";
        "pegaflow_load_failed_blocks_total", load_failed_blocks, "Blocks whose load failed; they were recomputed.";
        "pegaflow_saved_blocks_total", saved_blocks, "Blocks saved.";
        "pegaflow_save_present_blocks_total", save_present_blocks, "Blocks whose save found them present.";
        "pegaflow_save_dropped_blocks_total", save_dropped_blocks, "Blocks not saved for want of DRAM or of queue.";
        "pegaflow_save_orphan_blocks_total", save_orphan_blocks, "Blocks not saved because an ancestor is missing.";
        "pegaflow_dram_evicted_blocks_total", dram_evicted_blocks, "Blocks evicted from DRAM.";
        "pegaflow_policy_requests_total", policy_requests, "Requests that the policy was told of.";
        "pegaflow_policy_dropped_requests_total", policy_dropped_requests, "Requests of which it was not told: too many waited.";
        "pegaflow_durable_records_total", durable_records, "Records made durable.";
        "pegaflow_write_failed_records_total", write_failed_records, "Records whose write failed.";
        "pegaflow_quarantined_records_total", quarantined_records, "Records that failed their checks when read.";
        "pegaflow_reclaimed_regions_total", reclaimed_regions, "Regions reclaimed.";
        "pegaflow_nvme_reopens_total", nvme_reopens, "Times that the store was opened again after it had failed.";
        "pegaflow_nvme_failed_reopens_total", nvme_failed_reopens, "Attempts to open the store again that failed.";
        "pegaflow_scrubbed_bytes_total", scrubbed_bytes, "Bytes that scrubs have read.";
        "pegaflow_scrub_bad_records_total", scrub_bad_records, "Records that scrubs have found damaged.";
        "pegaflow_scrub_passes_total", scrub_passes, "Scrubs that have seen every record.";
        "pegaflow_appended_bytes_total", appended_bytes, "Bytes made durable in the log of the store.";
        "pegaflow_reinserted_records_total", reinserted_records, "Records written again before their region was reclaimed.";
        "pegaflow_reinserted_bytes_total", reinserted_bytes, "Bytes of these, also among the appended ones.";
        "pegaflow_cut_reinsertions_total", cut_reinsertions, "Times that there was no time to write all of them again.";
        "pegaflow_nvme_written_raw_bytes_total", nvme_written_raw_bytes, "Bytes of payloads that became durable.";
        "pegaflow_nvme_written_stored_bytes_total", nvme_written_stored_bytes, "Bytes of these as they were stored.";
        "pegaflow_nvme_read_raw_bytes_total", nvme_read_raw_bytes, "Bytes of payloads that were read and verified.";
        "pegaflow_nvme_read_stored_bytes_total", nvme_read_stored_bytes, "Bytes of these as they were stored.";
        "pegaflow_codec_encoded_records_total", codec_encoded_records, "Records that became durable encoded.";
        "pegaflow_codec_encode_nanoseconds_total", codec_encode_ns, "Time that threads have spent encoding.";
        "pegaflow_codec_decode_nanoseconds_total", codec_decode_ns, "Time that threads have spent decoding.";
        "pegaflow_decision_read_bytes_total", decision_read_bytes, "Bytes read beside requests to see how fast the drives are.";
        "pegaflow_recovered_records_total", recovered_records, "Records found by the scan at open.";
    }
}

/// Of blocks that are read from drives before a load asks for them, by the reason: `request`, `hot_set`, `look_aside`.
const FETCHED: [(&str, &str); 9] = [
    ("pegaflow_fetched_blocks_total", "Blocks read from drives before a load asked for them, by the reason."),
    ("pegaflow_fetched_bytes_total", "Bytes of these, as they are stored."),
    ("pegaflow_fetched_used_blocks_total", "Fetched blocks that were loaded while they were in DRAM."),
    ("pegaflow_fetched_wasted_blocks_total", "Fetched blocks that left DRAM unused, or were there already."),
    ("pegaflow_fetched_wasted_bytes_total", "Bytes of DRAM that these took."),
    ("pegaflow_fetch_cancelled_blocks_total", "Blocks not fetched: nobody waited for them any more, or not in time."),
    ("pegaflow_fetch_refused_blocks_total", "Blocks not fetched because too many waited to be."),
    ("pegaflow_fetch_no_room_blocks_total", "Blocks not fetched because DRAM was full of what is worth more."),
    ("pegaflow_fetch_failed_blocks_total", "Blocks whose fetch failed."),
];

fn record_fetched(stats: &Stats) {
    for (reason, of_reason) in [
        ("request", stats.fetched_request),
        ("hot_set", stats.fetched_hot_set),
        ("look_aside", stats.fetched_look_aside),
    ] {
        let values = [
            of_reason.blocks,
            of_reason.bytes,
            of_reason.used_blocks,
            of_reason.wasted_blocks,
            of_reason.wasted_bytes,
            of_reason.cancelled_blocks,
            of_reason.refused_blocks,
            of_reason.no_room_blocks,
            of_reason.failed_blocks,
        ];
        for ((name, _), value) in FETCHED.into_iter().zip(values) {
            metrics::counter!(name, "reason" => reason).absolute(value);
        }
    }
}

fn describe() {
    describe_engine();
    metrics::describe_counter!("pegaflow_loaded_blocks_total", "Blocks loaded, by the tier that held them.");
    metrics::describe_counter!("pegaflow_decisions_total", "Found prefixes, by what was to be done with them.");
    metrics::describe_counter!(
        "pegaflow_mistaken_decisions_total",
        "Decisions of which the other way would have been faster, as predicted."
    );
    metrics::describe_gauge!(
        "pegaflow_load_policy",
        "1 for the policy by which found blocks are loaded, 0 for all others."
    );
    for (name, help) in FETCHED {
        metrics::describe_counter!(name, help);
    }
    metrics::describe_counter!("pegaflow_codec_skipped_blocks_total", "Blocks stored as they are, by the reason.");
    metrics::describe_counter!("pegaflow_refused_blocks_total", "Blocks not written to the drive, by the reason.");
    metrics::describe_gauge!("pegaflow_drive_used_percent", "How much of the drive's rated life is used.");
    metrics::describe_gauge!("pegaflow_drive_spare_percent", "Spare capacity that the drive has left.");
    metrics::describe_gauge!("pegaflow_drive_critical_warning", "Bits of what is wrong with the drive; 0: nothing.");
    metrics::describe_gauge!("pegaflow_drive_written_bytes", "Bytes ever written to the drive, by everybody.");
    metrics::describe_gauge!(
        "pegaflow_drive_media_errors",
        "Times that the drive found data that it could not correct."
    );
    metrics::describe_gauge!(
        "pegaflow_drive_read_bytes_per_second",
        "What the drive is read with at its best; missing while not known."
    );
    metrics::describe_gauge!(
        "pegaflow_drive_write_bytes_per_second",
        "What the drive is written with at its best, syncs included; missing while not known."
    );
    metrics::describe_gauge!(
        "pegaflow_drive_read_depth_bytes",
        "Bytes of reads in flight with which the drive is almost at its best."
    );
    metrics::describe_gauge!(
        "pegaflow_hit_ratio_estimate",
        "Share of the blocks asked for lately that a tier of that percentage of its present size would serve."
    );
    metrics::describe_gauge!(
        "pegaflow_warm_start",
        "1 for how far the hot set of the run before has come back to DRAM, 0 for all others."
    );
    metrics::describe_gauge!(
        "pegaflow_warm_start_listed_blocks",
        "Blocks that were in DRAM before the start, all shards of a block as one."
    );
    metrics::describe_gauge!(
        "pegaflow_warm_start_missing_blocks",
        "Those of them that the store does not have any more."
    );
    metrics::describe_gauge!("pegaflow_warm_start_read_blocks", "Blocks that came back, each shard for itself.");
    metrics::describe_gauge!("pegaflow_warm_start_read_bytes", "Bytes of payloads that came back.");
    metrics::describe_gauge!("pegaflow_warm_start_seconds", "How long that took from the start on.");
    metrics::describe_gauge!("pegaflow_hot_set_kept_blocks", "Blocks that were noted last for the next start.");
    metrics::describe_gauge!("pegaflow_sessions", "Connected clients.");
    metrics::describe_gauge!("pegaflow_operations", "Loads and saves of clients in flight.");
    metrics::describe_gauge!("pegaflow_ready", "1 if the server is fit to serve, else 0.");
    metrics::describe_gauge!("pegaflow_nvme_poisoned", "1 if the store takes no more writes after a failure, else 0.");
    metrics::describe_gauge!("pegaflow_nvme_direct_io", "1 if records go past the page cache, else 0.");
    metrics::describe_gauge!(
        "pegaflow_nvme_degraded",
        "1 for the reason why blocks live in DRAM only, 0 for all others."
    );
    metrics::describe_gauge!(
        "pegaflow_scrub_last_pass_timestamp_seconds",
        "When the last scrub that saw all ended; 0: never."
    );
    metrics::describe_gauge!("pegaflow_index_full", "1 if the in-memory index has every record, else 0.");
    metrics::describe_gauge!("pegaflow_info", "Always 1; the labels name the version, the I/O engine and the policy.");
}

fn record(stats: &Stats, server: ServerGauges) {
    record_engine(stats);
    record_fetched(stats);
    for (verdict, decided, mistaken) in [
        ("load", stats.decided_loads, stats.mistaken_loads),
        ("recompute", stats.decided_recomputes, stats.mistaken_recomputes),
    ] {
        metrics::counter!("pegaflow_decisions_total", "verdict" => verdict).absolute(decided);
        metrics::counter!("pegaflow_mistaken_decisions_total", "verdict" => verdict).absolute(mistaken);
    }
    for policy in LoadPolicy::ALL {
        let is_it = f64::from(u8::from(stats.load_policy == policy));
        metrics::gauge!("pegaflow_load_policy", "policy" => policy.as_str()).set(is_it);
    }
    metrics::counter!("pegaflow_loaded_blocks_total", "tier" => "dram").absolute(stats.loaded_dram_blocks);
    metrics::counter!("pegaflow_loaded_blocks_total", "tier" => "nvme").absolute(stats.loaded_nvme_blocks);
    for (reason, blocks) in [
        ("ratio", stats.codec_skipped_ratio),
        ("queue", stats.codec_skipped_queue),
        ("speed", stats.codec_skipped_speed),
    ] {
        metrics::counter!("pegaflow_codec_skipped_blocks_total", "reason" => reason).absolute(blocks);
    }
    for (reason, blocks) in [
        ("budget", stats.refused_budget_blocks),
        ("unproven", stats.refused_unproven_blocks),
        ("ancestor", stats.refused_ancestor_blocks),
        ("worth", stats.refused_worth_blocks),
    ] {
        metrics::counter!("pegaflow_refused_blocks_total", "reason" => reason).absolute(blocks);
    }
    let warm = &stats.warm_start;
    for state in WarmState::ALL {
        let is_it = f64::from(u8::from(warm.state == state));
        metrics::gauge!("pegaflow_warm_start", "state" => state.as_str()).set(is_it);
    }
    metrics::gauge!("pegaflow_warm_start_listed_blocks").set(warm.listed_blocks as f64);
    metrics::gauge!("pegaflow_warm_start_missing_blocks").set(warm.missing_blocks as f64);
    metrics::gauge!("pegaflow_warm_start_read_blocks").set(warm.read_blocks as f64);
    metrics::gauge!("pegaflow_warm_start_read_bytes").set(warm.read_bytes as f64);
    metrics::gauge!("pegaflow_warm_start_seconds").set(warm.took_ms as f64 / 1000.0);
    metrics::gauge!("pegaflow_hot_set_kept_blocks").set(warm.kept_blocks as f64);
    for (tier, estimates) in [("dram", &stats.dram_estimates), ("nvme", &stats.nvme_estimates)] {
        for estimate in estimates {
            let percent = estimate.percent_of_present.to_string();
            let ratio = f64::from(estimate.hit_permille) / 1000.0;
            metrics::gauge!("pegaflow_hit_ratio_estimate", "tier" => tier, "percent" => percent).set(ratio);
        }
    }
    for wear in &stats.drives {
        let gauge = |name: &'static str, value: f64| metrics::gauge!(name, "drive" => wear.drive.clone()).set(value);
        gauge("pegaflow_drive_used_percent", wear.used_percent.into());
        gauge("pegaflow_drive_spare_percent", wear.spare_percent.into());
        gauge("pegaflow_drive_critical_warning", wear.critical_warning.into());
        gauge("pegaflow_drive_written_bytes", wear.written_bytes as f64);
        gauge("pegaflow_drive_media_errors", wear.media_errors as f64);
    }
    for speed in &stats.drive_speeds {
        let path = speed.path.display().to_string();
        for (name, value) in [
            ("pegaflow_drive_read_bytes_per_second", speed.read_bytes_per_second),
            ("pegaflow_drive_write_bytes_per_second", speed.write_bytes_per_second),
            ("pegaflow_drive_read_depth_bytes", speed.read_depth_bytes),
        ] {
            if value > 0 {
                metrics::gauge!(name, "path" => path.clone()).set(value as f64);
            }
        }
    }
    metrics::gauge!("pegaflow_sessions").set(server.sessions as f64);
    metrics::gauge!("pegaflow_operations").set(server.operations as f64);
    metrics::gauge!("pegaflow_ready").set(f64::from(u8::from(server.is_ready)));
    metrics::gauge!("pegaflow_nvme_poisoned").set(f64::from(u8::from(stats.nvme_poisoned)));
    metrics::gauge!("pegaflow_nvme_direct_io").set(f64::from(u8::from(stats.nvme_is_direct)));
    let last_scrub = stats.scrub_last_pass_unix_ms as f64 / 1000.0;
    metrics::gauge!("pegaflow_scrub_last_pass_timestamp_seconds").set(last_scrub);
    for reason in PoisonReason::ALL {
        let is_so = f64::from(u8::from(stats.nvme_degraded == Some(reason)));
        metrics::gauge!("pegaflow_nvme_degraded", "reason" => reason.as_str()).set(is_so);
    }
    metrics::gauge!("pegaflow_index_full").set(f64::from(u8::from(stats.index_full)));
    let (io_engine, policy) = (stats.io_engine.clone(), stats.policy.clone());
    let version = env!("CARGO_PKG_VERSION");
    metrics::gauge!("pegaflow_info", "version" => version, "io_engine" => io_engine, "policy" => policy).set(1.0);
}

#[cfg(test)]
mod tests {
    use super::*;
    use pegaflow_engine::{DriveSpeed, DriveWear, FetchTotals, SizeEstimate, WarmProgress};

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
}
