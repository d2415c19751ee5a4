//! What is seen between two looks at a server's counters.

use std::time::Duration;

use pegaflow_engine::Latencies;
use serde::Serialize;
use serde_json::Value;

/// Names of the times that are shown, as they are in the counters.
const TIMES: [&str; 8] =
    ["lookup", "load_dram", "load_nvme", "save", "durable", "drive_read", "drive_write", "drive_sync"];

/// One moment of a server.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(super) struct Frame {
    pub(super) server_version: String,
    pub(super) uptime_ms: u64,
    /// How far the two looks lie apart; rates are over that.
    pub(super) seconds: f64,
    /// Why blocks live in DRAM only; `None` if they do not.
    pub(super) degraded: Option<String>,
    pub(super) load_policy: String,
    pub(super) sessions: u64,
    pub(super) instances: u64,
    pub(super) operations: u64,
    /// Of the blocks asked for since the look before; `None` if none were.
    pub(super) hit_ratio: Option<f64>,
    pub(super) hit_ratio_dram: Option<f64>,
    pub(super) lookup_blocks_per_second: f64,
    pub(super) loaded_dram_bytes_per_second: f64,
    pub(super) loaded_nvme_bytes_per_second: f64,
    pub(super) saved_bytes_per_second: f64,
    pub(super) dram_capacity_bytes: u64,
    pub(super) dram_used_bytes: u64,
    pub(super) dram_dirty_bytes: u64,
    pub(super) dram_blocks: u64,
    pub(super) nvme_capacity_bytes: u64,
    pub(super) nvme_used_bytes: u64,
    pub(super) nvme_queued_bytes: u64,
    pub(super) nvme_records: u64,
    pub(super) write_budget_day_bytes: u64,
    pub(super) written_day_bytes: u64,
    pub(super) evicted_blocks_per_second: f64,
    pub(super) dropped_blocks_per_second: f64,
    pub(super) load_failed_blocks: u64,
    pub(super) quarantined_records: u64,
    pub(super) latencies: Vec<TimesOf>,
    pub(super) drives: Vec<DriveOf>,
}

/// How long something took since the look before, or since the start if it did not happen in between.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(super) struct TimesOf {
    pub(super) name: &'static str,
    pub(super) per_second: f64,
    pub(super) p50_us: Option<f64>,
    pub(super) p90_us: Option<f64>,
    pub(super) p99_us: Option<f64>,
}

#[derive(Debug, Clone, PartialEq, Serialize)]
pub(super) struct DriveOf {
    pub(super) path: String,
    pub(super) read_bytes_per_second: f64,
    /// At its best; 0 while not known.
    pub(super) read_best_bytes_per_second: u64,
    pub(super) write_bytes_per_second: f64,
    pub(super) write_best_bytes_per_second: u64,
    pub(super) waiting: u64,
}

fn number(value: &Value, name: &str) -> u64 {
    value.get(name).and_then(Value::as_u64).unwrap_or(0)
}

fn text(value: &Value, name: &str) -> String {
    value.get(name).and_then(Value::as_str).unwrap_or_default().to_owned()
}

fn histogram(engine: &Value, name: &str) -> Latencies {
    let of = engine.get("latencies").and_then(|all| all.get(name));
    let counts = of.and_then(|of| of.get("counts")).and_then(Value::as_array);
    Latencies {
        counts: counts.into_iter().flatten().map(|count| count.as_u64().unwrap_or(0)).collect(),
        sum_ns: of.map_or(0, |of| number(of, "sum_ns")),
    }
}

impl Frame {
    /// Of two answers to `Stats`, `passed` apart.
    pub(super) fn new(before: &Value, now: &Value, passed: Duration) -> Self {
        let none = Value::Null;
        // Another server answers: its counters begin anew.
        let is_same = number(now, "uptime_ms") >= number(before, "uptime_ms");
        let (old, engine) = (before.get("engine").unwrap_or(&none), now.get("engine").unwrap_or(&none));
        let old = if is_same { old } else { engine };
        let seconds = passed.as_secs_f64();
        let delta = |name: &str| number(engine, name).saturating_sub(number(old, name));
        let rate = |count: u64| if seconds > 0.0 { count as f64 / seconds } else { 0.0 };
        let asked = delta("lookup_blocks");
        let ratio = |found: u64| (asked > 0).then(|| found as f64 / asked as f64);
        let degraded = engine.get("nvme_degraded").and_then(Value::as_str).map(str::to_owned);
        Self {
            server_version: text(now, "server_version"),
            uptime_ms: number(now, "uptime_ms"),
            seconds,
            degraded,
            load_policy: text(engine, "load_policy"),
            sessions: number(now, "sessions"),
            instances: number(engine, "instances"),
            operations: number(now, "operations"),
            hit_ratio: ratio(delta("lookup_hit_blocks")),
            hit_ratio_dram: ratio(delta("lookup_hit_dram_blocks")),
            lookup_blocks_per_second: rate(asked),
            loaded_dram_bytes_per_second: rate(delta("loaded_dram_bytes")),
            loaded_nvme_bytes_per_second: rate(delta("loaded_nvme_bytes")),
            saved_bytes_per_second: rate(delta("saved_bytes")),
            dram_capacity_bytes: number(engine, "dram_capacity_bytes"),
            dram_used_bytes: number(engine, "dram_used_bytes"),
            dram_dirty_bytes: number(engine, "dram_dirty_bytes"),
            dram_blocks: number(engine, "dram_blocks"),
            nvme_capacity_bytes: number(engine, "nvme_capacity_bytes"),
            nvme_used_bytes: number(engine, "nvme_used_bytes"),
            nvme_queued_bytes: number(engine, "nvme_queued_bytes"),
            nvme_records: number(engine, "nvme_records"),
            write_budget_day_bytes: number(engine, "write_budget_day_bytes"),
            written_day_bytes: number(engine, "written_day_bytes"),
            evicted_blocks_per_second: rate(delta("dram_evicted_blocks")),
            dropped_blocks_per_second: rate(delta("save_dropped_blocks") + delta("save_orphan_blocks")),
            load_failed_blocks: number(engine, "load_failed_blocks"),
            quarantined_records: number(engine, "quarantined_records"),
            latencies: TIMES
                .iter()
                .map(|name| TimesOf::new(name, &histogram(old, name), &histogram(engine, name), rate))
                .collect(),
            drives: drives(old, engine, rate),
        }
    }

    /// As `--json` prints it.
    pub(super) fn to_json(&self) -> Value {
        serde_json::to_value(self).unwrap_or_default()
    }
}

impl TimesOf {
    fn new(name: &'static str, before: &Latencies, now: &Latencies, rate: impl Fn(u64) -> f64) -> Self {
        let old = |at: usize| before.counts.get(at).copied().unwrap_or(0);
        let counts = now.counts.iter().enumerate().map(|(at, count)| count.saturating_sub(old(at)));
        let since = Latencies { counts: counts.collect(), sum_ns: now.sum_ns.saturating_sub(before.sum_ns) };
        let shown = if since.count() > 0 { &since } else { now };
        let us = |share: f64| shown.quantile(share).map(|seconds| seconds * 1e6);
        Self { name, per_second: rate(since.count()), p50_us: us(0.5), p90_us: us(0.9), p99_us: us(0.99) }
    }
}

fn drives(old: &Value, engine: &Value, rate: impl Fn(u64) -> f64) -> Vec<DriveOf> {
    let list = |of: &Value, name: &str| of.get(name).and_then(Value::as_array).cloned().unwrap_or_default();
    let (speeds, uses, before) = (list(engine, "drive_speeds"), list(engine, "drive_uses"), list(old, "drive_uses"));
    let drive = |(at, (speed, use_)): (usize, (&Value, &Value))| {
        let old = |name: &str| before.get(at).map_or(0, |old| number(old, name));
        let delta = |name: &str| rate(number(use_, name).saturating_sub(old(name)));
        DriveOf {
            path: text(speed, "path"),
            read_bytes_per_second: delta("read_bytes"),
            read_best_bytes_per_second: number(speed, "read_bytes_per_second"),
            write_bytes_per_second: delta("write_bytes"),
            write_best_bytes_per_second: number(speed, "write_bytes_per_second"),
            waiting: number(use_, "reads_waiting") + number(use_, "writes_waiting"),
        }
    };
    speeds.iter().zip(&uses).enumerate().map(drive).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn stats(uptime_ms: u64, asked: u64, found: u64, counts: &[u64]) -> Value {
        json!({
            "uptime_ms": uptime_ms, "server_version": "1", "sessions": 2, "operations": 3,
            "engine": {
                "lookup_blocks": asked, "lookup_hit_blocks": found, "lookup_hit_dram_blocks": found / 2,
                "nvme_degraded": null, "latencies": { "lookup": { "counts": counts, "sum_ns": 0 } },
                "drive_speeds": [{ "path": "/n", "read_bytes_per_second": 100 }],
                "drive_uses": [{ "read_bytes": asked, "reads_waiting": 1, "writes_waiting": 2 }],
            }
        })
    }

    #[test]
    fn rates_are_over_the_time_between_two_looks() {
        let frame = Frame::new(&stats(1000, 100, 40, &[1]), &stats(3000, 300, 180, &[1, 0, 4]), Duration::from_secs(2));
        assert_eq!((frame.hit_ratio, frame.hit_ratio_dram), (Some(0.7), Some(0.35)));
        assert_eq!((frame.lookup_blocks_per_second, frame.sessions, frame.operations), (100.0, 2, 3));
        let lookup = &frame.latencies[0];
        assert_eq!((lookup.name, lookup.per_second, lookup.p50_us), ("lookup", 2.0, Some(3.0)));
        let drive = &frame.drives[0];
        assert_eq!((drive.read_bytes_per_second, drive.read_best_bytes_per_second, drive.waiting), (100.0, 100, 3));
        assert_eq!(frame.to_json()["hit_ratio"], 0.7);
    }

    #[test]
    fn nothing_asked_for_has_no_ratio_and_a_new_server_begins_at_zero() {
        let same = Frame::new(&stats(1, 5, 5, &[3]), &stats(2, 5, 5, &[3]), Duration::from_secs(1));
        assert_eq!((same.hit_ratio, same.latencies[0].per_second, same.latencies[0].p50_us), (None, 0.0, Some(0.5)));
        let restarted = Frame::new(&stats(9000, 500, 5, &[3]), &stats(10, 7, 7, &[]), Duration::from_secs(1));
        assert_eq!((restarted.hit_ratio, restarted.lookup_blocks_per_second), (None, 0.0));
        assert_eq!(Frame::new(&Value::Null, &Value::Null, Duration::ZERO).drives, vec![]);
    }
}
