//! How much memory there is for an arena: what the host has available, and what the control group allows. Only to warn:
//! some hosts come by memory when it is asked for.

use std::fs;
use std::path::Path;

/// Bytes; `None` where it is not known, or not limited.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Memory {
    available_bytes: Option<u64>,
    cgroup_max_bytes: Option<u64>,
}

/// Warns if an arena of `bytes` is larger than the memory that there is for it.
pub(super) fn warn_if_short(bytes: u64) {
    let memory = Memory::read(Path::new("/proc"), Path::new("/sys/fs/cgroup"));
    let remedy = "give less dram, or expect the kernel to end processes";
    if let Some(available_bytes) = memory.available_bytes.filter(|available| *available < bytes) {
        tracing::warn!(
            arena_bytes = bytes,
            available_bytes,
            remedy,
            "the host has less memory available than the arena"
        );
    }
    if let Some(cgroup_max_bytes) = memory.cgroup_max_bytes.filter(|max| *max < bytes) {
        tracing::warn!(
            arena_bytes = bytes,
            cgroup_max_bytes,
            remedy,
            "memory.max of the cgroup is less than the arena"
        );
    }
}

impl Memory {
    fn read(proc: &Path, cgroups: &Path) -> Self {
        let read = |path: &Path| fs::read_to_string(path).unwrap_or_default();
        let meminfo = read(&proc.join("meminfo"));
        let available = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
        let kib = |text: &str| text.trim().strip_suffix("kB")?.trim_end().parse::<u64>().ok();
        let own = read(&proc.join("self/cgroup"));
        let group = own.lines().find_map(|line| line.strip_prefix("0::/")).unwrap_or_default();
        // Every group above the process's own limits it as well; the last of them is the root of what we see.
        let groups = Path::new(group).ancestors().map(|group| cgroups.join(group).join("memory.max"));
        let limits = groups.filter_map(|path| read(&path).trim().parse().ok());
        Self {
            available_bytes: available.and_then(kib).and_then(|kib| kib.checked_mul(1024)),
            cgroup_max_bytes: limits.min(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_least_limit_above_the_process_counts() {
        let directory = tempfile::tempdir().expect("a directory");
        let (proc, cgroups) = (directory.path().join("proc"), directory.path().join("cgroup"));
        assert_eq!(Memory::read(&proc, &cgroups), Memory::default());
        let write = |path: std::path::PathBuf, text: &str| {
            fs::create_dir_all(path.parent().expect("a directory")).expect("made");
            fs::write(path, text).expect("written");
        };
        write(proc.join("meminfo"), "MemTotal:  64 kB\nMemFree:  8 kB\nMemAvailable:      12 kB\n");
        write(proc.join("self/cgroup"), "1:name=systemd:/x\n0::/machine/pod/server\n");
        assert_eq!(Memory::read(&proc, &cgroups), Memory { available_bytes: Some(12288), cgroup_max_bytes: None });
        write(cgroups.join("machine/pod/server/memory.max"), "max\n");
        assert_eq!(Memory::read(&proc, &cgroups).cgroup_max_bytes, None);
        write(cgroups.join("machine/pod/memory.max"), "5000000\n");
        write(cgroups.join("machine/memory.max"), "9000000\n");
        assert_eq!(Memory::read(&proc, &cgroups).cgroup_max_bytes, Some(5_000_000));
        // In a container the process sees its own group as the root.
        write(proc.join("self/cgroup"), "0::/\n");
        write(cgroups.join("memory.max"), "7000\n");
        assert_eq!(Memory::read(&proc, &cgroups).cgroup_max_bytes, Some(7000));
    }
}
