//! Processor, memory, limits and GPUs.

use std::fs;

use pegaflow_engine::ByteSize;
use pegaflow_server::settings::Settings;
use rustix::process::{Resource, getrlimit};

use super::{Finding, State};

/// What a server takes beside DRAM for blocks, roughly: RocksDB, policies, sockets.
const OWN_BYTES: u64 = 512 << 20;
/// Clients take a few descriptors each.
const FILES_MIN: u64 = 4096;

pub(super) fn examine(settings: &Settings) -> Vec<Finding> {
    let memory = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let limit = cgroup_limit();
    let mut findings = vec![kernel(), processors(), room(&memory, limit, settings.dram.0)];
    if settings.huge_pages {
        findings.push(huge_pages(&memory, settings.dram.0));
    }
    findings.push(open_files(getrlimit(Resource::Nofile).maximum));
    findings.push(file_size(getrlimit(Resource::Fsize).current));
    findings.push(gpus());
    findings
}

fn kernel() -> Finding {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    Finding::good("kernel", format!("Linux {}", release.trim()))
}

fn processors() -> Finding {
    let count = std::thread::available_parallelism().map_or(1, usize::from);
    let flags = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let has =
        |flag: &str| flags.lines().any(|line| line.starts_with("flags") && line.split(' ').any(|one| one == flag));
    let found = format!("{count} processors{}", if has("avx2") { ", AVX2" } else { "" });
    match count {
        0..4 => Finding::other(
            State::Slow,
            "processors",
            found,
            "checksums and decoding share them with everything else; give the server four",
        ),
        _ => Finding::good("processors", found),
    }
}

/// A line of `/proc/meminfo` in bytes, or in pages where it has no unit.
pub(super) fn of_memory(memory: &str, name: &str) -> Option<u64> {
    let line = memory.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    let mut words = line.split_whitespace();
    let number: u64 = words.next()?.parse().ok()?;
    Some(if words.next() == Some("kB") { number << 10 } else { number })
}

/// What the control group of this process may use.
fn cgroup_limit() -> Option<u64> {
    let group = fs::read_to_string("/proc/self/cgroup").ok()?;
    let path = group.lines().find_map(|line| line.strip_prefix("0::"))?;
    fs::read_to_string(format!("/sys/fs/cgroup{path}/memory.max")).ok()?.trim().parse().ok()
}

pub(super) fn room(memory: &str, limit: Option<u64>, dram: u64) -> Finding {
    let Some(available) = of_memory(memory, "MemAvailable") else {
        return Finding::other(State::Missing, "memory", "/proc/meminfo can not be read", "mount /proc");
    };
    let least = available.min(limit.unwrap_or(u64::MAX));
    let of_group = limit.map(|limit| format!(", the control group allows {}", ByteSize(limit))).unwrap_or_default();
    let found = format!("{} available{of_group}; dram is {}", ByteSize(available), ByteSize(dram));
    let wanted = dram.saturating_add(OWN_BYTES);
    if wanted > least {
        let most = ByteSize(least.saturating_sub(OWN_BYTES));
        return Finding::other(State::Wrong, "memory", found, format!("give dram at most {most}, or free some memory"));
    }
    Finding::good("memory", found)
}

pub(super) fn huge_pages(memory: &str, dram: u64) -> Finding {
    let page = of_memory(memory, "Hugepagesize").unwrap_or(2 << 20).max(1);
    let free = of_memory(memory, "HugePages_Free").unwrap_or(0).saturating_mul(page);
    let found = format!("{} in free pages of {}", ByteSize(free), ByteSize(page));
    if free < dram {
        let remedy = format!("sysctl -w vm.nr_hugepages={}; without them pages of 4 KiB are used", dram.div_ceil(page));
        return Finding::other(State::Slow, "huge pages", found, remedy);
    }
    Finding::good("huge pages", found)
}

fn open_files(limit: Option<u64>) -> Finding {
    match limit {
        Some(limit) if limit < FILES_MIN => Finding::other(
            State::Slow,
            "open files",
            format!("at most {limit}"),
            "raise the hard limit (ulimit -Hn 65536, LimitNOFILE=65536): fewer clients can connect",
        ),
        limit => Finding::good("open files", limit.map_or("no limit".into(), |limit| format!("at most {limit}"))),
    }
}

fn file_size(limit: Option<u64>) -> Finding {
    match limit {
        Some(limit) => Finding::other(
            State::Slow,
            "file size",
            format!("at most {}", ByteSize(limit)),
            "ulimit -f unlimited (LimitFSIZE=infinity): the store's files may become larger",
        ),
        None => Finding::good("file size", "no limit"),
    }
}

fn gpus() -> Finding {
    match pegaflow_tiers::gpu_count() {
        Ok(count) => Finding::good("GPUs", format!("{count} that this process sees; their workers copy by themselves")),
        Err(error) => Finding::other(
            State::Missing,
            "GPUs",
            error.message().to_owned(),
            "the server needs none; engines on a GPU need a driver for CUDA 12.0 or later",
        ),
    }
}
