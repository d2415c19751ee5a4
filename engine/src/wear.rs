//! The health of the drives under the store, asked for now and then by a thread of its own. What they complain of is logged
//! once. Drives that tell nothing are left out: their health is unknown.

use std::collections::HashSet;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use parking_lot::{Condvar, Mutex};
use pegaflow_tiers::{DriveHealth, Error, HealthReader, Result, controllers_of};

use crate::api::DriveWear;

/// What is known of the drives.
#[derive(Default)]
pub(crate) struct Wear {
    drives: Mutex<Vec<DriveWear>>,
    is_closed: Mutex<bool>,
    closed: Condvar,
}

impl Wear {
    /// What was last read; drives of which nothing is known are not in it.
    pub(crate) fn drives(&self) -> Vec<DriveWear> {
        self.drives.lock().clone()
    }

    /// Starts to ask for the drives under these paths, at once and then every `interval`. Without NVMe drives there is no thread.
    ///
    /// # Errors
    /// `Io` if the system gives no thread.
    pub(crate) fn watch(self: &Arc<Self>, paths: &[PathBuf], interval: Duration) -> Result<Option<JoinHandle<()>>> {
        let mut controllers: Vec<String> = paths.iter().flat_map(|path| controllers_of(path)).collect();
        controllers.sort_unstable();
        controllers.dedup();
        if controllers.is_empty() {
            return Ok(None);
        }
        let wear = Arc::clone(self);
        let work = move || {
            let (mut reader, mut told) = (HealthReader::new(), HashSet::new());
            while !*wear.is_closed.lock() {
                wear.take(controllers.iter().map(|name| (name.as_str(), reader.read(name))), &mut told);
                let mut is_closed = wear.is_closed.lock();
                wear.closed.wait_while_for(&mut is_closed, |is_closed| !*is_closed, interval);
            }
        };
        let thread = std::thread::Builder::new().name("pega-wear".into()).spawn(work);
        thread.map(Some).map_err(|source| Error::from_io("starting a thread", source))
    }

    pub(crate) fn close(&self) {
        *self.is_closed.lock() = true;
        self.closed.notify_all();
    }

    /// Keeps what was read, and logs what was not complained of before.
    fn take<'a>(
        &self,
        read: impl Iterator<Item = (&'a str, Result<DriveHealth>)>,
        told: &mut HashSet<(String, String)>,
    ) {
        let mut drives = Vec::new();
        for (name, health) in read {
            let health = match health {
                Ok(health) => health,
                Err(error) => {
                    tracing::debug!(drive = name, %error, "the drive's health is unknown");
                    continue;
                }
            };
            for complaint in health.complaints() {
                if told.insert((name.to_owned(), complaint.clone())) {
                    tracing::warn!(drive = name, used_percent = health.used_percent, "the drive says: {complaint}");
                }
            }
            drives.push(DriveWear {
                drive: name.to_owned(),
                used_percent: health.used_percent,
                spare_percent: health.spare_percent,
                critical_warning: health.critical_warning,
                written_bytes: health.written_bytes,
                media_errors: health.media_errors,
            });
        }
        *self.drives.lock() = drives;
    }
}

#[cfg(test)]
mod tests {
    use pegaflow_tiers::ErrorKind;

    use super::*;

    #[test]
    fn what_is_known_is_kept_and_complaints_are_told_once() {
        let (wear, mut told) = (Wear::default(), HashSet::new());
        let mut page = [0; 512];
        (page[3], page[4], page[5]) = (90, 10, 85);
        let health = DriveHealth::from_log_page(&page).expect("a page");
        let unknown = || Err(Error::new(ErrorKind::Unsupported, "not installed"));
        wear.take([("nvme0", Ok(health)), ("nvme1", unknown())].into_iter(), &mut told);
        assert_eq!(told.len(), 1);
        let worse = DriveHealth { used_percent: 86, ..health };
        wear.take([("nvme0", Ok(worse))].into_iter(), &mut told);
        assert_eq!((told.len(), wear.drives().len(), wear.drives()[0].used_percent), (1, 1, 86));
        wear.take([("nvme0", Ok(DriveHealth { used_percent: 90, ..worse }))].into_iter(), &mut told);
        assert_eq!(told.len(), 2);
        wear.take([("nvme0", unknown())].into_iter(), &mut told);
        assert!(wear.drives().is_empty());
    }

    #[test]
    fn a_path_that_is_nowhere_has_no_drives_and_no_thread() {
        let wear = Arc::new(Wear::default());
        assert!(wear.watch(&["/proc".into()], Duration::from_secs(1)).expect("no error").is_none());
    }
}
