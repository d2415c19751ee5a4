//! The file `calibration.json` in the home: what was measured, for the next open. Nothing depends on it: what is damaged,
//! too old, or of another drive, kernel or configuration is not believed, and measured again. `docs/format.md` describes it.

use std::fs::{self, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::xxh3_64;

/// The version of the file.
const VERSION: u32 = 1;
/// A longer file is not ours.
const BYTES_MAX: u64 = 256 << 10;

/// The file.
#[derive(Serialize, Deserialize)]
struct CacheFile {
    version: u32,
    /// Of `drives` as it is written here, in hexadecimal digits.
    xxh3: String,
    drives: Vec<CachedDrive>,
}

/// What is known of a drive.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct CachedDrive {
    /// Which drive of which store, and on which device.
    pub(super) identity: String,
    /// What else it depends on: kernel, engine, queue depth.
    pub(super) settings: String,
    /// When it was measured, in milliseconds since 1970; 0 if it never was.
    pub(super) measured_unix_ms: u64,
    /// Bytes per second that it is read with at its best; 0 while not known, and so are all others.
    pub(super) read_bytes_per_second: u64,
    /// Bytes per second that it is written with at its best.
    pub(super) write_bytes_per_second: u64,
    /// Bytes in flight that it is read with.
    pub(super) read_depth_bytes: u64,
    /// How long runs of neighbouring reads become.
    pub(super) read_request_bytes: u64,
}

/// Milliseconds since 1970.
pub(super) fn now_unix_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64)
}

impl CachedDrive {
    /// Whether it speaks of this drive under these settings, and is neither too old nor of the future.
    pub(super) fn holds(&self, identity: &str, settings: &str, age_max: Duration) -> bool {
        let age = now_unix_ms().checked_sub(self.measured_unix_ms);
        self.identity == identity
            && self.settings == settings
            && age.is_some_and(|age| u128::from(age) <= age_max.as_millis())
    }
}

/// What the file says; nothing if there is none, or it is damaged.
pub(super) fn load(path: &Path) -> Vec<CachedDrive> {
    match read(path) {
        Ok(drives) => drives,
        Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
        Err(error) => {
            tracing::info!(path = %path.display(), %error, "what was measured of the drives is not believed");
            Vec::new()
        }
    }
}

fn read(path: &Path) -> io::Result<Vec<CachedDrive>> {
    let mut text = String::new();
    fs::File::open(path)?.take(BYTES_MAX).read_to_string(&mut text)?;
    let file: CacheFile = serde_json::from_str(&text)?;
    if file.version != VERSION || file.xxh3 != checksum(&file.drives)? {
        return Err(io::Error::other("another version, or damaged"));
    }
    Ok(file.drives)
}

fn checksum(drives: &[CachedDrive]) -> io::Result<String> {
    Ok(format!("{:016x}", xxh3_64(&serde_json::to_vec(drives)?)))
}

/// Writes the file anew. It is not synced: what a crash leaves of it is damaged or whole.
///
/// # Errors
/// What the file system reports.
pub(super) fn save(path: &Path, drives: Vec<CachedDrive>) -> io::Result<()> {
    let file = CacheFile { version: VERSION, xxh3: checksum(&drives)?, drives };
    let mut text = serde_json::to_vec_pretty(&file)?;
    text.push(b'\n');
    let new = path.with_extension("json.new");
    let opened = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&new);
    opened.and_then(|mut file| file.write_all(&text)).and_then(|()| fs::rename(&new, path))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn drive() -> CachedDrive {
        CachedDrive {
            identity: "a store, its home, on 259:1".into(),
            settings: "6.8.0 io_uring 64".into(),
            measured_unix_ms: now_unix_ms(),
            read_bytes_per_second: 7_000_000_000,
            write_bytes_per_second: 0,
            read_depth_bytes: 8 << 20,
            read_request_bytes: 1 << 20,
        }
    }

    #[test]
    fn what_was_saved_comes_back_and_no_damage_is_believed() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("calibration.json");
        assert!(load(&path).is_empty());
        save(&path, vec![drive()]).expect("saved");
        let saved = load(&path);
        assert_eq!((saved.len(), saved[0].read_depth_bytes), (1, 8 << 20));
        let text = fs::read(&path).expect("there");
        for place in 0..text.len() {
            for bit in 0..8 {
                let mut damaged = text.clone();
                damaged[place] ^= 1 << bit;
                fs::write(&path, &damaged).expect("written");
                // White space, and letters of names that JSON may write otherwise, mean the same.
                assert!(load(&path).iter().all(|drive| *drive == saved[0]), "byte {place}, bit {bit}");
            }
        }
        for length in 0..text.len() - 2 {
            fs::write(&path, &text[..length]).expect("written");
            assert!(load(&path).is_empty(), "{length} bytes");
        }
    }

    #[test]
    fn what_is_old_or_of_something_else_does_not_hold() {
        let (drive, day) = (drive(), Duration::from_secs(24 * 3600));
        let (identity, settings) = (drive.identity.clone(), drive.settings.clone());
        assert!(drive.holds(&identity, &settings, day));
        assert!(!drive.holds("another", &settings, day) && !drive.holds(&identity, "6.9.0 io_uring 64", day));
        let at = |measured_unix_ms| CachedDrive { measured_unix_ms, ..drive.clone() };
        let now = now_unix_ms();
        assert!(at(now - 23 * 3_600_000).holds(&identity, &settings, day));
        assert!(!at(now - 25 * 3_600_000).holds(&identity, &settings, day));
        assert!(!at(now + 3_600_000).holds(&identity, &settings, day));
    }
}
