//! The engine's configuration: plain fields, each with unit, default and limit, checked all at once.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use crate::arbiter::LoadPolicy;
use crate::policy::PolicyChoice;
use crate::scheduler::GUARANTEED_PERCENT;
use crate::write_budget::WriteBudget;
use pegaflow_tiers::{CodecChoice, EncryptionKey, Error, ErrorKind, Result};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A number of bytes that people write as `64GiB`, `512 MiB`, `1.5GB` or a plain number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct ByteSize(pub u64);

/// Drives of a store besides its home at most.
const MORE_DRIVES_MAX: usize = 31;

/// What a write budget is at least: one group commit.
const WRITE_BUDGET_MIN: u64 = 64 * MIB;

const KIB: u64 = 1024;
const MIB: u64 = 1024 * KIB;
const GIB: u64 = 1024 * MIB;
const TIB: u64 = 1024 * GIB;

impl ByteSize {
    /// `n` times 1024^2 bytes.
    pub const fn mib(n: u64) -> Self {
        Self(n * MIB)
    }

    /// `n` times 1024^3 bytes.
    pub const fn gib(n: u64) -> Self {
        Self(n * GIB)
    }
}

impl FromStr for ByteSize {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let bad = || {
            Error::new(
                ErrorKind::InvalidInput,
                format!("'{text}' is not a size; write for example 64GiB, 512MiB, 1.5GB or 1048576"),
            )
        };
        let trimmed = text.trim();
        let split = trimmed.find(|c: char| !(c.is_ascii_digit() || c == '.' || c == '_')).unwrap_or(trimmed.len());
        let (number, unit) = trimmed.split_at(split);
        let factor = match unit.trim().to_ascii_lowercase().as_str() {
            "" | "b" => 1,
            "k" | "kib" => KIB,
            "m" | "mib" => MIB,
            "g" | "gib" => GIB,
            "t" | "tib" => TIB,
            "kb" => 1000,
            "mb" => 1_000_000,
            "gb" => 1_000_000_000,
            "tb" => 1_000_000_000_000,
            _ => return Err(bad()),
        };
        let number = number.replace('_', "");
        if let Ok(whole) = number.parse::<u64>() {
            return whole.checked_mul(factor).map(Self).ok_or_else(bad);
        }
        let value = number.parse::<f64>().map_err(|_| bad())? * factor as f64;
        if !value.is_finite() || value < 0.0 || value >= u64::MAX as f64 {
            return Err(bad());
        }
        Ok(Self(value as u64))
    }
}

impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (unit, name) in [(TIB, "TiB"), (GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")] {
            if self.0 >= unit {
                return if self.0.is_multiple_of(unit) {
                    write!(f, "{} {name}", self.0 / unit)
                } else {
                    write!(f, "{:.2} {name}", self.0 as f64 / unit as f64)
                };
            }
        }
        write!(f, "{} B", self.0)
    }
}

impl Serialize for ByteSize {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_u64(self.0)
    }
}

impl<'de> Deserialize<'de> for ByteSize {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Size {
            Number(u64),
            Text(String),
        }
        match Size::deserialize(deserializer)? {
            Size::Number(bytes) => Ok(Self(bytes)),
            Size::Text(text) => text.parse().map_err(serde::de::Error::custom),
        }
    }
}

/// Which I/O engine the store uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum IoEngineChoice {
    /// io_uring if a probe finds it working, else pread/pwrite with one line that says why.
    #[default]
    Auto,
    /// io_uring, or an error.
    IoUring,
    /// pread/pwrite on a few threads.
    Psync,
}

/// A drive of the store besides its home: a directory on it and how much of it the store takes. Written `DIR=SIZE`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NvmeDrive {
    /// A directory on the drive, created if missing. On ext4 or XFS. No default.
    pub path: PathBuf,
    /// Bytes of its regions, taken from the file system at once. No default. Minimum: 4 regions.
    pub capacity: ByteSize,
}

impl FromStr for NvmeDrive {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        match text.rsplit_once('=') {
            Some((path, capacity)) if !path.is_empty() => Ok(Self { path: path.into(), capacity: capacity.parse()? }),
            _ => {
                let message =
                    format!("'{text}' is not a drive; write DIR=SIZE, for example /mnt/nvme1/pegaflow=512GiB");
                Err(Error::new(ErrorKind::InvalidInput, message))
            }
        }
    }
}

/// The store, on one drive or several.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NvmeConfig {
    /// The store's home, created if missing: it has the index and the first regions. On ext4 or XFS. No default.
    pub path: PathBuf,
    /// Bytes of the regions in the home, taken from the file system at once. May change from start to start: more is
    /// taken, less gives up what lies behind. Default: 16 GiB. Minimum: 4 regions.
    #[serde(default = "default_nvme_capacity")]
    pub capacity: ByteSize,
    /// Further drives, in the order in which they joined, new ones last; blocks are spread over all. One that is no
    /// longer listed is retired: its blocks are gone, and if it is listed again it comes back empty. Default: none.
    /// Limit: 31.
    #[serde(default)]
    pub more_drives: Vec<NvmeDrive>,
    /// Bytes of one region, the unit of reclaiming; fixed when the store is made. A multiple of 1 MiB, at least 4 MiB,
    /// at most 4 GiB. Default: what the store has; for a new one 1/64 of the home's capacity, within 16 MiB to 256 MiB.
    #[serde(default)]
    pub region: Option<ByteSize>,
    /// The I/O engine. Default: auto.
    #[serde(default)]
    pub io_engine: IoEngineChoice,
    /// Operations in flight on each drive. Default: 64. Limits: 1 to 1024.
    #[serde(default = "default_queue_depth")]
    pub queue_depth: u32,
    /// Bytes a second at which records are read and checked while the drive is idle, all of them about once a day; 0: never.
    /// Default: 8 MiB. Maximum: 16 GiB.
    #[serde(default = "default_scrub")]
    pub scrub: ByteSize,
    /// Whether blocks are compressed on the drive, without loss: `auto`, `always` or `none`. Default: auto.
    #[serde(default)]
    pub codec: CodecChoice,
    /// What may be written to the drive, on average: `500GiB/day`, or `1.5dwpd`, drive writes per day, where the drive
    /// counts as large as the capacity of the store, all drives together. An hour's worth may be saved up. Blocks that are not worth their bytes then stay in
    /// DRAM only; named objects are written whatever it says, and count. Default: none, no bound. Minimum: 64 MiB a day.
    #[serde(default)]
    pub write_budget: Option<WriteBudget>,
    /// How much of a region may be written again elsewhere before it is reclaimed, in percent: its most used blocks.
    /// 0: nothing. Default: 25. Limit: 50.
    #[serde(default = "default_reinsert_percent")]
    pub reinsert_percent: u32,
    /// How often the drive is asked for its health, in seconds. 0: never. Default: 600. Limits: 10 to 86,400.
    #[serde(default = "default_health_interval_s")]
    pub health_interval_s: u64,
    /// Whether the blocks that were in DRAM come back from the drive after an open, in the background. Which ones is kept in
    /// the store, 49 bytes a block, 200,000 at most. Default: true.
    #[serde(default = "default_warm_start")]
    pub warm_start: bool,
    /// How often it is noted which ones these are, in seconds, as long as anything is asked for; also at a close. Default: 600.
    /// Limits: 1 to 86,400.
    #[serde(default = "default_hot_set_interval_s")]
    pub hot_set_interval_s: u64,
    /// A file with the key of an encrypted store: 64 hexadecimal digits, readable by its owner alone. Payloads are then
    /// encrypted, and names are keyed hashes. Decided when the store is made. Default: none, not encrypted.
    #[serde(default)]
    pub encryption_key_file: Option<PathBuf>,
    /// A command that prints that key, instead of the file; `/bin/sh -c` runs it at every open of the store. Default: none.
    #[serde(default)]
    pub encryption_key_command: Option<String>,
}

fn default_warm_start() -> bool {
    true
}

fn default_hot_set_interval_s() -> u64 {
    600
}

fn default_health_interval_s() -> u64 {
    600
}

fn default_reinsert_percent() -> u32 {
    25
}

fn default_nvme_capacity() -> ByteSize {
    ByteSize::gib(16)
}

fn default_scrub() -> ByteSize {
    ByteSize::mib(8)
}

fn default_queue_depth() -> u32 {
    64
}

impl NvmeConfig {
    /// A store at `path` with `capacity`, everything else by default.
    pub fn new(path: impl Into<PathBuf>, capacity: ByteSize) -> Self {
        Self {
            path: path.into(),
            capacity,
            more_drives: Vec::new(),
            region: None,
            io_engine: IoEngineChoice::Auto,
            queue_depth: default_queue_depth(),
            scrub: default_scrub(),
            codec: CodecChoice::Auto,
            write_budget: None,
            reinsert_percent: default_reinsert_percent(),
            health_interval_s: default_health_interval_s(),
            warm_start: default_warm_start(),
            hot_set_interval_s: default_hot_set_interval_s(),
            encryption_key_file: None,
            encryption_key_command: None,
        }
    }

    /// The key of the store, if it is to be encrypted.
    ///
    /// # Errors
    /// As [`EncryptionKey::from_file`] and [`EncryptionKey::from_command`].
    pub fn encryption_key(&self) -> Result<Option<EncryptionKey>> {
        match (&self.encryption_key_file, &self.encryption_key_command) {
            (Some(path), _) => EncryptionKey::from_file(path).map(Some),
            (None, Some(command)) => EncryptionKey::from_command(command).map(Some),
            (None, None) => Ok(None),
        }
    }

    /// The directories of all drives, the home first.
    pub fn paths(&self) -> Vec<PathBuf> {
        std::iter::once(&self.path).chain(self.more_drives.iter().map(|drive| &drive.path)).cloned().collect()
    }

    /// Bytes of the store, all drives together.
    pub fn capacity_bytes(&self) -> u64 {
        self.more_drives.iter().fold(self.capacity.0, |sum, drive| sum.saturating_add(drive.capacity.0))
    }

    /// What may be written a day, if that is bounded.
    pub fn write_bytes_per_day(&self) -> Option<u64> {
        self.write_budget.map(|budget| budget.bytes_per_day(self.capacity_bytes()))
    }

    /// The region size of a store that is made: the one given, or the default for the capacity.
    pub fn region_bytes(&self) -> u64 {
        self.region.map_or_else(|| (self.capacity.0 / 64 / MIB * MIB).clamp(16 * MIB, 256 * MIB), |region| region.0)
    }
}

/// The engine's configuration.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EngineConfig {
    /// Bytes of DRAM for blocks, taken and touched at start. Default: 4 GiB. Minimum: 16 MiB.
    #[serde(default = "default_dram")]
    pub dram: ByteSize,
    /// Ask for 2 MiB pages; without them 4 KiB pages are used, with one line that says so. Default: false.
    #[serde(default)]
    pub huge_pages: bool,
    /// Let workers in other processes map the DRAM. Such memory has 2 MiB pages only with `huge_pages`. Default: false; the
    /// server sets it.
    #[serde(default)]
    pub shared_dram: bool,
    /// Who decides what stays in DRAM: `pegaflow`, which learns, or one of the textbook policies `lru`, `fifo`, `s3fifo` and
    /// `arc`. Default: pegaflow.
    #[serde(default)]
    pub policy: PolicyChoice,
    /// The part of DRAM that is guaranteed, in equal parts, to the namespaces (models, tenants) that asked for something within
    /// ten minutes, in percent; what nobody needs is lent. 0: no shares, whoever asks more has more. Default: 50. Limit: 100.
    #[serde(default = "default_guaranteed_percent")]
    pub guaranteed_percent: u32,
    /// The store; without it blocks live in DRAM only. Default: none.
    #[serde(default)]
    pub nvme: Option<NvmeConfig>,
    /// Threads that load. Default: 4. Limits: 1 to 64.
    #[serde(default = "default_load_threads")]
    pub load_threads: u32,
    /// Threads that save. Default: 2. Limits: 1 to 64.
    #[serde(default = "default_save_threads")]
    pub save_threads: u32,
    /// Operations waiting for a thread, loads and saves each; more are dropped and counted. Default: 1024. Limits: 1 to 65,536.
    #[serde(default = "default_queue_operations")]
    pub queue_operations: u32,
    /// The longest wait for one load's reads and copies, in milliseconds. Default: 30,000. Limits: 100 to 600,000.
    #[serde(default = "default_load_timeout_ms")]
    pub load_timeout_ms: u64,
    /// How long after its write a block is durable at the latest, in milliseconds. Default: 1,000. Limits: 1 to 60,000.
    #[serde(default = "default_commit_interval_ms")]
    pub commit_interval_ms: u64,
    /// Whether what lookups find is loaded, until it is set to something else. Default: auto.
    #[serde(default)]
    pub load_policy: LoadPolicy,
}

fn default_dram() -> ByteSize {
    ByteSize::gib(4)
}
fn default_guaranteed_percent() -> u32 {
    GUARANTEED_PERCENT
}
fn default_load_threads() -> u32 {
    4
}
fn default_save_threads() -> u32 {
    2
}
fn default_queue_operations() -> u32 {
    1024
}
fn default_load_timeout_ms() -> u64 {
    30_000
}
fn default_commit_interval_ms() -> u64 {
    1_000
}

impl Default for EngineConfig {
    fn default() -> Self {
        Self {
            dram: default_dram(),
            huge_pages: false,
            shared_dram: false,
            policy: PolicyChoice::default(),
            guaranteed_percent: default_guaranteed_percent(),
            nvme: None,
            load_threads: default_load_threads(),
            save_threads: default_save_threads(),
            queue_operations: default_queue_operations(),
            load_timeout_ms: default_load_timeout_ms(),
            commit_interval_ms: default_commit_interval_ms(),
            load_policy: LoadPolicy::default(),
        }
    }
}

impl EngineConfig {
    /// The longest wait for one load.
    pub fn load_timeout(&self) -> Duration {
        Duration::from_millis(self.load_timeout_ms)
    }

    /// Checks every field against its limits.
    ///
    /// # Errors
    /// `InvalidInput` that names all problems at once, each with value, limit and remedy.
    pub fn validate(&self) -> Result<()> {
        let problems = self.problems();
        if problems.is_empty() { Ok(()) } else { Err(Error::new(ErrorKind::InvalidInput, problems.join("; "))) }
    }

    /// What [`EngineConfig::validate`] finds wrong, one text for each problem; empty if nothing is.
    pub fn problems(&self) -> Vec<String> {
        let mut problems = Vec::new();
        let mut check = |ok: bool, problem: String| {
            if !ok {
                problems.push(problem);
            }
        };
        check(self.dram.0 >= 16 * MIB, format!("dram is {}; give at least 16 MiB", self.dram));
        let within = |name: &str, value: u64, min: u64, max: u64| {
            (value >= min && value <= max, format!("{name} is {value}; give {min} to {max}"))
        };
        for (ok, problem) in [
            within("guaranteed_percent", self.guaranteed_percent.into(), 0, 100),
            within("load_threads", self.load_threads.into(), 1, 64),
            within("save_threads", self.save_threads.into(), 1, 64),
            within("queue_operations", self.queue_operations.into(), 1, 65_536),
            within("load_timeout_ms", self.load_timeout_ms, 100, 600_000),
            within("commit_interval_ms", self.commit_interval_ms, 1, 60_000),
        ] {
            check(ok, problem);
        }
        if let Some(nvme) = &self.nvme {
            let region = nvme.region_bytes();
            check(!nvme.path.as_os_str().is_empty(), "nvme.path is empty; give a directory".into());
            check(
                region.is_multiple_of(MIB) && (4 * MIB..=4 * GIB).contains(&region),
                format!("nvme.region is {}; give a multiple of 1 MiB from 4 MiB to 4 GiB", ByteSize(region)),
            );
            check(nvme.scrub.0 <= 16 * GIB, format!("nvme.scrub is {} a second; give 0 to 16 GiB", nvme.scrub));
            let least = ByteSize(region.saturating_mul(4));
            let too_small = |name: String, capacity: ByteSize| {
                let problem = format!(
                    "{name} is {capacity}, less than four regions of {}; give at least {least}",
                    ByteSize(region)
                );
                (capacity >= least, problem)
            };
            let (ok, problem) = too_small("nvme.capacity".into(), nvme.capacity);
            check(ok, problem);
            let count = nvme.more_drives.len();
            check(count <= MORE_DRIVES_MAX, format!("nvme.more_drives lists {count}; give at most {MORE_DRIVES_MAX}"));
            let mut paths = vec![&nvme.path];
            for (index, drive) in nvme.more_drives.iter().enumerate() {
                let name = format!("nvme.more_drives[{index}]");
                check(!drive.path.as_os_str().is_empty(), format!("{name}.path is empty; give a directory"));
                let (ok, problem) = too_small(format!("{name}.capacity"), drive.capacity);
                check(ok, problem);
                check(
                    !paths.contains(&&drive.path),
                    format!(
                        "{name}.path is {}, which is listed already; give each drive its own",
                        drive.path.display()
                    ),
                );
                paths.push(&drive.path);
            }
            let (ok, problem) = within("nvme.queue_depth", nvme.queue_depth.into(), 1, 1024);
            check(ok, problem);
            let (ok, problem) = within("nvme.reinsert_percent", nvme.reinsert_percent.into(), 0, 50);
            check(ok, problem);
            check(
                nvme.encryption_key_file.is_none() || nvme.encryption_key_command.is_none(),
                "nvme.encryption_key_file and nvme.encryption_key_command are both given; give one of them".into(),
            );
            let (ok, problem) = within("nvme.hot_set_interval_s", nvme.hot_set_interval_s, 1, 86_400);
            check(ok, problem);
            let every = nvme.health_interval_s;
            let (ok, problem) = within("nvme.health_interval_s", every, 10, 86_400);
            check(ok || every == 0, format!("{problem}, or 0 for never"));
            if let (Some(budget), Some(bytes)) = (nvme.write_budget, nvme.write_bytes_per_day()) {
                check(
                    bytes >= WRITE_BUDGET_MIN,
                    format!(
                        "nvme.write_budget is {budget}, {} a day; give at least {}",
                        ByteSize(bytes),
                        ByteSize(WRITE_BUDGET_MIN)
                    ),
                );
            }
        }
        problems
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_as_people_write_them() {
        let read = |text: &str| text.parse::<ByteSize>().ok().map(|size| size.0);
        assert_eq!(read("64GiB"), Some(64 * GIB));
        assert_eq!(read("512 MiB"), Some(512 * MIB));
        assert_eq!(read("1.5GB"), Some(1_500_000_000));
        assert_eq!(read("1_048_576"), Some(MIB));
        for bad in ["", "GiB", "-1", "5 parsecs", "99999999TiB", "1e3"] {
            assert_eq!(read(bad), None, "{bad}");
        }
    }

    #[test]
    fn drives_are_read_as_people_write_them() {
        let read = |text: &str| text.parse::<NvmeDrive>().map(|drive| (drive.path, drive.capacity.0)).ok();
        assert_eq!(read("/mnt/nvme1/store=64GiB"), Some(("/mnt/nvme1/store".into(), 64 * GIB)));
        assert_eq!(read("/mnt/a=b=1"), Some(("/mnt/a=b".into(), 1)));
        for bad in ["", "/mnt/nvme1", "=64GiB", "/mnt/nvme1=", "/mnt/nvme1=lots"] {
            assert_eq!(read(bad), None, "{bad}");
        }
    }

    #[test]
    fn validate_names_all_problems_at_once() {
        let config = EngineConfig {
            dram: ByteSize::mib(1),
            load_threads: 0,
            nvme: Some(NvmeConfig {
                region: Some(ByteSize(5)),
                more_drives: vec![
                    "/a=64MiB".parse().expect("a drive"),
                    "/a=1".parse().expect("a drive"),
                    NvmeDrive { path: "".into(), capacity: ByteSize::gib(1) },
                ],
                write_budget: Some(WriteBudget::MilliDriveWritesPerDay(1)),
                reinsert_percent: 51,
                health_interval_s: 9,
                hot_set_interval_s: 0,
                encryption_key_file: Some("/key".into()),
                encryption_key_command: Some("key".into()),
                ..NvmeConfig::new("", ByteSize(1))
            }),
            ..EngineConfig::default()
        };
        let message = config.validate().map_err(|error| error.to_string()).expect_err("refused");
        for part in [
            "dram",
            "load_threads",
            "nvme.path",
            "nvme.region",
            "nvme.capacity",
            "nvme.write_budget",
            "nvme.reinsert_percent",
            "nvme.health_interval_s",
            "nvme.hot_set_interval_s",
            "nvme.encryption_key_file",
            "more_drives[1].capacity",
            "/a, which is listed already",
            "more_drives[2].path is empty",
        ] {
            assert!(message.contains(part), "{part} not in {message}");
        }
        assert!(EngineConfig::default().validate().is_ok());
    }
}
