//! Bringing namespaces to DRAM when somebody asks for it: what the drive has of them is listed from the index, put in the
//! order of its worth, and goes the way of the hot set. Takes free DRAM only, one at a time, on a thread of its own.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use parking_lot::Mutex;
use pegaflow_tiers::{Arena, Error, ErrorKind, NamespaceHandle, NamespaceId, Result, Store};
use serde::{Deserialize, Serialize};

use super::keep::unix_ms;
use super::rank::rank;
use super::warm::{WarmStep, Warming};
use super::{Candidate, HotSet};
use crate::api::WarmState;
use crate::engine::Engine;
use crate::inner::Inner;
use crate::policy::BlockMemory;

/// Blocks that are put in order at most, and no more than DRAM has room for: about 300 bytes each for that moment.
const BLOCKS_MAX: usize = 1 << 20;
/// Blocks that are listed between two looks whether to go on.
const LOOK_BLOCKS: u64 = 4096;
/// In what a block is worth, bits of its age below those of its uses.
const AGE_BITS: u32 = 60;

/// How the bringing of namespaces to DRAM goes, or went.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WarmRunState {
    /// None was asked for since the engine was opened.
    #[default]
    None,
    /// Its blocks are listed, or read.
    Running,
    /// All of them that the drive has are in DRAM.
    Done,
    /// DRAM has no room for the rest.
    Full,
    /// It was stopped by [`Engine::stop_warming`].
    Stopped,
    /// The store went out of use, or its index could not be read.
    Failed,
}

/// The latest bringing of namespaces to DRAM that was asked for, and how far it is.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct WarmRun {
    /// How it goes.
    pub state: WarmRunState,
    /// Which one it is, from 1 on; 0 before the first.
    pub number: u64,
    /// Namespaces that it is about.
    pub namespaces: u32,
    /// Blocks of these on the drive that DRAM could have room for, all shards of a block as one.
    pub listed_blocks: u64,
    /// Blocks of the list that were looked for; those that were in DRAM already are among them.
    pub seen_blocks: u64,
    /// Of these, blocks that the store does not have any more.
    pub missing_blocks: u64,
    /// Blocks that were read, each shard for itself.
    pub read_blocks: u64,
    /// Bytes of their payloads.
    pub read_bytes: u64,
    /// How long it has taken so far, or took, in ms.
    pub took_ms: u64,
    /// Why it failed.
    pub error: Option<String>,
}

/// What was asked for last.
#[derive(Default)]
pub(crate) struct WarmRuns {
    is_unwanted: AtomicBool,
    known: Mutex<(WarmRun, Option<Instant>)>,
}

impl WarmRuns {
    fn progress(&self) -> WarmRun {
        let known = self.known.lock();
        let (mut run, started) = (known.0.clone(), known.1);
        if run.state == WarmRunState::Running {
            run.took_ms = started.map_or(0, |started| started.elapsed().as_millis() as u64);
        }
        run
    }

    fn is_unwanted(&self) -> bool {
        self.is_unwanted.load(Ordering::Acquire)
    }

    fn begin(&self, namespaces: u32) -> Result<()> {
        let mut known = self.known.lock();
        let WarmRun { state, number, seen_blocks, listed_blocks, .. } = known.0;
        if state == WarmRunState::Running {
            let message = format!(
                "run {number} is bringing blocks to DRAM, {seen_blocks} of {listed_blocks} are done; one goes at a time: wait or stop it"
            );
            return Err(Error::new(ErrorKind::Busy, message));
        }
        let run = WarmRun { state: WarmRunState::Running, number: number + 1, namespaces, ..WarmRun::default() };
        *known = (run, Some(Instant::now()));
        self.is_unwanted.store(false, Ordering::Release);
        Ok(())
    }

    fn note(&self, step: WarmStep) {
        let run = &mut self.known.lock().0;
        match step {
            WarmStep::Missing => run.missing_blocks += 1,
            WarmStep::Came { blocks, bytes } => {
                run.read_blocks += blocks;
                run.read_bytes += bytes;
            }
            WarmStep::At(seen) => run.seen_blocks = seen as u64,
        }
    }

    fn end(&self, state: WarmRunState, error: Option<String>) {
        let mut run = self.progress();
        (run.state, run.error) = (state, error);
        tracing::info!(?run, "namespaces that were asked for are in DRAM, as far as they can be");
        *self.known.lock() = (run, None);
    }
}

impl Engine {
    /// Begins to bring to DRAM what the drive has of these namespaces, or of all if none is given: as much as there is free
    /// room for, the most used blocks first, then the youngest, none without those before it in its chain. Behind everything that
    /// somebody waits for. Goes on by itself; see [`Engine::warming`].
    ///
    /// # Errors
    /// `NotFound` without a store and for a namespace that it does not have, `Busy` while another run goes on or the hot set
    /// of the run before is on its way, `Poisoned` while the store is out of use, `Unsupported` in an encrypted one, `Closed`.
    pub fn start_warming(&self, namespaces: &[NamespaceId]) -> Result<WarmRun> {
        let inner = self.inner()?;
        let store = inner.drive.usable()?;
        if inner.warm_start.progress().state == WarmState::Running {
            let message = "the hot set of the run before is on its way to DRAM; try again when it is there";
            return Err(Error::new(ErrorKind::Busy, message));
        }
        let wanted = wanted(inner, &store, namespaces)?;
        inner.warm_runs.begin(wanted.handles.len() as u32)?;
        let warmer = Arc::clone(inner);
        let started = inner.drive.start_helper("pega-warm", move || {
            warm_as_asked(&warmer, store, &wanted);
            warmer.drive.end_helper();
        });
        started.inspect_err(|error| inner.warm_runs.end(WarmRunState::Failed, Some(format!("{error:#}"))))?;
        self.warming()
    }

    /// Ends the run that was asked for, after what it is reading. That none goes on is no error.
    ///
    /// # Errors
    /// `Closed`.
    pub fn stop_warming(&self) -> Result<WarmRun> {
        self.inner()?.warm_runs.is_unwanted.store(true, Ordering::Release);
        self.warming()
    }

    /// The latest run that was asked for since the engine was opened.
    ///
    /// # Errors
    /// `Closed`.
    pub fn warming(&self) -> Result<WarmRun> {
        Ok(self.inner()?.warm_runs.progress())
    }
}

/// What is to be listed.
struct Wanted {
    handles: Vec<NamespaceHandle>,
    blocks_max: usize,
}

/// The namespaces, as the store knows them, and how many of their blocks DRAM could have.
fn wanted(inner: &Inner, store: &Store, ids: &[NamespaceId]) -> Result<Wanted> {
    if store.is_encrypted() {
        let message = "the index of an encrypted store does not say which blocks there are; they come as they are asked for, \
                       and those that were in DRAM come back at a start";
        return Err(Error::new(ErrorKind::Unsupported, message));
    }
    let is_meant = |id: &NamespaceId| ids.is_empty() || ids.contains(id);
    // Named objects are no chains.
    let rows = store.namespaces().into_iter().filter(|row| row.handle != NamespaceHandle(0));
    let known: Vec<_> = rows.map(|row| (row.descriptor.id(), row)).filter(|(id, _)| is_meant(id)).collect();
    if let Some(unknown) = ids.iter().find(|id| known.iter().all(|(known, _)| known != *id)) {
        let message = format!("the store has no namespace {unknown}");
        return Err(Error::new(ErrorKind::NotFound, message));
    }
    let sizes = known.iter().flat_map(|(_, row)| row.groups.iter().map(|group| group.block_bytes as usize));
    let least = sizes.map(Arena::slot_bytes).min().unwrap_or(1).max(1);
    let fitting = usize::try_from(inner.arena.capacity_bytes()).unwrap_or(usize::MAX) / least;
    let handles = known.into_iter().map(|(_, row)| row.handle).collect();
    Ok(Wanted { handles, blocks_max: fitting.clamp(1, BLOCKS_MAX) })
}

/// The body of the thread.
fn warm_as_asked(inner: &Arc<Inner>, store: Arc<Store>, wanted: &Wanted) {
    let runs = &inner.warm_runs;
    let is_unwanted = || runs.is_unwanted() || inner.is_closed();
    let listed = match list(&store, wanted, &is_unwanted) {
        Ok(listed) => listed,
        Err(error) => return runs.end(WarmRunState::Failed, Some(format!("{error:#}"))),
    };
    runs.known.lock().0.listed_blocks = listed.blocks.len() as u64;
    let note = |step| runs.note(step);
    match Warming::new(inner, store, listed, &note, &is_unwanted).run() {
        Some(WarmState::Full) => runs.end(WarmRunState::Full, None),
        Some(WarmState::Done) => runs.end(WarmRunState::Done, None),
        _ if is_unwanted() => runs.end(WarmRunState::Stopped, None),
        _ => runs.end(WarmRunState::Failed, Some("the store went out of use".into())),
    }
}

/// The blocks of these namespaces, most valuable first.
fn list(store: &Store, wanted: &Wanted, is_unwanted: &dyn Fn() -> bool) -> Result<HotSet> {
    let (mut candidates, mut seen) = (Vec::new(), 0u64);
    for handle in &wanted.handles {
        store.records(*handle, &mut |record| {
            seen += 1;
            if record.id.shard == 0 {
                let age = record.sequence & ((1 << AGE_BITS) - 1);
                candidates.push(Candidate {
                    id: record.id,
                    parent: record.parent,
                    depth: record.depth,
                    value: u64::from(record.uses) << AGE_BITS | age,
                    memory: BlockMemory::default(),
                });
            }
            if candidates.len() >= 2 * wanted.blocks_max {
                keep_best(&mut candidates, wanted.blocks_max);
            }
            seen % LOOK_BLOCKS != 0 || !is_unwanted()
        })?;
    }
    keep_best(&mut candidates, wanted.blocks_max);
    Ok(HotSet { written_unix_ms: unix_ms(), blocks: rank(&candidates, wanted.blocks_max) })
}

/// Keeps as many, those of the highest values.
fn keep_best(candidates: &mut Vec<Candidate>, most: usize) {
    if candidates.len() > most {
        candidates.select_nth_unstable_by(most, |a, b| b.value.cmp(&a.value));
        candidates.truncate(most);
    }
}
