//! How rows of the durable index get into the table: the first ones while the store is opened, the rest on a thread of
//! their own while it already works. Until the table has them all, what it does not have is asked of the log.
//!
//! One rule keeps both halves of the index in agreement: whoever copies rows from the log into the table holds `source`
//! shared, from the read to the insertion; whoever changes the log and then the table ([`Shared::commit`]) holds it
//! alone. So a copied row is what the log says at that moment, and can neither undo a newer row nor a removal.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex, RwLock};

use super::recovery::distrust;
use super::region_header::HEADER_SLOTS;
use super::shared::Shared;
use super::switches::is_off;
use crate::block::RecordId;
use crate::error::{Error, ErrorKind, Result};
use crate::index::{IndexChange, IndexLog, IndexRow, Location, RegionMark};

/// Rows that an open reads before it returns: a small store is complete when it is open.
const ROWS_AT_OPEN: usize = 1 << 16;
/// Rows that are read while commits wait, a few milliseconds.
const ROWS_AT_ONCE: usize = 8192;
/// Rows that point to nothing and are removed from the log, at most, in one open.
const DROPPED_MAX: usize = 4096;
/// Records that one lookup asks of the log at most: about 100 ms. What comes after them is a miss.
const ASKED_MAX: usize = 4096;
/// The records of a lookup that are asked of the log together, first and later: most unknown prompts end at the first.
const FIRST_ASKED: usize = 16;
const ASKED_AT_ONCE: usize = 256;
/// How often the log says how far it is.
const REPORT_INTERVAL: Duration = Duration::from_secs(2);

/// How far the table of an open store is filled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct IndexFill {
    /// Whether lookups are answered by the table alone. As long as they are not they are right, and slower.
    pub is_full: bool,
    /// Whether it came to an end early, because the log is damaged: lookups go on asking it, and the index is made anew
    /// from the regions when the store is opened next.
    pub has_failed: bool,
    /// Rows of the log that were read.
    pub rows: u64,
    /// Rows that the log has; an estimate until the table is full.
    pub rows_total: u64,
    /// Rows that pointed to nothing any more.
    pub dropped_rows: u64,
    /// How long it took, or has taken so far.
    pub elapsed: Duration,
}

/// How much is read when.
pub(super) struct FillPlan {
    pub(super) rows_at_open: usize,
    pub(super) rows_at_once: usize,
    /// Called before each step in the background.
    pub(super) before_step: Box<dyn Fn() + Send + Sync>,
    /// Called in a step, with the row that was read and is not in the table yet.
    pub(super) on_row: fn(&IndexRow),
}

impl Default for FillPlan {
    fn default() -> Self {
        Self { rows_at_open: ROWS_AT_OPEN, rows_at_once: ROWS_AT_ONCE, before_step: Box::new(|| {}), on_row: |_| {} }
    }
}

/// The state of filling.
pub(super) struct Fill {
    plan: FillPlan,
    /// The log, as long as the table does not have all of its rows.
    source: RwLock<Option<Arc<IndexLog>>>,
    /// As `source` says, for those who would rather not wait.
    is_filling: AtomicBool,
    is_stopping: AtomicBool,
    state: Mutex<State>,
    /// It has ended, in one way or another.
    ended: Condvar,
}

struct State {
    began: Option<Instant>,
    /// The last row that was read.
    cursor: Option<RecordId>,
    progress: IndexFill,
    has_ended: bool,
}

impl State {
    /// Nothing is missing.
    fn full() -> Self {
        let progress = IndexFill { is_full: true, ..IndexFill::default() };
        Self { began: None, cursor: None, progress, has_ended: true }
    }

    fn beginning(rows_total: u64) -> Self {
        let progress = IndexFill { rows_total, ..IndexFill::default() };
        Self { began: Some(Instant::now()), cursor: None, progress, has_ended: false }
    }
}

impl Fill {
    pub(super) fn new(plan: FillPlan) -> Self {
        Self {
            plan,
            source: RwLock::new(None),
            is_filling: AtomicBool::new(false),
            is_stopping: AtomicBool::new(false),
            state: Mutex::new(State::full()),
            ended: Condvar::new(),
        }
    }

    /// How far it is.
    pub(super) fn progress(&self) -> IndexFill {
        let state = self.state.lock();
        let elapsed = state.began.filter(|_| !state.has_ended).map(|began| began.elapsed());
        IndexFill { elapsed: elapsed.unwrap_or(state.progress.elapsed), ..state.progress }
    }

    /// Waits until it has ended, in one way or another.
    pub(super) fn wait(&self) {
        let mut state = self.state.lock();
        self.ended.wait_while(&mut state, |state| !state.has_ended);
    }

    /// The thread is to end after the step that it is in. Lookups go on asking the log.
    pub(super) fn stop(&self) {
        self.is_stopping.store(true, Ordering::Relaxed);
    }

    /// Gives up the log: from now on lookups find what the table has.
    pub(super) fn let_go(&self) {
        *self.source.write() = None;
    }

    fn end(&self, is_full: bool, has_failed: bool) {
        if is_full {
            self.is_filling.store(false, Ordering::Release);
            self.let_go();
        }
        let mut state = self.state.lock();
        state.has_ended = true;
        state.progress.elapsed = state.began.map_or(Duration::ZERO, |began| began.elapsed());
        (state.progress.is_full, state.progress.has_failed) = (is_full, has_failed);
        if is_full {
            state.progress.rows_total = state.progress.rows;
        }
        self.ended.notify_all();
    }
}

/// Begins to fill the table, which is empty: reads the first rows of `index`. [`go_on`] reads the rest.
///
/// # Errors
/// What the log reports; it is then as if nothing had begun, but for what is in the table.
pub(super) fn begin(shared: &Shared, index: &Arc<IndexLog>) -> Result<()> {
    let fill = &shared.fill;
    *fill.source.write() = Some(Arc::clone(index));
    fill.is_filling.store(true, Ordering::Release);
    *fill.state.lock() = State::beginning(index.rows_estimate());
    let is_full = step(shared, fill.plan.rows_at_open).inspect_err(|_| {
        fill.is_filling.store(false, Ordering::Release);
        fill.let_go();
        *fill.state.lock() = State::full();
    })?;
    if is_full {
        fill.end(true, false);
    }
    Ok(())
}

/// Starts the thread that fills the table further, if need be.
///
/// # Errors
/// `Io` if the system gives no thread.
pub(super) fn go_on(shared: &Arc<Shared>) -> Result<Option<JoinHandle<()>>> {
    if !shared.fill.is_filling.load(Ordering::Acquire) {
        return Ok(None);
    }
    let shared = Arc::clone(shared);
    let work = move || {
        let run = catch_unwind(AssertUnwindSafe(|| run(&shared)));
        let result = run.unwrap_or_else(|_| Err(Error::new(ErrorKind::Io, "the thread that fills the index panicked")));
        match result {
            Ok(is_full) => {
                shared.fill.end(is_full, false);
                let IndexFill { rows, elapsed, .. } = shared.fill.progress();
                tracing::info!(rows, ?elapsed, is_full, "the index in memory is filled as far as the store was open");
            }
            Err(error) => give_up(&shared, &error),
        }
    };
    let thread = std::thread::Builder::new().name("pega-index-fill".into()).spawn(work);
    thread.map(Some).map_err(|source| Error::from_io("starting the thread that fills the index", source))
}

/// Reads what is left; whether that is done, and not just the store closed.
fn run(shared: &Shared) -> Result<bool> {
    let mut reported = Instant::now();
    while !shared.fill.is_stopping.load(Ordering::Relaxed) {
        (shared.fill.plan.before_step)();
        if step(shared, shared.fill.plan.rows_at_once)? {
            return Ok(true);
        }
        if reported.elapsed() >= REPORT_INTERVAL {
            reported = Instant::now();
            let IndexFill { rows, rows_total, .. } = shared.fill.progress();
            tracing::info!(rows, rows_total, "the index in memory is being filled");
        }
    }
    Ok(false)
}

/// Copies the next rows; whether those were the last.
fn step(shared: &Shared, limit: usize) -> Result<bool> {
    let cursor = shared.fill.state.lock().cursor;
    let source = shared.fill.source.read();
    let Some(index) = source.as_ref() else { return Ok(true) };
    let mut rows = 0;
    let (mut dropped, mut purged) = (Vec::new(), Vec::new());
    let next = index.scan_after(cursor.as_ref(), limit, &mut |row| {
        (shared.fill.plan.on_row)(&row);
        rows += 1;
        if copy(shared, &row).is_none() {
            // What a purge has left nobody takes out but this; what a reclaimed region has left goes in time.
            let is_purged = shared.namespaces.is_ended(row.id.namespace);
            let removed = if is_purged { &mut purged } else { &mut dropped };
            removed.push(IndexChange::Remove { id: row.id, sequence: row.sequence });
        }
    })?;
    let mut state = shared.fill.state.lock();
    let room = DROPPED_MAX.saturating_sub(state.progress.dropped_rows as usize);
    state.cursor = next;
    state.progress.rows += rows;
    state.progress.rows_total = state.progress.rows_total.max(state.progress.rows);
    state.progress.dropped_rows += (dropped.len() + purged.len()) as u64;
    drop(state);
    dropped.truncate(room);
    dropped.append(&mut purged);
    index.commit(&dropped, &[])?;
    Ok(next.is_none())
}

/// Puts a row of the log into the table; `None` if it points to nothing any more.
fn copy(shared: &Shared, row: &IndexRow) -> Option<Location> {
    let Location { region, page, pages, .. } = row.location;
    let is_inside = page >= HEADER_SLOTS && page + pages <= shared.drive.region_pages();
    let is_live = shared.namespaces.is_live(row.id.namespace) || is_off!(BelievePurged);
    let location = Some(row.location).filter(|location| is_live && is_inside && shared.regions.holds(location))?;
    shared.point_to(&row.id, row.parent, location);
    shared.regions.set_used(region, page + pages);
    Some(location)
}

/// The log can not be read to its end. What lookups ask of it may still be readable; the next open starts anew.
fn give_up(shared: &Shared, error: &Error) {
    let why = format!("{error:#}");
    tracing::error!(why, "the index is damaged: lookups are slower and may miss until the store is opened again");
    if error.kind() == ErrorKind::Corrupt
        && let Some(index) = shared.fill.source.read().as_ref()
        && let Err(error) = distrust(index)
    {
        tracing::warn!(%error, "the damage could not be noted in the index");
    }
    shared.fill.end(false, true);
}

impl Shared {
    /// Applies changes and marks to `index`, and with that to lookups: all of them, or none in the case of an error. With
    /// `is_synced` they survive a power loss before anybody finds them.
    ///
    /// # Errors
    /// What the index reports.
    pub(super) fn commit(
        &self,
        index: &IndexLog,
        changes: &[IndexChange],
        marks: &[RegionMark],
        is_synced: bool,
    ) -> Result<()> {
        let _alone = self.fill.source.write();
        index.commit(changes, marks)?;
        if is_synced {
            index.sync()?;
        }
        self.publish(index, changes)
    }

    /// Where a record lies, if it is there.
    ///
    /// # Errors
    /// What the log reports, while the table is being filled.
    pub(super) fn try_locate(&self, id: &RecordId) -> Result<Option<Location>> {
        Ok(self.try_find(id)?.and_then(|location| self.regions.resolve(location)))
    }

    /// Whether a record is there, or was and may be again: its region is being given up, which may not succeed, or not
    /// outlive a crash.
    ///
    /// # Errors
    /// As [`Shared::try_locate`].
    pub(super) fn may_be_there(&self, id: &RecordId) -> Result<bool> {
        Ok(self.try_find(id)?.is_some_and(|location| self.regions.may_hold(&location)))
    }

    /// What the index has for a record; the region may be over.
    fn try_find(&self, id: &RecordId) -> Result<Option<Location>> {
        let is_filling = self.fill.is_filling.load(Ordering::Acquire);
        match self.table.get(id.fingerprint()) {
            None if is_filling => Ok(self.ask(&[*id])?.pop().flatten()),
            known => Ok(known),
        }
    }

    /// As [`Shared::try_locate`]; what the log can not say is not there.
    pub(super) fn locate(&self, id: &RecordId) -> Option<Location> {
        self.try_locate(id).unwrap_or_else(|error| {
            tracing::debug!(%error, "the index could not say where a record is");
            None
        })
    }

    /// Clears `out` and fills it with what the index has for the longest run of records, from the first on; regions may
    /// be over.
    pub(super) fn locate_prefix(&self, ids: &[RecordId], out: &mut Vec<Location>) {
        let is_filling = self.fill.is_filling.load(Ordering::Acquire);
        self.table.prefix(ids.iter().map(RecordId::fingerprint), out);
        let (mut at_once, mut left) = (FIRST_ASKED, ASKED_MAX);
        while is_filling && out.len() < ids.len() && left > 0 {
            let rest = ids.get(out.len()..).unwrap_or_default();
            let now = rest.get(..at_once.min(left)).unwrap_or(rest);
            let mut found: Vec<_> = now.iter().map(|id| self.table.get(id.fingerprint())).collect();
            let missing: Vec<RecordId> =
                now.iter().zip(&found).filter(|(_, found)| found.is_none()).map(|(id, _)| *id).collect();
            left -= missing.len().min(left);
            let mut asked = self.ask(&missing).unwrap_or_default().into_iter();
            for place in found.iter_mut().filter(|place| place.is_none()) {
                *place = asked.next().flatten();
            }
            let run = found.iter().map_while(|place| *place);
            let before = out.len();
            out.extend(run);
            if out.len() - before < now.len() {
                return;
            }
            at_once = ASKED_AT_ONCE;
        }
    }

    /// What the log says of records that the table does not have; it has them from now on.
    fn ask(&self, ids: &[RecordId]) -> Result<Vec<Option<Location>>> {
        let source = self.fill.source.read();
        match source.as_ref() {
            // Filled meanwhile.
            None => Ok(ids.iter().map(|id| self.table.get(id.fingerprint())).collect()),
            Some(index) => {
                let rows = index.get_many(ids)?;
                Ok(rows.into_iter().map(|row| row.and_then(|row| copy(self, &row))).collect())
            }
        }
    }
}
