//! Every metric of the server: name, kind, unit, labels, help, and where its values come from. Exposition and
//! `docs/metrics.md` are made of this table and nothing else.

use pegaflow_engine::{FetchTotals, LoadPolicy, PoisonReason, WarmState};

use super::metric::{Group, Label, Metric, Now, Out, Unit, counter, few, gauge, one_of, times};

const TIER: &[Label] = &[one_of("tier", &["dram", "nvme"])];
const PATH: &[Label] = &[few("path", "a directory of the store", 32)];
const PATH_DIRECTION: &[Label] =
    &[few("path", "a directory of the store", 32), one_of("direction", &["read", "write"])];
const DRIVE: &[Label] = &[few("drive", "an NVMe controller", 32)];
const DEGRADED: &[Label] = &[one_of("reason", &["no_space", "read_only", "device_gone", "io_error", "broken"])];
const VERDICT: &[Label] = &[one_of("verdict", &["load", "recompute"])];
const LOAD_POLICY: &[Label] = &[one_of("policy", &["auto", "always", "never", "shadow"])];
const FETCH: &[Label] = &[one_of("reason", &["request", "hot_set", "look_aside"])];
const WARM: &[Label] = &[one_of("state", &["off", "running", "nothing", "done", "full", "stopped"])];
const DROPPED: &[Label] = &[one_of("reason", &["room", "queue", "ancestor", "copy", "cancelled"])];
const EVICTED: &[Label] =
    &[one_of("tier", &["dram", "nvme"]), one_of("reason", &["room", "other_size", "colder", "region"])];
const REFUSED: &[Label] = &[one_of("reason", &["budget", "unproven", "ancestor", "worth"])];
const SKIPPED: &[Label] = &[one_of("reason", &["ratio", "queue", "speed"])];
const OPERATION: &[Label] = &[one_of("operation", &["load", "save"])];
const TIER_PERCENT: &[Label] = &[one_of("tier", &["dram", "nvme"]), one_of("percent", &["50", "100", "200", "400"])];
const INFO: &[Label] = &[few("version", "", 1), few("io_engine", "", 1), few("policy", "", 1)];

/// All of them. The first group is there while the server starts, too.
pub(crate) static GROUPS: &[Group] = &[
    Group { title: "Server", metrics: SERVER },
    Group { title: "Lookups and loads", metrics: LOADS },
    Group { title: "Saves", metrics: SAVES },
    Group { title: "DRAM", metrics: DRAM },
    Group { title: "Store", metrics: STORE },
    Group { title: "Drives", metrics: DRIVES },
    Group { title: "What is written to the drives, and their wear", metrics: WEAR },
    Group { title: "Compression and encryption", metrics: CODEC },
    Group { title: "Fetches ahead of loads", metrics: FETCHES },
    Group { title: "Warm start", metrics: WARM_START },
    Group { title: "Policy", metrics: POLICY },
];

/// Writes 1 for the name that holds and 0 for all others.
fn which<'a>(out: &mut Out, names: impl Iterator<Item = &'a str>, holds: Option<&str>) {
    names.for_each(|name| out.with(&[name], Some(name) == holds));
}

static SERVER: &[Metric] = &[
    gauge("pegaflow_ready", Unit::Flag, &[], "Whether the server is fit to serve.", |now, out| {
        out.one(now.server.is_ready);
    }),
    gauge(
        "pegaflow_info",
        Unit::Flag,
        INFO,
        "Always 1; the labels name the version, the I/O engine and the policy.",
        |now, out| {
            out.with(&[env!("CARGO_PKG_VERSION"), &now.stats.io_engine, &now.stats.policy], true);
        },
    ),
    gauge("pegaflow_sessions", Unit::Things, &[], "Connected clients.", |now, out| out.one(now.server.sessions)),
    gauge("pegaflow_operations", Unit::Things, &[], "Loads and saves of clients in flight.", |now, out| {
        out.one(now.server.operations);
    }),
    counter(
        "pegaflow_trace_spans_total",
        Unit::Things,
        &[one_of("result", &["sent", "refused", "no_room"])],
        "Sampled spans: taken by the OTLP collector, not taken by it, and dropped because too many waited.",
        |now, out| {
            let [sent, refused, no_room] = now.server.spans;
            out.with(&["sent"], sent);
            out.with(&["refused"], refused);
            out.with(&["no_room"], no_room);
        },
    ),
    gauge("process_start_time_seconds", Unit::UnixSeconds, &[], "When the server was started.", |now, out| {
        out.one(now.process.start_unix_seconds);
    }),
    gauge(
        "process_resident_memory_bytes",
        Unit::Bytes,
        &[],
        "Memory that the process has, DRAM for blocks included.",
        |now, out| {
            out.one(now.process.resident_bytes);
        },
    ),
    gauge("process_open_fds", Unit::Things, &[], "Open file descriptors.", |now, out| out.one(now.process.open_fds)),
    gauge("process_max_fds", Unit::Things, &[], "The most file descriptors that may be open.", |now, out| {
        out.one(now.process.max_fds);
    }),
];

static LOADS: &[Metric] = &[
    counter("pegaflow_lookup_blocks_total", Unit::Blocks, &[], "Blocks asked for in lookups.", |now, out| {
        out.one(now.stats.lookup_blocks);
    }),
    counter(
        "pegaflow_lookup_hit_blocks_total",
        Unit::Blocks,
        TIER,
        "Blocks found in lookups, by the tier that had them.",
        |now, out| {
            let in_dram = now.stats.lookup_hit_dram_blocks;
            out.with(&["dram"], in_dram);
            out.with(&["nvme"], now.stats.lookup_hit_blocks.saturating_sub(in_dram));
        },
    ),
    times("pegaflow_lookup_seconds", &[], "Lookups, from the request to the answer.", |now, out| {
        out.times(&[], &now.stats.latencies.lookup);
    }),
    counter(
        "pegaflow_loaded_blocks_total",
        Unit::Blocks,
        TIER,
        "Blocks loaded, by the tier that held them.",
        |now, out| {
            out.with(&["dram"], now.stats.loaded_dram_blocks);
            out.with(&["nvme"], now.stats.loaded_nvme_blocks);
        },
    ),
    counter("pegaflow_loaded_bytes_total", Unit::Bytes, TIER, "Bytes of these.", |now, out| {
        out.with(&["dram"], now.stats.loaded_dram_bytes);
        out.with(&["nvme"], now.stats.loaded_nvme_bytes);
    }),
    times(
        "pegaflow_load_seconds",
        TIER,
        "Loads, from when they were queued: `dram` out of DRAM only, `nvme` with at least one block from a drive. Loads that workers copy themselves are not in it.",
        |now, out| {
            out.times(&["dram"], &now.stats.latencies.load_dram);
            out.times(&["nvme"], &now.stats.latencies.load_nvme);
        },
    ),
    counter(
        "pegaflow_load_failed_blocks_total",
        Unit::Blocks,
        &[],
        "Blocks whose load failed; they were recomputed.",
        |now, out| {
            out.one(now.stats.load_failed_blocks);
        },
    ),
    counter(
        "pegaflow_decisions_total",
        Unit::Things,
        VERDICT,
        "Found prefixes, by what was to be done with them.",
        |now, out| {
            out.with(&["load"], now.stats.decided_loads);
            out.with(&["recompute"], now.stats.decided_recomputes);
        },
    ),
    counter(
        "pegaflow_mistaken_decisions_total",
        Unit::Things,
        VERDICT,
        "Decisions of which the other way would have been faster, as predicted.",
        |now, out| {
            out.with(&["load"], now.stats.mistaken_loads);
            out.with(&["recompute"], now.stats.mistaken_recomputes);
        },
    ),
    counter(
        "pegaflow_decision_read_bytes_total",
        Unit::Bytes,
        &[],
        "Bytes read beside requests to see how fast the drives are.",
        |now, out| {
            out.one(now.stats.decision_read_bytes);
        },
    ),
    gauge(
        "pegaflow_load_policy",
        Unit::Flag,
        LOAD_POLICY,
        "1 for the policy by which found blocks are loaded, 0 for all others.",
        |now, out| {
            which(out, LoadPolicy::ALL.iter().map(|policy| policy.as_str()), Some(now.stats.load_policy.as_str()));
        },
    ),
    gauge(
        "pegaflow_waiting_operations",
        Unit::Things,
        OPERATION,
        "Loads and saves that wait for a thread.",
        |now, out| {
            out.with(&["load"], now.stats.loads_waiting);
            out.with(&["save"], now.stats.saves_waiting);
        },
    ),
    gauge(
        "pegaflow_engine_sessions",
        Unit::Things,
        &[],
        "Sessions of the engine, those that are ending included.",
        |now, out| {
            out.one(now.stats.sessions);
        },
    ),
    gauge("pegaflow_engine_operations", Unit::Things, &[], "Loads and saves in flight in the engine.", |now, out| {
        out.one(now.stats.operations);
    }),
    gauge("pegaflow_instances", Unit::Things, &[], "Registered inference engines.", |now, out| {
        out.one(now.stats.instances)
    }),
    gauge("pegaflow_leases", Unit::Things, &[], "Live leases.", |now, out| out.one(now.stats.leases)),
];

static SAVES: &[Metric] = &[
    counter("pegaflow_saved_blocks_total", Unit::Blocks, &[], "Blocks saved.", |now, out| {
        out.one(now.stats.saved_blocks)
    }),
    counter("pegaflow_saved_bytes_total", Unit::Bytes, &[], "Bytes of these.", |now, out| {
        out.one(now.stats.saved_bytes)
    }),
    counter(
        "pegaflow_save_present_blocks_total",
        Unit::Blocks,
        &[],
        "Blocks whose save found them present.",
        |now, out| {
            out.one(now.stats.save_present_blocks);
        },
    ),
    counter(
        "pegaflow_save_dropped_blocks_total",
        Unit::Blocks,
        DROPPED,
        "Blocks not saved: `room` DRAM was full of what was not durable yet, `queue` too many saves waited, `ancestor` the block before it is missing, `copy` it could not be copied out of the device, `cancelled` the client took it back or the server ended.",
        |now, out| {
            out.with(&["room"], now.stats.save_dropped_room_blocks);
            out.with(&["queue"], now.stats.save_dropped_queue_blocks);
            out.with(&["ancestor"], now.stats.save_orphan_blocks);
            out.with(&["copy"], now.stats.save_dropped_copy_blocks);
            out.with(&["cancelled"], now.stats.save_dropped_cancelled_blocks);
        },
    ),
    times(
        "pegaflow_save_seconds",
        &[],
        "Saves until their blocks were visible, from when they were queued.",
        |now, out| {
            out.times(&[], &now.stats.latencies.save);
        },
    ),
    times(
        "pegaflow_durable_seconds",
        &[],
        "Blocks from when they were visible until they were durable.",
        |now, out| {
            out.times(&[], &now.stats.latencies.durable);
        },
    ),
];

static DRAM: &[Metric] = &[
    gauge("pegaflow_dram_capacity_bytes", Unit::Bytes, &[], "DRAM for blocks.", |now, out| {
        out.one(now.stats.dram_capacity_bytes)
    }),
    gauge(
        "pegaflow_dram_ready_bytes",
        Unit::Bytes,
        &[],
        "DRAM taken so far; grows to the capacity after a start.",
        |now, out| {
            out.one(now.stats.dram_ready_bytes);
        },
    ),
    gauge("pegaflow_dram_used_bytes", Unit::Bytes, &[], "DRAM slots in use.", |now, out| {
        out.one(now.stats.dram_used_bytes)
    }),
    gauge(
        "pegaflow_dram_dirty_bytes",
        Unit::Bytes,
        &[],
        "What is in DRAM and not durable yet: what a power loss would lose now.",
        |now, out| {
            out.one(now.stats.dram_dirty_bytes);
        },
    ),
    gauge(
        "pegaflow_dram_pinned_bytes",
        Unit::Bytes,
        &[],
        "DRAM slots of pinned blocks, which give way to nobody: at most half of DRAM.",
        |now, out| {
            out.one(now.stats.dram_pinned_bytes);
        },
    ),
    gauge("pegaflow_dram_pins", Unit::Things, &[], "Pins: see `pegaflow pin`.", |now, out| {
        out.one(now.stats.dram_pins)
    }),
    gauge(
        "pegaflow_dram_accounts",
        Unit::Things,
        &[],
        "Accounts in which shares of DRAM are kept: up to 15 namespaces have one each, all others one together.",
        |now, out| {
            out.one(now.stats.dram_accounts.len() as u64);
        },
    ),
    gauge(
        "pegaflow_dram_borrowed_bytes",
        Unit::Bytes,
        &[],
        "DRAM slots that namespaces have above what is guaranteed to them: these give way first.",
        |now, out| {
            out.one(now.stats.dram_borrowed_bytes);
        },
    ),
    counter(
        "pegaflow_dram_share_evicted_blocks_total",
        Unit::Blocks,
        &[],
        "Those of the blocks that left DRAM of which shares said whose leaves: several accounts had some.",
        |now, out| {
            out.one(now.stats.dram_share_evicted_blocks);
        },
    ),
    gauge("pegaflow_dram_blocks", Unit::Blocks, &[], "Blocks in DRAM.", |now, out| out.one(now.stats.dram_blocks)),
    counter(
        "pegaflow_evicted_blocks_total",
        Unit::Blocks,
        EVICTED,
        "Blocks that made room. DRAM: `room` for one of the same size that was saved or loaded, `other_size` with a whole chunk for another size, `colder` for one that was fetched and is worth more. Drive: `region` with the region that was reclaimed.",
        |now, out| {
            out.with(&["dram", "room"], now.stats.dram_evicted_room_blocks);
            out.with(&["dram", "other_size"], now.stats.dram_evicted_other_size_blocks);
            out.with(&["dram", "colder"], now.stats.dram_evicted_colder_blocks);
            out.with(&["nvme", "region"], now.stats.reclaimed_records);
        },
    ),
];

static STORE: &[Metric] = &[
    gauge(
        "pegaflow_nvme_poisoned",
        Unit::Flag,
        &[],
        "Whether the store takes no more writes after a failure.",
        |now, out| {
            out.one(now.stats.nvme_poisoned);
        },
    ),
    gauge(
        "pegaflow_nvme_degraded",
        Unit::Flag,
        DEGRADED,
        "1 for the reason why blocks live in DRAM only, 0 for all others.",
        |now, out| {
            which(
                out,
                PoisonReason::ALL.iter().map(|reason| reason.as_str()),
                now.stats.nvme_degraded.map(|reason| reason.as_str()),
            );
        },
    ),
    counter(
        "pegaflow_nvme_reopens_total",
        Unit::Things,
        &[],
        "Times that the store was opened again after it had failed.",
        |now, out| {
            out.one(now.stats.nvme_reopens);
        },
    ),
    counter(
        "pegaflow_nvme_failed_reopens_total",
        Unit::Things,
        &[],
        "Attempts to open the store again that failed.",
        |now, out| {
            out.one(now.stats.nvme_failed_reopens);
        },
    ),
    gauge("pegaflow_nvme_capacity_bytes", Unit::Bytes, &[], "Regions of the store; 0 without one.", |now, out| {
        out.one(now.stats.nvme_capacity_bytes);
    }),
    gauge("pegaflow_nvme_used_bytes", Unit::Bytes, &[], "Regions in use.", |now, out| {
        out.one(now.stats.nvme_used_bytes)
    }),
    gauge("pegaflow_nvme_records", Unit::Records, &[], "Records that lookups find.", |now, out| {
        out.one(now.stats.nvme_records)
    }),
    gauge("pegaflow_nvme_queued_bytes", Unit::Bytes, &[], "What waits to be written to the drives.", |now, out| {
        out.one(now.stats.nvme_queued_bytes);
    }),
    gauge("pegaflow_nvme_direct_io", Unit::Flag, &[], "Whether records go past the page cache.", |now, out| {
        out.one(now.stats.nvme_is_direct);
    }),
    counter("pegaflow_durable_records_total", Unit::Records, &[], "Records made durable.", |now, out| {
        out.one(now.stats.durable_records)
    }),
    counter("pegaflow_write_failed_records_total", Unit::Records, &[], "Records whose write failed.", |now, out| {
        out.one(now.stats.write_failed_records);
    }),
    counter(
        "pegaflow_quarantined_records_total",
        Unit::Records,
        &[],
        "Records that failed their checks when read: bit rot or a bad drive.",
        |now, out| {
            out.one(now.stats.quarantined_records);
        },
    ),
    counter(
        "pegaflow_recovered_records_total",
        Unit::Records,
        &[],
        "Records found by the scan at open that the index did not know.",
        |now, out| {
            out.one(now.stats.recovered_records);
        },
    ),
    counter("pegaflow_scrubbed_bytes_total", Unit::Bytes, &[], "What scrubs have read.", |now, out| {
        out.one(now.stats.scrubbed_bytes)
    }),
    counter(
        "pegaflow_scrub_bad_records_total",
        Unit::Records,
        &[],
        "Records that scrubs have found damaged.",
        |now, out| {
            out.one(now.stats.scrub_bad_records);
        },
    ),
    counter("pegaflow_scrub_passes_total", Unit::Things, &[], "Scrubs that have seen every record.", |now, out| {
        out.one(now.stats.scrub_passes);
    }),
    gauge(
        "pegaflow_scrub_last_pass_timestamp_seconds",
        Unit::UnixSeconds,
        &[],
        "When the last of them ended; 0: never.",
        |now, out| {
            out.one(now.stats.scrub_last_pass_unix_ms as f64 / 1000.0);
        },
    ),
    gauge("pegaflow_index_bytes", Unit::Bytes, &[], "Memory of the in-memory index.", |now, out| {
        out.one(now.stats.index_bytes)
    }),
    gauge("pegaflow_index_log_bytes", Unit::Bytes, &[], "Memory of RocksDB, the log of the index.", |now, out| {
        out.one(now.stats.index_log_bytes);
    }),
    gauge("pegaflow_index_full", Unit::Flag, &[], "Whether the in-memory index has every record.", |now, out| {
        out.one(now.stats.index_full)
    }),
    gauge(
        "pegaflow_index_filled_rows",
        Unit::Records,
        &[],
        "Rows that the in-memory index was filled with since open.",
        |now, out| {
            out.one(now.stats.index_filled_rows);
        },
    ),
    gauge(
        "pegaflow_index_rows",
        Unit::Records,
        &[],
        "Rows that it is to be filled with; an estimate until it is full.",
        |now, out| {
            out.one(now.stats.index_rows);
        },
    ),
];

static DRIVES: &[Metric] = &[
    counter(
        "pegaflow_drive_requests_total",
        Unit::Things,
        PATH_DIRECTION,
        "Reads and writes of the drive that ended well, since the store was opened; syncs are writes.",
        |now, out| {
            out.by_drive(now, |drive| (drive.reads, drive.writes));
        },
    ),
    counter("pegaflow_drive_transferred_bytes_total", Unit::Bytes, PATH_DIRECTION, "Bytes of these.", |now, out| {
        out.by_drive(now, |drive| (drive.read_bytes, drive.write_bytes));
    }),
    counter(
        "pegaflow_drive_failed_requests_total",
        Unit::Things,
        PATH_DIRECTION,
        "Reads and writes that failed or were refused.",
        |now, out| {
            out.by_drive(now, |drive| (drive.failed_reads, drive.failed_writes));
        },
    ),
    counter(
        "pegaflow_drive_busy_nanoseconds_total",
        Unit::Nanoseconds,
        PATH_DIRECTION,
        "Time in which something waited for the drive.",
        |now, out| {
            out.by_drive(now, |drive| (drive.read_busy_ns, drive.write_busy_ns));
        },
    ),
    gauge(
        "pegaflow_drive_waiting_requests",
        Unit::Things,
        PATH_DIRECTION,
        "Reads and writes that wait or are in flight.",
        |now, out| {
            out.by_drive(now, |drive| (drive.reads_waiting, drive.writes_waiting));
        },
    ),
    gauge("pegaflow_drive_waiting_bytes", Unit::Bytes, PATH_DIRECTION, "Bytes of these.", |now, out| {
        out.by_drive(now, |drive| (drive.read_bytes_waiting, drive.write_bytes_waiting));
    }),
    gauge(
        "pegaflow_drive_ceiling_used_ratio",
        Unit::Ratio,
        PATH_DIRECTION,
        "What was moved in the last 10 to 20 seconds, of what the drive moves at its best in that time; missing while its best is not known.",
        |now, out| {
            for (drive, speed) in now.stats.drive_uses.iter().zip(&now.stats.drive_speeds) {
                let path = &*drive.path.to_string_lossy();
                if speed.read_bytes_per_second > 0 {
                    out.with(&[path, "read"], drive.read_ceiling_permille as f64 / 1000.0);
                }
                if speed.write_bytes_per_second > 0 {
                    out.with(&[path, "write"], drive.write_ceiling_permille as f64 / 1000.0);
                }
            }
        },
    ),
    gauge(
        "pegaflow_drive_read_bytes_per_second",
        Unit::BytesPerSecond,
        PATH,
        "What the drive is read with at its best; missing while not known.",
        |now, out| {
            for speed in now.stats.drive_speeds.iter().filter(|speed| speed.read_bytes_per_second > 0) {
                out.with(&[&*speed.path.to_string_lossy()], speed.read_bytes_per_second);
            }
        },
    ),
    gauge(
        "pegaflow_drive_write_bytes_per_second",
        Unit::BytesPerSecond,
        PATH,
        "What the drive is written with at its best, syncs included; missing while not known.",
        |now, out| {
            for speed in now.stats.drive_speeds.iter().filter(|speed| speed.write_bytes_per_second > 0) {
                out.with(&[&*speed.path.to_string_lossy()], speed.write_bytes_per_second);
            }
        },
    ),
    gauge(
        "pegaflow_drive_read_depth_bytes",
        Unit::Bytes,
        PATH,
        "Reads in flight with which the drive is almost at its best.",
        |now, out| {
            for speed in now.stats.drive_speeds.iter().filter(|speed| speed.read_depth_bytes > 0) {
                out.with(&[&*speed.path.to_string_lossy()], speed.read_depth_bytes);
            }
        },
    ),
    times("pegaflow_drive_read_seconds", &[], "Reads of all drives, from when they were asked for.", |now, out| {
        out.times(&[], &now.stats.latencies.drive_read);
    }),
    times("pegaflow_drive_write_seconds", &[], "Writes of all drives, from when they were asked for.", |now, out| {
        out.times(&[], &now.stats.latencies.drive_write);
    }),
    times("pegaflow_drive_sync_seconds", &[], "Syncs of all drives.", |now, out| {
        out.times(&[], &now.stats.latencies.drive_sync);
    }),
];

static WEAR: &[Metric] = &[
    counter(
        "pegaflow_appended_bytes_total",
        Unit::Bytes,
        &[],
        "Bytes made durable in the log of the store, headers and all.",
        |now, out| {
            out.one(now.stats.appended_bytes);
        },
    ),
    counter("pegaflow_reclaimed_regions_total", Unit::Things, &[], "Regions reclaimed.", |now, out| {
        out.one(now.stats.reclaimed_regions)
    }),
    counter(
        "pegaflow_reinserted_records_total",
        Unit::Records,
        &[],
        "Records written again before their region was reclaimed.",
        |now, out| {
            out.one(now.stats.reinserted_records);
        },
    ),
    counter(
        "pegaflow_reinserted_bytes_total",
        Unit::Bytes,
        &[],
        "Bytes of these, also among the appended ones.",
        |now, out| {
            out.one(now.stats.reinserted_bytes);
        },
    ),
    counter(
        "pegaflow_cut_reinsertions_total",
        Unit::Things,
        &[],
        "Times that there was no time to write all of them again.",
        |now, out| {
            out.one(now.stats.cut_reinsertions);
        },
    ),
    gauge(
        "pegaflow_write_budget_day_bytes",
        Unit::Bytes,
        &[],
        "What may be written in a day; 0 without a bound.",
        |now, out| {
            out.one(now.stats.write_budget_day_bytes);
        },
    ),
    gauge("pegaflow_written_day_bytes", Unit::Bytes, &[], "Records written in the last 23 to 24 hours.", |now, out| {
        out.one(now.stats.written_day_bytes);
    }),
    counter(
        "pegaflow_refused_blocks_total",
        Unit::Blocks,
        REFUSED,
        "Blocks not written to the drives: `budget` nothing left, `unproven` not seen often enough for what is left, `ancestor` the block before it is not there, `worth` the store is full of blocks that are worth more.",
        |now, out| {
            out.with(&["budget"], now.stats.refused_budget_blocks);
            out.with(&["unproven"], now.stats.refused_unproven_blocks);
            out.with(&["ancestor"], now.stats.refused_ancestor_blocks);
            out.with(&["worth"], now.stats.refused_worth_blocks);
        },
    ),
    gauge(
        "pegaflow_drive_used_percent",
        Unit::Percent,
        DRIVE,
        "How much of the drive's rated life is used, by its own account; goes on above 100. Missing where it can not be asked, as the next four.",
        |now, out| {
            now.stats.drives.iter().for_each(|wear| out.with(&[&wear.drive], wear.used_percent));
        },
    ),
    gauge(
        "pegaflow_drive_spare_percent",
        Unit::Percent,
        DRIVE,
        "Spare capacity that the drive has left.",
        |now, out| {
            now.stats.drives.iter().for_each(|wear| out.with(&[&wear.drive], wear.spare_percent));
        },
    ),
    gauge(
        "pegaflow_drive_critical_warning",
        Unit::Things,
        DRIVE,
        "Bits of what is wrong with the drive; 0: nothing.",
        |now, out| {
            now.stats.drives.iter().for_each(|wear| out.with(&[&wear.drive], wear.critical_warning));
        },
    ),
    gauge(
        "pegaflow_drive_written_bytes",
        Unit::Bytes,
        DRIVE,
        "Bytes ever written to the drive, by everybody.",
        |now, out| {
            now.stats.drives.iter().for_each(|wear| out.with(&[&wear.drive], wear.written_bytes));
        },
    ),
    gauge(
        "pegaflow_drive_media_errors",
        Unit::Things,
        DRIVE,
        "Times that the drive found data that it could not correct.",
        |now, out| {
            now.stats.drives.iter().for_each(|wear| out.with(&[&wear.drive], wear.media_errors));
        },
    ),
];

static CODEC: &[Metric] = &[
    counter("pegaflow_nvme_written_raw_bytes_total", Unit::Bytes, &[], "Payloads that became durable.", |now, out| {
        out.one(now.stats.nvme_written_raw_bytes);
    }),
    counter("pegaflow_nvme_written_stored_bytes_total", Unit::Bytes, &[], "These as they were stored.", |now, out| {
        out.one(now.stats.nvme_written_stored_bytes);
    }),
    counter(
        "pegaflow_nvme_read_raw_bytes_total",
        Unit::Bytes,
        &[],
        "Payloads that were read and verified.",
        |now, out| {
            out.one(now.stats.nvme_read_raw_bytes);
        },
    ),
    counter("pegaflow_nvme_read_stored_bytes_total", Unit::Bytes, &[], "These as they were stored.", |now, out| {
        out.one(now.stats.nvme_read_stored_bytes);
    }),
    counter(
        "pegaflow_codec_encoded_records_total",
        Unit::Records,
        &[],
        "Records that became durable encoded.",
        |now, out| {
            out.one(now.stats.codec_encoded_records);
        },
    ),
    counter(
        "pegaflow_codec_skipped_blocks_total",
        Unit::Blocks,
        SKIPPED,
        "Blocks stored as they are: `ratio` they hardly shrink, `queue` too many waited, `speed` the drive reads faster than this machine decodes.",
        |now, out| {
            out.with(&["ratio"], now.stats.codec_skipped_ratio);
            out.with(&["queue"], now.stats.codec_skipped_queue);
            out.with(&["speed"], now.stats.codec_skipped_speed);
        },
    ),
    counter(
        "pegaflow_codec_encode_nanoseconds_total",
        Unit::Nanoseconds,
        &[],
        "Time that threads have spent encoding.",
        |now, out| {
            out.one(now.stats.codec_encode_ns);
        },
    ),
    counter(
        "pegaflow_codec_decode_nanoseconds_total",
        Unit::Nanoseconds,
        &[],
        "Time that threads have spent decoding.",
        |now, out| {
            out.one(now.stats.codec_decode_ns);
        },
    ),
    counter(
        "pegaflow_encrypt_nanoseconds_total",
        Unit::Nanoseconds,
        &[],
        "Time that threads have spent encrypting; 0 in a store that is not encrypted.",
        |now, out| {
            out.one(now.stats.seal_ns);
        },
    ),
    counter(
        "pegaflow_decrypt_nanoseconds_total",
        Unit::Nanoseconds,
        &[],
        "Time that threads have spent decrypting.",
        |now, out| {
            out.one(now.stats.unseal_ns);
        },
    ),
    gauge(
        "pegaflow_codec_decode_bytes_per_second",
        Unit::BytesPerSecond,
        &[],
        "What the store's threads decode of payload, measured at open.",
        |now, out| {
            out.one(now.stats.codec_decode_bytes_per_second);
        },
    ),
];

/// One value for each reason of a fetch.
fn fetched(now: &Now<'_>, out: &mut Out, of: fn(&FetchTotals) -> u64) {
    out.with(&["request"], of(&now.stats.fetched_request));
    out.with(&["hot_set"], of(&now.stats.fetched_hot_set));
    out.with(&["look_aside"], of(&now.stats.fetched_look_aside));
}

static FETCHES: &[Metric] = &[
    counter(
        "pegaflow_fetched_blocks_total",
        Unit::Blocks,
        FETCH,
        "Blocks read from drives before a load asked for them.",
        |now, out| fetched(now, out, |of| of.blocks),
    ),
    counter("pegaflow_fetched_bytes_total", Unit::Bytes, FETCH, "Bytes of these, as they are stored.", |now, out| {
        fetched(now, out, |of| of.bytes)
    }),
    counter(
        "pegaflow_fetched_used_blocks_total",
        Unit::Blocks,
        FETCH,
        "Fetched blocks that were loaded while they were in DRAM.",
        |now, out| fetched(now, out, |of| of.used_blocks),
    ),
    counter(
        "pegaflow_fetched_wasted_blocks_total",
        Unit::Blocks,
        FETCH,
        "Fetched blocks that left DRAM unused, or were there already.",
        |now, out| fetched(now, out, |of| of.wasted_blocks),
    ),
    counter("pegaflow_fetched_wasted_bytes_total", Unit::Bytes, FETCH, "DRAM that these took.", |now, out| {
        fetched(now, out, |of| of.wasted_bytes)
    }),
    counter(
        "pegaflow_fetch_cancelled_blocks_total",
        Unit::Blocks,
        FETCH,
        "Blocks not fetched: nobody waited for them any more, or not in time.",
        |now, out| fetched(now, out, |of| of.cancelled_blocks),
    ),
    counter(
        "pegaflow_fetch_refused_blocks_total",
        Unit::Blocks,
        FETCH,
        "Blocks not fetched because too many waited to be.",
        |now, out| fetched(now, out, |of| of.refused_blocks),
    ),
    counter(
        "pegaflow_fetch_no_room_blocks_total",
        Unit::Blocks,
        FETCH,
        "Blocks not fetched because DRAM was full of what is worth more.",
        |now, out| fetched(now, out, |of| of.no_room_blocks),
    ),
    counter("pegaflow_fetch_failed_blocks_total", Unit::Blocks, FETCH, "Blocks whose fetch failed.", |now, out| {
        fetched(now, out, |of| of.failed_blocks)
    }),
    gauge(
        "pegaflow_fetch_waiting_bytes",
        Unit::Bytes,
        &[],
        "What waits to be fetched, or is being fetched.",
        |now, out| out.one(now.stats.fetch_waiting_bytes),
    ),
];

static WARM_START: &[Metric] = &[
    gauge(
        "pegaflow_warm_start",
        Unit::Flag,
        WARM,
        "1 for how far the hot set of the run before has come back to DRAM, 0 for all others.",
        |now, out| {
            which(out, WarmState::ALL.iter().map(|state| state.as_str()), Some(now.stats.warm_start.state.as_str()));
        },
    ),
    gauge(
        "pegaflow_warm_start_listed_blocks",
        Unit::Blocks,
        &[],
        "Blocks that were in DRAM before the start, all shards of a block as one.",
        |now, out| {
            out.one(now.stats.warm_start.listed_blocks);
        },
    ),
    gauge(
        "pegaflow_warm_start_missing_blocks",
        Unit::Blocks,
        &[],
        "Those of them that the store does not have any more.",
        |now, out| {
            out.one(now.stats.warm_start.missing_blocks);
        },
    ),
    gauge(
        "pegaflow_warm_start_read_blocks",
        Unit::Blocks,
        &[],
        "Blocks that came back, each shard for itself.",
        |now, out| {
            out.one(now.stats.warm_start.read_blocks);
        },
    ),
    gauge("pegaflow_warm_start_read_bytes", Unit::Bytes, &[], "Bytes of payloads that came back.", |now, out| {
        out.one(now.stats.warm_start.read_bytes);
    }),
    gauge("pegaflow_warm_start_seconds", Unit::Seconds, &[], "How long that took from the start on.", |now, out| {
        out.one(now.stats.warm_start.took_ms as f64 / 1000.0);
    }),
    gauge(
        "pegaflow_hot_set_kept_blocks",
        Unit::Blocks,
        &[],
        "Blocks that were noted last for the next start.",
        |now, out| {
            out.one(now.stats.warm_start.kept_blocks);
        },
    ),
];

static POLICY: &[Metric] = &[
    counter(
        "pegaflow_policy_requests_total",
        Unit::Things,
        &[],
        "Requests that the policy was told of.",
        |now, out| {
            out.one(now.stats.policy_requests);
        },
    ),
    counter(
        "pegaflow_policy_dropped_requests_total",
        Unit::Things,
        &[],
        "Requests of which it was not told: too many waited.",
        |now, out| {
            out.one(now.stats.policy_dropped_requests);
        },
    ),
    gauge(
        "pegaflow_hit_ratio_estimate",
        Unit::Ratio,
        TIER_PERCENT,
        "Share of the blocks asked for lately that a tier of that percentage of its present size would serve.",
        |now, out| {
            for (tier, estimates) in [("dram", &now.stats.dram_estimates), ("nvme", &now.stats.nvme_estimates)] {
                for estimate in estimates {
                    out.with(
                        &[tier, &estimate.percent_of_present.to_string()],
                        f64::from(estimate.hit_permille) / 1000.0,
                    );
                }
            }
        },
    ),
];
