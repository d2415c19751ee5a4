//! What the store is asked to write, and the promise to answer exactly once.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use super::encoding::{Encoding, Image, ImageHead};
use super::encryption::{DataKey, Names, Subject};
use super::io::Pages;
use super::page::{PAGE_BYTES, pages_of};
use super::record_header::{DiskIdentity, HeaderKind, RecordHeader};
use super::writer::Reinsert;
use crate::block::{BlockKey, RecordId, RecordKind};
use crate::dram::Slot;
use crate::error::{Error, ErrorKind, Result};
use crate::index::Location;

/// Called exactly once: with the record's place when it is durable and found by lookups, or with why it is neither.
/// Runs on the store's writer thread without any lock; must be short, and must not wait for the store.
pub type AppendDone = Box<dyn FnOnce(Result<Location>) + Send>;

/// A record to be written.
pub struct Append {
    /// Whose it is. Its namespace is registered, or 0 for objects.
    pub id: RecordId,
    /// What it is.
    pub kind: RecordKind,
    /// The key of the block before it; [`BlockKey::ROOT`] for a first block and for objects.
    pub parent: BlockKey,
    /// How many blocks come before it.
    pub depth: u32,
    /// The bytes; `None` for a tombstone. The store writes its header page and may not share it with another write.
    pub slot: Option<Arc<Slot>>,
    /// Bytes of the payload, at most the slot's; 0 for a tombstone.
    pub payload_bytes: u64,
    /// What to call at the end.
    pub done: AppendDone,
}

impl std::fmt::Debug for Append {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Append").field("id", &self.id).field("kind", &self.kind).finish_non_exhaustive()
    }
}

/// A callback that runs exactly once, whatever happens to its owner: with `Closed` if nobody called it.
pub(super) struct Done<T>(Option<Box<dyn FnOnce(Result<T>) + Send>>);

impl<T> Done<T> {
    pub(super) fn new(done: Box<dyn FnOnce(Result<T>) + Send>) -> Self {
        Self(Some(done))
    }

    /// Runs it. A panic in it is logged and goes no further.
    pub(super) fn call(mut self, result: Result<T>) {
        self.run(result);
    }

    /// Takes it back, uncalled.
    pub(super) fn into_inner(mut self) -> Option<Box<dyn FnOnce(Result<T>) + Send>> {
        self.0.take()
    }

    fn run(&mut self, result: Result<T>) {
        if let Some(done) = self.0.take()
            && catch_unwind(AssertUnwindSafe(|| done(result))).is_err()
        {
            tracing::error!("a completion callback of the store panicked");
        }
    }
}

impl<T> Drop for Done<T> {
    fn drop(&mut self) {
        self.run(Err(Error::new(ErrorKind::Closed, "the store was closed before this was done")));
    }
}

/// What a record is sealed with, and as what.
pub(super) struct Sealing {
    pub(super) key: Arc<DataKey>,
    pub(super) subject: Subject,
    pub(super) names: Names,
    /// Bytes of the payload when decoded.
    pub(super) raw_bytes: u64,
}

/// How a record's payload goes to the drive.
pub(super) enum Form {
    /// As it is, out of its slot; in an encrypted store only until the writer has sealed it.
    Stored,
    /// Not known yet.
    Encoding(Arc<Encoding>),
    /// Out of this buffer.
    Encoded(Image),
    /// A copy of a stored record: its image, and what its header says.
    Copied(Pages, Box<RecordHeader>),
    /// The buffer was handed to the drive; until it comes back it counts for the encoders' bound.
    Sent(Option<ImageHead>),
}

/// A record on its way through the writer.
pub(super) struct QueuedRecord {
    pub(super) id: RecordId,
    pub(super) identity: DiskIdentity,
    pub(super) shards: u16,
    pub(super) kind: HeaderKind,
    /// For a tombstone that takes over from an older one: the sequence up to which it hides. Otherwise its own.
    pub(super) hides: Option<u64>,
    pub(super) parent: BlockKey,
    /// In an encrypted store, of a record with a payload: what it is sealed with.
    pub(super) sealing: Option<Arc<Sealing>>,
    pub(super) depth: u32,
    pub(super) slot: Option<Arc<Slot>>,
    pub(super) payload_bytes: u64,
    pub(super) form: Form,
    /// Pages on disk, the header included; known when it is no longer being encoded.
    pub(super) pages: u32,
    /// What it counts for in the bound of the queue; 0 for the store's own.
    pub(super) charged_bytes: u64,
    /// Whether a write of it has failed already.
    pub(super) is_retry: bool,
    /// Whether a region waits to be reclaimed until it is durable.
    pub(super) is_for_reclaim: bool,
    /// What it is a copy of, if its region is about to go.
    pub(super) reinsert: Option<Box<Reinsert>>,
    pub(super) done: Done<Location>,
}

impl QueuedRecord {
    /// A tombstone of the store's own.
    pub(super) fn tombstone(id: RecordId, identity: DiskIdentity, hides: u64, is_for_reclaim: bool) -> Self {
        Self {
            id,
            identity,
            shards: 1,
            kind: HeaderKind::Tombstone,
            hides: Some(hides),
            parent: BlockKey::ROOT,
            sealing: None,
            depth: 0,
            slot: None,
            payload_bytes: 0,
            form: Form::Stored,
            pages: 1,
            charged_bytes: 0,
            is_retry: false,
            is_for_reclaim,
            reinsert: None,
            done: Done::new(Box::new(drop)),
        }
    }

    /// Takes in how it was encoded; whether that is known.
    pub(super) fn settle_form(&mut self) -> bool {
        let Form::Encoding(encoding) = &self.form else { return true };
        let Some(form) = encoding.take() else { return false };
        if let Form::Encoded(image) = &form {
            self.pages = (image.pages.as_slice().len() / PAGE_BYTES) as u32;
        }
        self.form = form;
        true
    }

    /// From now on it goes to the drive as it is.
    pub(super) fn store_plain(&mut self) {
        if !matches!(self.form, Form::Stored) {
            self.form = Form::Stored;
            self.pages = pages_of(self.payload_bytes) as u32 + 1;
        }
    }

    /// The address of the slot if that is what is written: only one write of a slot may be in flight, because each has its
    /// own header.
    pub(super) fn slot_address(&self) -> Option<usize> {
        self.slot.as_ref().filter(|_| matches!(self.form, Form::Stored)).map(|slot| slot.as_ptr().as_ptr() as usize)
    }
}
