//! How long a load takes: a fixed time and the slowest of its stages, which run at once: drive, decoder, link.

use super::estimate::{Sample, Taken, TwoTerm};
use super::record::{FoundPrefix, TierSpeeds};

/// The queue at the drives is looked at so often.
const LOOK_S: f64 = 1.0;

/// For so long a look at the queue is all that has to be known of what is in it.
const WATCHED_S: f64 = 5.0;

/// Which stage a load waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Path {
    /// DRAM to GPU.
    Dram,
    /// From the drive; the rest keeps up.
    Drive,
}

/// A load of all that was found.
#[derive(Debug, Clone, Copy)]
pub(super) struct LoadWork {
    link_bytes: f64,
    /// 0 where nothing comes from the drive; with what is queued before it.
    drive_bytes: f64,
    stored_bytes: f64,
}

impl LoadWork {
    pub(super) fn new(found: &FoundPrefix) -> Self {
        let tokens = found.end_token.saturating_sub(found.first_token);
        let in_dram = found.dram_end_token.saturating_sub(found.first_token).min(tokens);
        let stored_bytes = f64::from(tokens - in_dram) * found.stored_bytes_per_token as f64;
        let queued = if tokens > in_dram { found.queued_bytes as f64 } else { 0.0 };
        let link_bytes = f64::from(tokens) * found.link_bytes_per_token as f64;
        Self { link_bytes, drive_bytes: stored_bytes + queued, stored_bytes }
    }

    /// What comes from the drive, as stored.
    pub(super) fn stored_bytes(&self) -> f64 {
        self.stored_bytes
    }
}

#[derive(Debug, Clone)]
pub(super) struct LoadTime {
    /// A fixed time and the link.
    dram: TwoTerm,
    /// A fixed time and the drives.
    drive: TwoTerm,
    decode_s_per_byte: f64,
    told: TierSpeeds,
    /// When the queue at the drives was looked at: the time, what was queued, what had been read.
    looked: Option<(f64, u64, u64)>,
    /// When the drives' speed was last seen so.
    watched_s: f64,
}

impl LoadTime {
    pub(super) fn new() -> Self {
        let floors = [1e-5, 1e-12];
        Self {
            dram: TwoTerm::new([0.003, 1.0 / 20e9], floors, [1.0, 0.1]),
            drive: TwoTerm::new([0.005, 1.0 / 2e9], floors, [1.0, 0.1]),
            decode_s_per_byte: 0.0,
            told: TierSpeeds::default(),
            looked: None,
            watched_s: f64::NEG_INFINITY,
        }
    }

    /// Looks at the queue: where all that was read since the last time was queued then already, the drives were never
    /// idle, and their speed is seen long before a load of minutes ends.
    pub(super) fn look(&mut self, found: &FoundPrefix, now_s: f64) {
        let (queued, read) = (found.queued_bytes, found.drive_read_bytes);
        let Some((then_s, queued_then, read_then)) = self.looked else {
            self.looked = Some((now_s, queued, read));
            return;
        };
        if now_s - then_s < LOOK_S && read.saturating_sub(read_then) < queued_then {
            return;
        }
        self.looked = Some((now_s, queued, read));
        let bytes = read.saturating_sub(read_then);
        if bytes > 0 && bytes < queued_then {
            self.watched_s = now_s;
            self.drive.observe(Sample { x: [0.0, bytes as f64], seconds: now_s - then_s }, 1.0, now_s);
        }
    }

    /// Takes speeds from elsewhere: at first, and whenever they say something else than before.
    pub(super) fn tell(&mut self, speeds: TierSpeeds) {
        let news = |before: u64, now: u64| {
            let factor = now as f64 / before.max(1) as f64;
            (now > 0 && !(1.0 / super::estimate::SURPRISE..=super::estimate::SURPRISE).contains(&factor))
                .then(|| 1.0 / now as f64)
        };
        if let Some(slope) = news(self.told.link_bytes_per_second, speeds.link_bytes_per_second) {
            self.dram.believe(1, slope);
            self.told.link_bytes_per_second = speeds.link_bytes_per_second;
        }
        if let Some(slope) = news(self.told.drive_bytes_per_second, speeds.drive_bytes_per_second) {
            self.drive.believe(1, slope);
            self.told.drive_bytes_per_second = speeds.drive_bytes_per_second;
        }
        if speeds.decode_bytes_per_second > 0 {
            self.decode_s_per_byte = 1.0 / speeds.decode_bytes_per_second as f64;
            self.told.decode_bytes_per_second = speeds.decode_bytes_per_second;
        }
    }

    pub(super) fn predict(&self, work: &LoadWork) -> f64 {
        let link = self.dram.predict([1.0, work.link_bytes]);
        if work.drive_bytes <= 0.0 {
            return link;
        }
        let decode = self.drive.terms()[0] + work.stored_bytes * self.decode_s_per_byte;
        link.max(self.drive.predict([1.0, work.drive_bytes])).max(decode)
    }

    pub(super) fn path(&self, work: &LoadWork) -> Path {
        let link = self.dram.predict([1.0, work.link_bytes]);
        let waits_for_link = work.drive_bytes <= 0.0 || self.drive.predict([1.0, work.drive_bytes]) < link;
        if waits_for_link { Path::Dram } else { Path::Drive }
    }

    /// Whether loads by this path are known from experience or from what somebody else measured.
    pub(super) fn is_known(&self, path: Path) -> bool {
        let told = match path {
            Path::Dram => self.told.link_bytes_per_second,
            Path::Drive => self.told.drive_bytes_per_second,
        };
        told > 0 || self.of(path).has_samples()
    }

    /// Whether a load that has run since then and has not ended says something that is not known otherwise.
    pub(super) fn may_be_late(&self, path: Path, since_s: f64, now_s: f64) -> bool {
        let is_watched = path == Path::Drive && now_s - self.watched_s < WATCHED_S;
        !is_watched && since_s >= self.of(path).changed_s()
    }

    pub(super) fn of(&self, path: Path) -> &TwoTerm {
        match path {
            Path::Dram => &self.dram,
            Path::Drive => &self.drive,
        }
    }

    /// A read of so many bytes, those queued before it included, has ended that was no load.
    pub(super) fn observe_read(&mut self, bytes: f64, seconds: f64, now_s: f64) -> Taken {
        self.drive.observe(Sample { x: [1.0, bytes], seconds }, 1.0, now_s)
    }

    pub(super) fn observe(&mut self, work: &LoadWork, seconds: f64, now_s: f64) -> Taken {
        match self.path(work) {
            Path::Dram if work.drive_bytes > 0.0 && seconds > self.predict(work) * super::estimate::SURPRISE => {
                // Much slower than the link with a drive in it: the drive is to blame.
                self.drive.observe(Sample { x: [1.0, work.drive_bytes], seconds }, 1.0, now_s)
            }
            Path::Dram => self.dram.observe(Sample { x: [1.0, work.link_bytes], seconds }, 1.0, now_s),
            Path::Drive => {
                let decode = self.drive.terms()[0] + work.stored_bytes * self.decode_s_per_byte;
                let by_drive = self.drive.predict([1.0, work.drive_bytes]);
                if decode > by_drive && seconds <= decode * super::estimate::SURPRISE {
                    // The decoder holds it up, so the drive may be of any speed; what was told of the decoder is mended.
                    let per_byte = (seconds - self.drive.terms()[0]) / work.stored_bytes.max(1.0);
                    self.decode_s_per_byte += 0.2 * (per_byte.max(0.0) - self.decode_s_per_byte);
                    return Taken::Usual;
                }
                self.drive.observe(Sample { x: [1.0, work.drive_bytes], seconds }, 1.0, now_s)
            }
        }
    }
}
