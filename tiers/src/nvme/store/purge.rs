//! Purging a namespace: its end is made durable, its key destroyed, its rows taken out of the index. Also what a namespace
//! takes on the drive.

use std::time::Instant;

use super::{Store, closed};
use crate::block::{BlockKey, NamespaceHandle, NamespaceId, RecordId};
use crate::error::{Error, ErrorKind, Result};
use crate::index::{IndexChange, IndexLog, IndexRow};
use crate::nvme::append::Done;

/// Rows that are taken out of the index at once, while commits wait: a few milliseconds.
const ROWS_AT_ONCE: usize = 1024;
/// Rows that are counted between two looks at the limit.
pub(super) const ROWS_COUNTED_AT_ONCE: usize = 8192;

/// What a purge has done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PurgeReport {
    /// Records that were found before and are not any more.
    pub records: u64,
    /// Bytes of these on the drive, headers and padding included.
    pub bytes: u64,
    /// Data keys that were destroyed: 1 in an encrypted store, or 0.
    pub destroyed_keys: u64,
    /// Whether all rows are out of the index. If not, for want of time, nothing is found all the same: the next open takes
    /// them out, or the same call again, and `records` and `bytes` lack what is left.
    pub is_swept: bool,
}

/// What a namespace takes on the drive.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct StoreUse {
    /// Records that the index has. What was not committed yet is not among them; what failed its checks since the last
    /// commit is.
    pub records: u64,
    /// Bytes of these on the drive, headers and padding included, compressed as they are.
    pub bytes: u64,
    /// Whether all rows were counted. If not, there were more than the limit, and these are the first of them.
    pub is_complete: bool,
}

impl Store {
    /// Purges a namespace: nothing of it is found from here on, and that is durable when this returns, whatever becomes of
    /// the index. Saves under its old number fail with `NotFound`, those on their way too. Registered again it is empty and
    /// has another number. In an encrypted store its data key is destroyed, so that nothing that was ever written of it can be
    /// decrypted (see [`Store::destroy_key`] for what that can not do); in any other the bytes stay on the drive, where
    /// nobody looks for them, until their regions are reclaimed and written over. `None` if no such namespace is known.
    ///
    /// # Errors
    /// `InvalidInput` for the namespace of objects. `Timeout` at `deadline`, `Closed`, and what the file system reports, before
    /// the purge is durable: then nothing of the namespace is found until the store is opened again, and it may come
    /// back with that; purge it again.
    pub fn purge(&self, id: &NamespaceId, deadline: Instant) -> Result<Option<PurgeReport>> {
        let index = self.index()?;
        let shared = &self.shared;
        let destroy_key = || shared.keyring.as_ref().map_or(Ok(false), |keyring| keyring.destroy(id));
        let ended = shared.namespaces.end(id, deadline, || self.last_sequence(deadline), destroy_key);
        let ended = ended.inspect_err(|error| {
            if matches!(error.kind(), ErrorKind::NoSpace | ErrorKind::PermissionDenied | ErrorKind::Io) {
                shared.poison("the end of a namespace could not be written", error);
            }
        })?;
        let Some((end, had_key)) = ended else { return Ok(None) };
        let mut report = PurgeReport { destroyed_keys: u64::from(had_key), ..PurgeReport::default() };
        tracing::info!(namespace = %id, handle = end.handle.0, had_key, "a namespace was purged");
        // From here on it is purged: what fails now is done by the next open.
        let swept = index.put_end(&end).and_then(|()| self.sweep(&index, end.handle, deadline, &mut report));
        if let Err(error) = swept {
            tracing::warn!(namespace = %id, error = format!("{error:#}"), "rows of a purged namespace stay until the next open");
        }
        Ok(Some(report))
    }

    /// The highest sequence that a record has which is on its way or was written. Records of what has ended get none after.
    fn last_sequence(&self, deadline: Instant) -> Result<u64> {
        let (sender, receiver) = crossbeam_channel::bounded(1);
        self.shared.inbox.push_sequence_question(Done::new(Box::new(move |result| drop(sender.try_send(result)))));
        match receiver.recv_deadline(deadline) {
            Ok(answer) => answer,
            Err(crossbeam_channel::RecvTimeoutError::Timeout) => {
                let message = "the store did not answer before the deadline; try again with more time";
                Err(Error::new(ErrorKind::Timeout, message))
            }
            Err(crossbeam_channel::RecvTimeoutError::Disconnected) => Err(closed()),
        }
    }

    /// Takes the rows of a namespace that has ended out of the index, piece by piece.
    fn sweep(
        &self,
        index: &IndexLog,
        namespace: NamespaceHandle,
        deadline: Instant,
        report: &mut PurgeReport,
    ) -> Result<()> {
        let mut cursor = first_of(namespace);
        let mut is_over = false;
        while !is_over {
            if Instant::now() >= deadline {
                tracing::warn!(namespace = namespace.0, "the purge ran out of time; the next open ends it");
                return Ok(());
            }
            let mut changes = Vec::new();
            let next = index.scan_after(Some(&cursor), ROWS_AT_ONCE, &mut |row| {
                if row.id.namespace == namespace {
                    report.records += 1;
                    report.bytes += row.location.bytes();
                    changes.push(IndexChange::Remove { id: row.id, sequence: row.sequence });
                }
            })?;
            self.shared.commit(index, &changes, &[], false)?;
            is_over = next.is_none_or(|next| next.namespace != namespace);
            cursor = next.unwrap_or(cursor);
        }
        report.is_swept = true;
        Ok(())
    }

    /// What a namespace takes on the drive: counts rows of the index, at most `rows_max` of them. Reads the drive, about a
    /// million rows a second: not for the path of requests.
    ///
    /// # Errors
    /// `Closed`, and what the index reports.
    pub fn usage(&self, namespace: NamespaceHandle, rows_max: u64) -> Result<StoreUse> {
        let index = self.index()?;
        let mut counted = StoreUse::default();
        let mut cursor = first_of(namespace);
        loop {
            let mut each = |row: IndexRow| {
                if row.id.namespace == namespace {
                    counted.records += 1;
                    counted.bytes += row.location.bytes();
                }
            };
            match index.scan_after(Some(&cursor), ROWS_COUNTED_AT_ONCE, &mut each)? {
                Some(next) if next.namespace == namespace => cursor = next,
                _ => return Ok(StoreUse { is_complete: true, ..counted }),
            }
            if counted.records >= rows_max {
                return Ok(counted);
            }
        }
    }
}

/// Comes before all records of a namespace; none has it.
pub(super) fn first_of(namespace: NamespaceHandle) -> RecordId {
    RecordId { namespace, group: 0, shard: 0, key: BlockKey::ROOT }
}
