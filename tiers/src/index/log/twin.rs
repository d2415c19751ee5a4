//! The simulated twin of RocksDB: rows in memory, and the batches since the last durable one. A power loss keeps a prefix
//! of those, as RocksDB's write-ahead log does: what is left is the state after one of the batches.

use std::collections::BTreeMap;
use std::ops::Bound;
use std::sync::Arc;

use parking_lot::Mutex;

use super::IndexLog;
use super::database::{Batch, Database, Durability, EachRow, EachUntil, Family};
use super::reclaimed::Generations;
use crate::error::Result;

/// Asked before each operation of the twin, so that power can be cut and faults injected there.
pub(crate) trait TwinEvents: Send + Sync {
    /// A read or a write is about to happen, or does not if this fails.
    ///
    /// # Errors
    /// What the operation is to report.
    fn before(&self, is_write: bool) -> Result<()>;
}

type Rows = BTreeMap<(Family, Vec<u8>), Vec<u8>>;

/// One database that outlives the processes that open it. Cloning shares.
#[derive(Clone, Default)]
pub(crate) struct TwinIndex(Arc<Mutex<State>>);

#[derive(Default)]
struct State {
    durable: Rows,
    live: Rows,
    /// Batches since the last durable one, the oldest first.
    since: Vec<Batch>,
    /// It was cleared, and nobody has asked since.
    is_new: bool,
}

impl TwinIndex {
    /// Opens it as the log of a store.
    ///
    /// # Errors
    /// What `events` report.
    pub(crate) fn open(&self, events: Arc<dyn TwinEvents>) -> Result<IndexLog> {
        events.before(true)?;
        IndexLog::over(Arc::new(Open { twin: self.clone(), events }), Generations::default())
    }

    /// The power goes: of the batches since the last durable one the first `choose(how many)` are left.
    pub(crate) fn lose_power(&self, choose: impl FnOnce(usize) -> usize) {
        let mut state = self.0.lock();
        let since = std::mem::take(&mut state.since);
        let kept = choose(since.len());
        for batch in since.iter().take(kept) {
            apply(&mut state.durable, batch);
        }
        state.live = state.durable.clone();
    }

    /// The same rows in a database of their own, as a copy of the files would have them.
    pub(crate) fn copy(&self) -> Self {
        let live = self.0.lock().live.clone();
        Self(Arc::new(Mutex::new(State { durable: live.clone(), live, ..State::default() })))
    }

    /// A copy takes its place, durably.
    pub(crate) fn restore(&self, copy: &Self) {
        let live = copy.0.lock().live.clone();
        *self.0.lock() = State { durable: live.clone(), live, ..State::default() };
    }

    /// Everything is gone.
    pub(crate) fn clear(&self) {
        *self.0.lock() = State { is_new: true, ..State::default() };
    }

    /// Whether it was cleared since the last [`Self::note_seen`], and has a value under a name again.
    pub(crate) fn is_new_with(&self, name: &str) -> bool {
        let state = self.0.lock();
        state.is_new && state.live.contains_key(&(Family::Meta, name.as_bytes().to_vec()))
    }

    /// What it holds is known now.
    pub(crate) fn note_seen(&self) {
        self.0.lock().is_new = false;
    }
}

fn apply(rows: &mut Rows, batch: &Batch) {
    for (family, key, value) in batch.changes() {
        match value {
            Some(value) => drop(rows.insert((family, key.to_vec()), value.to_vec())),
            None => drop(rows.remove(&(family, key.to_vec()))),
        }
    }
}

impl State {
    fn make_durable(&mut self) {
        for batch in std::mem::take(&mut self.since) {
            apply(&mut self.durable, &batch);
        }
    }
}

/// The twin as one process has it open.
struct Open {
    twin: TwinIndex,
    events: Arc<dyn TwinEvents>,
}

impl Database for Open {
    fn get(&self, family: Family, key: &[u8]) -> Result<Option<Vec<u8>>> {
        self.events.before(false)?;
        Ok(self.twin.0.lock().live.get(&(family, key.to_vec())).cloned())
    }

    fn for_each(&self, family: Family, each: EachRow<'_>) -> Result<()> {
        self.events.before(false)?;
        let rows: Vec<(Vec<u8>, Vec<u8>)> = {
            let state = self.twin.0.lock();
            let of_family = state.live.range((family, Vec::new())..).take_while(|((of, _), _)| *of == family);
            of_family.map(|((_, key), value)| (key.clone(), value.clone())).collect()
        };
        rows.iter().try_for_each(|(key, value)| each(key, value))
    }

    fn get_many(&self, family: Family, keys: &[&[u8]]) -> Result<Vec<Option<Vec<u8>>>> {
        keys.iter().map(|key| self.get(family, key)).collect()
    }

    fn for_some(&self, family: Family, after: Option<&[u8]>, _about: usize, each: EachUntil<'_>) -> Result<()> {
        self.events.before(false)?;
        let from = match after {
            None => Bound::Included((family, Vec::new())),
            Some(key) => Bound::Excluded((family, key.to_vec())),
        };
        let rows: Vec<(Vec<u8>, Vec<u8>)> = {
            let state = self.twin.0.lock();
            let behind = state.live.range((from, Bound::Unbounded)).take_while(|((of, _), _)| *of == family);
            behind.map(|((_, key), value)| (key.clone(), value.clone())).collect()
        };
        for (key, value) in &rows {
            if each(key, value)?.is_break() {
                break;
            }
        }
        Ok(())
    }

    fn rows_estimate(&self, family: Family) -> u64 {
        self.twin.0.lock().live.keys().filter(|(of, _)| *of == family).count() as u64
    }

    fn memory_bytes(&self) -> u64 {
        0
    }

    fn write(&self, batch: Batch, durability: Durability) -> Result<()> {
        self.events.before(true)?;
        let mut state = self.twin.0.lock();
        apply(&mut state.live, &batch);
        state.since.push(batch);
        drop(state);
        if durability == Durability::Medium { self.sync() } else { Ok(()) }
    }

    fn sync(&self) -> Result<()> {
        self.events.before(true)?;
        self.twin.0.lock().make_durable();
        Ok(())
    }

    fn flush(&self) -> Result<()> {
        self.sync()
    }

    fn end(&self) {}
}
