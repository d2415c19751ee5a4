//! The thread that scrubs the store: reads every record once in a while and checks it, so that decay is found before
//! somebody wants the record. Slow, and only while nobody else asks anything of the drive; rests between two passes. It also
//! runs the scrubs that somebody asks for, one at a time: at once, from the first region on, at a rate of their own.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use parking_lot::Mutex;
use pegaflow_tiers::{Error, ErrorKind, Result, ScrubFrom, ScrubPace, ScrubStep, Store};
use serde::{Deserialize, Serialize};

use crate::config::ByteSize;
use crate::engine::Engine;
use crate::inner::Inner;

/// After an open the drive has other things to do.
const START_PAUSE: Duration = Duration::from_secs(5);
/// From the end of a pass to the beginning of the next one.
const PASS_INTERVAL: Duration = Duration::from_secs(24 * 3600);
/// While somebody uses the drive it is looked again after this time.
const BUSY_PAUSE: Duration = Duration::from_millis(50);
/// A drive that is always in use is scrubbed all the same: one piece after so long.
const BUSY_MAX: Duration = Duration::from_secs(5);

/// While nothing is to be scrubbed it is looked so often whether that has changed.
const OFF_PAUSE: Duration = Duration::from_secs(60);
/// The slowest and the fastest scrub that can be asked for, in bytes a second.
const RATE_MIN: ByteSize = ByteSize(64 << 10);
const RATE_MAX: ByteSize = ByteSize::gib(16);

/// How a scrub that was asked for goes, or went.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ScrubState {
    /// None was asked for since the engine was opened.
    #[default]
    None,
    /// It reads, or is about to.
    Running,
    /// It has seen every record.
    Done,
    /// It was stopped by [`Engine::stop_scrub`].
    Stopped,
    /// The store went out of use, or could not be read.
    Failed,
}

/// The latest scrub that was asked for, and how far it is.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ScrubProgress {
    /// How it goes.
    pub state: ScrubState,
    /// Which one it is, from 1 on; 0 before the first.
    pub number: u64,
    /// The most bytes a second that it reads.
    pub rate_bytes: u64,
    /// Regions that are done, those without records among them.
    pub regions: u32,
    /// Regions of the store.
    pub regions_total: u32,
    /// Records that were checked.
    pub records: u64,
    /// Records of the store when the last piece was read.
    pub records_total: u64,
    /// Bytes that were read.
    pub bytes: u64,
    /// Damaged records; none of them is found any more.
    pub bad_records: u64,
    /// How long it has taken so far, or took, in ms.
    pub took_ms: u64,
    /// Why it failed.
    pub error: Option<String>,
    /// When a scrub last saw every record, asked for or not, in ms since 1970; 0: never.
    pub last_pass_unix_ms: u64,
}

impl ScrubProgress {
    fn note(&mut self, step: &ScrubStep) {
        (self.regions, self.regions_total) = (step.region, step.regions_total);
        (self.records, self.records_total) = (step.records, step.records_total);
        self.bytes += step.bytes;
        self.bad_records = step.corrupt;
    }
}

/// What was asked of the thread.
#[derive(Default)]
pub(crate) struct Scrubs {
    is_wanted: AtomicBool,
    is_unwanted: AtomicBool,
    known: Mutex<(ScrubProgress, Option<Instant>)>,
}

impl Scrubs {
    fn is_wanted(&self) -> bool {
        self.is_wanted.load(Ordering::Acquire)
    }

    fn is_unwanted(&self) -> bool {
        self.is_unwanted.load(Ordering::Acquire)
    }

    fn progress(&self) -> ScrubProgress {
        let known = self.known.lock();
        let (mut progress, started) = (known.0.clone(), known.1);
        if progress.state == ScrubState::Running {
            progress.took_ms = started.map_or(0, |started| started.elapsed().as_millis() as u64);
        }
        progress
    }

    fn begin(&self, rate_bytes: u64) -> Result<()> {
        let mut known = self.known.lock();
        let ScrubProgress { state, number, records, records_total, .. } = known.0;
        if state == ScrubState::Running {
            let message = format!(
                "scrub {number} is running, {records} of {records_total} records are done; one runs at a time: wait or stop it"
            );
            return Err(Error::new(ErrorKind::Busy, message));
        }
        let progress =
            ScrubProgress { state: ScrubState::Running, number: number + 1, rate_bytes, ..ScrubProgress::default() };
        *known = (progress, Some(Instant::now()));
        self.is_unwanted.store(false, Ordering::Release);
        self.is_wanted.store(true, Ordering::Release);
        Ok(())
    }

    fn end(&self, state: ScrubState, error: Option<String>) {
        let mut progress = self.progress();
        if state == ScrubState::Done {
            progress.regions = progress.regions_total;
        }
        (progress.state, progress.error) = (state, error);
        tracing::info!(?progress, "the scrub that was asked for ended");
        *self.known.lock() = (progress, None);
    }
}

impl Engine {
    /// Starts a scrub of the store now: it reads every record and checks it, from the first region on, at most so many bytes a
    /// second, also while others use the drives. Damaged records are found no more. Goes on by itself; see
    /// [`Engine::scrub_progress`].
    ///
    /// # Errors
    /// `InvalidInput` below 64 KiB and above 16 GiB a second, `Busy` while another one that was asked for runs, `NotFound` without a
    /// store, `Poisoned` while it is out of use, `Closed`.
    pub fn start_scrub(&self, bytes_per_second: ByteSize) -> Result<ScrubProgress> {
        let inner = self.inner()?;
        if !(RATE_MIN..=RATE_MAX).contains(&bytes_per_second) {
            let message = format!("a scrub of {bytes_per_second} a second; give {RATE_MIN} to {RATE_MAX}");
            return Err(Error::new(ErrorKind::InvalidInput, message));
        }
        inner.drive.usable()?;
        inner.scrubs.begin(bytes_per_second.0)?;
        inner.drive.wake();
        self.scrub_progress()
    }

    /// Ends the scrub that was asked for, after the piece that it reads. That none runs is no error.
    ///
    /// # Errors
    /// `NotFound` without a store, `Closed`.
    pub fn stop_scrub(&self) -> Result<ScrubProgress> {
        let inner = self.inner()?;
        inner.scrubs.is_unwanted.store(true, Ordering::Release);
        inner.drive.wake();
        self.scrub_progress()
    }

    /// The latest scrub that was asked for since the engine was opened.
    ///
    /// # Errors
    /// `NotFound` without a store, `Closed`.
    pub fn scrub_progress(&self) -> Result<ScrubProgress> {
        let inner = self.inner()?;
        if !inner.drive.is_configured() {
            return Err(Error::new(ErrorKind::NotFound, "there is no store; give a path for one"));
        }
        let last_pass_unix_ms = inner.drive.store().and_then(|store| store.last_scrub_unix_ms().ok()).unwrap_or(0);
        Ok(ScrubProgress { last_pass_unix_ms, ..inner.scrubs.progress() })
    }
}

/// The body of the thread; see [`Inner::scrub_rate`].
pub(crate) fn scrub(inner: &Arc<Inner>) {
    let tier = &inner.drive;
    let mut rest = START_PAUSE;
    while tier.rest(rest, &|| inner.scrubs.is_wanted()) {
        rest = START_PAUSE;
        if inner.scrubs.is_wanted.swap(false, Ordering::AcqRel) {
            scrub_as_asked(inner);
            continue;
        }
        if inner.scrub_rate.load(Ordering::Relaxed) == 0 {
            rest = OFF_PAUSE;
            continue;
        }
        let Some(store) = tier.store().filter(|_| tier.degraded().is_none()) else { continue };
        let last = store.last_scrub_unix_ms().unwrap_or(0);
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64);
        // A clock that was set back must not put it off for ever.
        let due_in = (Duration::from_millis(last) + PASS_INTERVAL).saturating_sub(Duration::from_millis(now));
        if !due_in.is_zero() && last > 0 {
            rest = due_in.min(PASS_INTERVAL);
            continue;
        }
        tier.set_scrubbing(true);
        let scrubbed = store.scrub(ScrubFrom::WhereItWas, &pace(inner, &store));
        tier.set_scrubbing(false);
        match scrubbed {
            Ok(report) if report.is_stopped => {}
            Ok(report) => tracing::info!(?report, "every record of the store was scrubbed"),
            Err(error) => {
                tracing::warn!(%error, "the scrub of the store ended");
                rest = PASS_INTERVAL / 24;
            }
        }
    }
    tier.end_helper();
}

/// Lets the next piece be read when it is due and nobody else uses the drive; stops when another scrub is asked for.
fn pace(inner: &Arc<Inner>, store: &Arc<Store>) -> ScrubPace {
    let (inner, store) = (Arc::clone(inner), Arc::downgrade(store));
    let seen = Mutex::new(0);
    Arc::new(move |step| {
        let tier = &inner.drive;
        let rest = |time| {
            let is_wanted = || inner.scrubs.is_wanted();
            tier.rest(time, &is_wanted) && !is_wanted()
        };
        let nanos = step.bytes.saturating_mul(1_000_000_000).checked_div(inner.scrub_rate.load(Ordering::Relaxed));
        if !nanos.is_some_and(|nanos| rest(Duration::from_nanos(nanos))) {
            return false;
        }
        let busy_until = Instant::now() + BUSY_MAX;
        let mut seen = seen.lock();
        loop {
            let Some(store) = store.upgrade().filter(|_| tier.degraded().is_none()) else { return false };
            let activity = store.activity();
            drop(store);
            if std::mem::replace(&mut *seen, activity) == activity || Instant::now() >= busy_until {
                return true;
            }
            if !rest(BUSY_PAUSE) {
                return false;
            }
        }
    })
}

/// The scrub that somebody waits for.
fn scrub_as_asked(inner: &Arc<Inner>) {
    let tier = &inner.drive;
    tier.set_scrubbing(true);
    let scrubbed = tier.usable().and_then(|store| store.scrub(ScrubFrom::Start, &pace_as_asked(inner)));
    tier.set_scrubbing(false);
    match scrubbed {
        Ok(report) if !report.is_stopped => inner.scrubs.end(ScrubState::Done, None),
        Ok(_) if inner.scrubs.is_unwanted() => inner.scrubs.end(ScrubState::Stopped, None),
        Ok(_) => inner.scrubs.end(ScrubState::Failed, Some("the store went out of use".into())),
        Err(error) => inner.scrubs.end(ScrubState::Failed, Some(format!("{error:#}"))),
    }
}

/// Lets the next piece be read when it is due, whoever else uses the drive.
fn pace_as_asked(inner: &Arc<Inner>) -> ScrubPace {
    let inner = Arc::clone(inner);
    let (started, read) = (Instant::now(), AtomicU64::new(0));
    Arc::new(move |step| {
        let rate = {
            let mut known = inner.scrubs.known.lock();
            known.0.note(step);
            known.0.rate_bytes.max(1)
        };
        let read = read.fetch_add(step.bytes, Ordering::Relaxed) + step.bytes;
        let due = started + Duration::from_secs_f64(read as f64 / rate as f64);
        let is_unwanted = || inner.scrubs.is_unwanted();
        let is_open = inner.drive.rest(due.saturating_duration_since(Instant::now()), &is_unwanted);
        is_open && !is_unwanted() && inner.drive.degraded().is_none()
    })
}
