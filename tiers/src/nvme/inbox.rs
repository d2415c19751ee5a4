//! What the writer thread is told: records to write, writes and syncs that ended, records to quarantine, questions for its
//! counter. Bounded by bytes; nobody but the writer ever waits here.

use std::collections::VecDeque;
use std::time::Instant;

use parking_lot::{Condvar, Mutex};

use super::append::{Done, QueuedRecord};
use crate::block::RecordId;
use crate::error::{Error, ErrorKind, Result};
use crate::index::Location;

/// Reports of bad records that wait at most; more are only counted, and found again.
const QUARANTINE_MAX: usize = 1024;

/// What waits to be done in its order.
pub(super) enum Entry {
    Record(Box<QueuedRecord>),
    /// Answered when everything before it is durable.
    Flush(Done<()>),
}

/// How the store ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ending {
    /// Everything accepted becomes durable first.
    Drain,
    /// What is not durable fails.
    Abandon,
}

/// All that is worth it of a region has been handed over.
#[derive(Debug, Clone, Copy)]
pub(super) struct Copied {
    pub(super) region: u32,
    pub(super) generation: u64,
    /// How many records.
    pub(super) copies: u64,
}

/// What has happened since the writer last looked.
#[derive(Default)]
pub(super) struct News {
    pub(super) entries: VecDeque<Entry>,
    /// Writes that ended, by sequence.
    pub(super) written: Vec<(u64, Result<()>)>,
    /// Syncs that ended, of one drive each.
    pub(super) synced: Vec<Result<()>>,
    pub(super) bad_records: Vec<(RecordId, Location)>,
    /// Records to write again before their region goes; before all others, since the region is about to be needed.
    pub(super) copies: VecDeque<Box<QueuedRecord>>,
    /// Asked of whoever purges: the highest sequence that was given to a record.
    pub(super) sequence_questions: Vec<Done<u64>>,
    /// The region of which no more copies come.
    pub(super) copied: Option<Copied>,
    pub(super) ending: Option<Ending>,
}

#[derive(Default)]
struct State {
    news: News,
    has_news: bool,
    /// Bytes of records that were accepted and are neither durable nor failed.
    held_bytes: u64,
    is_closed: bool,
    /// Whether the writer waits, or has ended.
    is_idle: bool,
}

/// The writer's inbox.
pub(super) struct Inbox {
    bytes_max: u64,
    state: Mutex<State>,
    changed: Condvar,
    /// The writer has begun to wait. Only simulations listen.
    idle: Condvar,
}

impl Inbox {
    /// An inbox that holds records of at most `bytes_max` bytes that are not durable.
    pub(super) fn new(bytes_max: u64) -> Self {
        Self { bytes_max, state: Mutex::new(State::default()), changed: Condvar::new(), idle: Condvar::new() }
    }

    /// Accepts a record, or gives it back.
    pub(super) fn push_record(&self, record: Box<QueuedRecord>) -> Result<(), (Box<QueuedRecord>, Error)> {
        let mut state = self.state.lock();
        if state.is_closed {
            return Err((record, closed()));
        }
        // A record larger than the whole bound goes alone, or it could never go.
        if state.held_bytes > 0 && state.held_bytes + record.charged_bytes > self.bytes_max {
            let message = format!(
                "{} bytes wait to become durable, {} are the limit; try again when the drive has caught up",
                state.held_bytes, self.bytes_max
            );
            return Err((record, Error::new(ErrorKind::Busy, message)));
        }
        state.held_bytes += record.charged_bytes;
        state.news.entries.push_back(Entry::Record(record));
        self.announce(state);
        Ok(())
    }

    /// Asks for everything before to become durable; `done` is dropped, and with that called, if the store is closed.
    pub(super) fn push_flush(&self, done: Done<()>) {
        let mut state = self.state.lock();
        if state.is_closed {
            drop(state);
            drop(done);
            return;
        }
        state.news.entries.push_back(Entry::Flush(done));
        self.announce(state);
    }

    /// Asks for the highest sequence that was given to a record; `done` is dropped, and with that called, if the store is
    /// closed. Whoever asks holds the file of namespaces, so there is one question at a time.
    pub(super) fn push_sequence_question(&self, done: Done<u64>) {
        let mut state = self.state.lock();
        if state.is_closed {
            drop(state);
            drop(done);
            return;
        }
        state.news.sequence_questions.push(done);
        self.announce(state);
    }

    /// A write ended.
    pub(super) fn push_written(&self, sequence: u64, result: Result<()>) {
        let mut state = self.state.lock();
        state.news.written.push((sequence, result));
        self.announce(state);
    }

    /// A sync ended.
    pub(super) fn push_synced(&self, result: Result<()>) {
        let mut state = self.state.lock();
        state.news.synced.push(result);
        self.announce(state);
    }

    /// A record failed its checks and is no longer found; the log has to forget it too.
    pub(super) fn push_bad_record(&self, id: RecordId, location: Location) {
        let mut state = self.state.lock();
        if !state.is_closed && state.news.bad_records.len() < QUARANTINE_MAX {
            state.news.bad_records.push((id, location));
            self.announce(state);
        }
    }

    /// Accepts a record that is to be written again; whether it did. Whoever pushes bounds how many those are.
    pub(super) fn push_copy(&self, record: Box<QueuedRecord>) -> bool {
        let mut state = self.state.lock();
        if state.is_closed {
            return false;
        }
        state.news.copies.push_back(record);
        self.announce(state);
        true
    }

    /// No more copies of a region come.
    pub(super) fn push_copied(&self, copied: Copied) {
        let mut state = self.state.lock();
        state.news.copied = Some(copied);
        self.announce(state);
    }

    /// Ends the store; a second call can only make the first more urgent.
    pub(super) fn end(&self, ending: Ending) {
        let mut state = self.state.lock();
        state.is_closed = true;
        if state.news.ending != Some(Ending::Abandon) {
            state.news.ending = Some(ending);
        }
        self.announce(state);
    }

    /// Lets the writer look around: something that it waits for may have happened.
    pub(super) fn poke(&self) {
        self.announce(self.state.lock());
    }

    /// Records of so many bytes are durable or have failed.
    pub(super) fn release(&self, bytes: u64) {
        let mut state = self.state.lock();
        state.held_bytes = state.held_bytes.saturating_sub(bytes);
    }

    /// Bytes of records that were accepted and are neither durable nor failed.
    pub(super) fn held_bytes(&self) -> u64 {
        self.state.lock().held_bytes
    }

    /// Waits for news, until `deadline` if there is one.
    pub(super) fn wait(&self, deadline: Option<Instant>) -> News {
        let mut state = self.state.lock();
        while !state.has_news {
            self.note_idle(&mut state);
            match deadline {
                None => self.changed.wait(&mut state),
                Some(deadline) => {
                    if self.changed.wait_until(&mut state, deadline).timed_out() {
                        break;
                    }
                }
            }
        }
        (state.has_news, state.is_idle) = (false, false);
        std::mem::take(&mut state.news)
    }

    /// The writer has ended, and takes no more news.
    pub(super) fn note_ended(&self) {
        let mut state = self.state.lock();
        state.has_news = false;
        self.note_idle(&mut state);
    }

    fn note_idle(&self, state: &mut State) {
        state.is_idle = true;
        if cfg!(any(test, feature = "fault-injection")) {
            self.idle.notify_all();
        }
    }

    /// Waits until the writer waits and there is nothing that it has not looked at; false at `deadline`.
    #[cfg(any(test, feature = "fault-injection"))]
    pub(super) fn wait_idle(&self, deadline: Instant) -> bool {
        let mut state = self.state.lock();
        while state.has_news || !state.is_idle {
            if self.idle.wait_until(&mut state, deadline).timed_out() {
                return false;
            }
        }
        true
    }

    fn announce(&self, mut state: parking_lot::MutexGuard<'_, State>) {
        state.has_news = true;
        drop(state);
        self.changed.notify_one();
    }
}

fn closed() -> Error {
    Error::new(ErrorKind::Closed, "the store is closed")
}
