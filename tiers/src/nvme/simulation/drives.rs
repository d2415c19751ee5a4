//! What happens to the drives of a simulated store between and during its lives: one is taken away in the middle of the
//! work, comes back or is retired, joins again, becomes smaller or larger. And what the oracle must expect of that.

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};

use rand::Rng;

use super::history::{History, SimBias};
use super::world::{REGION_BYTES, drive_path};
use crate::nvme::config::DriveConfig;
use crate::nvme::policy::RegionState;

/// Regions of a drive, at least and less than.
const REGIONS: std::ops::Range<u64> = 4..8;
/// Drives besides the home.
const MORE_DRIVES_MAX: usize = 2;

/// The drives of a history.
pub(super) struct Drives {
    path: PathBuf,
    /// How many directories there were so far.
    directories: u64,
    /// Directories of drives that were retired, with what is left on them.
    retired: Vec<PathBuf>,
    /// Which directory each region lies in.
    regions: HashMap<u32, PathBuf>,
    /// Regions that the next open may give up.
    leaving: HashSet<u32>,
    /// The directory of a drive that was taken away.
    lost: Option<PathBuf>,
}

/// How many drives the store of a seed has.
pub(super) fn drives_of(seed: u64, bias: SimBias) -> usize {
    match (seed % 3, bias) {
        (2, _) => 2 + (seed / 3 % 2) as usize,
        (_, SimBias::Drives) => 2,
        _ => 1,
    }
}

impl Drives {
    pub(super) fn new(path: &Path, drives: usize) -> Self {
        Self {
            path: path.to_owned(),
            directories: drives as u64 - 1,
            retired: Vec::new(),
            regions: HashMap::new(),
            leaving: HashSet::new(),
            lost: None,
        }
    }
}

impl History {
    /// Between two lives: a drive is retired, joins, or has another capacity from now on.
    pub(super) fn change_drives(&mut self) {
        let Some(mut drives) = self.drives.take() else { return };
        if !drives.regions.is_empty() {
            self.change(&mut drives);
        }
        self.drives = Some(drives);
    }

    fn change(&mut self, drives: &mut Drives) {
        let lost = drives.lost.take();
        let more = &mut self.world.config.more_drives;
        let is_lost = |drive: &DriveConfig| lost.as_ref() == Some(&drive.path);
        let lost = more.iter().position(is_lost).filter(|_| self.random.random_bool(0.7));
        let chance = self.random.random_range(0..16);
        // Who restores an older index and takes a drive away at once takes away both places that know of a removal.
        let may_retire = !std::mem::take(&mut self.has_older_index);
        match chance {
            _ if lost.is_some() && may_retire => drives.retire(more, lost.unwrap_or(0)),
            0..2 if may_retire && !more.is_empty() => drives.retire(more, self.random.random_range(0..more.len())),
            2..4 if more.len() < MORE_DRIVES_MAX => {
                let known = drives.retired.len();
                let path = if known > 0 && self.random.random_bool(0.7) {
                    drives.retired.swap_remove(self.random.random_range(0..known))
                } else {
                    drives.directories += 1;
                    drive_path(&drives.path, drives.directories)
                };
                let capacity_bytes = self.random.random_range(REGIONS) * REGION_BYTES;
                more.push(DriveConfig { path, capacity_bytes });
                self.tally.joined += 1;
                self.tell(|| "a drive joins".to_owned());
                return;
            }
            4..6 => {
                let drive = self.random.random_range(0..=more.len());
                let capacity_bytes = self.random.random_range(REGIONS) * REGION_BYTES;
                let config = &mut self.world.config;
                let path = match drive.checked_sub(1) {
                    None => {
                        config.capacity_bytes = capacity_bytes;
                        config.path.clone()
                    }
                    Some(number) => {
                        config.more_drives[number].capacity_bytes = capacity_bytes;
                        config.more_drives[number].path.clone()
                    }
                };
                drives.leave(&path);
                self.tally.resized += 1;
                self.tell(|| format!("drive {drive} has {} regions", capacity_bytes / REGION_BYTES));
                return;
            }
            _ => return,
        }
        self.tally.retired += 1;
        self.tell(|| "a drive is retired".to_owned());
    }

    /// In a life: the device of one drive may go.
    pub(super) fn lose_a_drive(&mut self) {
        let Some(drives) = &mut self.drives else { return };
        if self.random.random_ratio(3, 4) {
            return;
        }
        let drive = self.random.random_range(0..=self.world.config.more_drives.len());
        let number = self.world.disk().operations() + self.random.random_range(1..150);
        let Ok(file) = self.world.regions_file(drive) else { return };
        if self.world.disk().remove_at(number, &file).is_ok() {
            drives.lost = self.world.config.drives().nth(drive).map(|(path, _)| path.to_owned());
            self.tell(|| format!("drive {drive} goes with operation {number}"));
        }
    }

    /// After an open: what lies where, and what is over.
    pub(super) fn note_drives(&mut self) {
        let Some(store) = &self.world.store else { return };
        if std::mem::take(&mut self.may_be_rebuilt) {
            let floor = self.world.rebuild_floor();
            self.model.given_up_at(|location| location.generation < floor);
        }
        let infos = store.regions();
        let Some(drives) = &mut self.drives else { return };
        let is_there = |region: u32, generation: u64| {
            infos.iter().any(|info| {
                info.region == region
                    && info.generation == generation
                    && matches!(info.state, RegionState::Open | RegionState::Sealed)
            })
        };
        let leaving = std::mem::take(&mut drives.leaving);
        self.have_left = !leaving.is_empty();
        self.model.given_up_at(|location| {
            leaving.contains(&location.region) && !is_there(location.region, location.generation)
        });
        let paths: Vec<&Path> = self.world.config.drives().map(|(path, _)| path).collect();
        let of = |drive: u32| paths.get(drive as usize).map(|path| (*path).to_owned());
        drives.regions = infos.iter().filter_map(|info| Some((info.region, of(info.drive)?))).collect();
    }
}

impl Drives {
    fn retire(&mut self, more: &mut Vec<DriveConfig>, number: usize) {
        let drive = more.remove(number);
        self.leave(&drive.path);
        self.retired.push(drive.path);
    }

    fn leave(&mut self, path: &Path) {
        self.leaving.extend(self.regions.iter().filter(|(_, of)| *of == path).map(|(region, _)| *region));
    }
}
