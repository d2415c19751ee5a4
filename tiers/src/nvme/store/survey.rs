//! The records of a namespace as the index has them: for whoever wants them elsewhere, and has not been told of them.

use super::Store;
use super::purge::{ROWS_COUNTED_AT_ONCE, first_of};
use crate::block::{BlockKey, NamespaceHandle, RecordId};
use crate::error::{Error, ErrorKind, Result};
use crate::index::IndexRow;

/// A record that the index has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KnownRecord {
    /// Which one it is.
    pub id: RecordId,
    /// The key of the block before it.
    pub parent: BlockKey,
    /// How many blocks come before it.
    pub depth: u32,
    /// How often it was used since the store was opened, up to 15; half of that is forgotten whenever it is written again.
    pub uses: u8,
    /// Its number in the order of all appends to the store.
    pub sequence: u64,
}

impl Store {
    /// Calls `each` with every record of a namespace that the index has, in the order of their keys, until it says no. What was
    /// saved within the commit interval is not among them. Reads the drive, about a million rows a second.
    ///
    /// # Errors
    /// `Unsupported` in an encrypted store, whose index has names instead of keys; `Closed`, and what the index reports.
    pub fn records(&self, namespace: NamespaceHandle, each: &mut dyn FnMut(&KnownRecord) -> bool) -> Result<()> {
        if self.is_encrypted() {
            let message = "the index of an encrypted store does not say which blocks there are, only their records do";
            return Err(Error::new(ErrorKind::Unsupported, message));
        }
        let index = self.index()?;
        let mut cursor = first_of(namespace);
        loop {
            let mut is_wanted = true;
            let mut each_row = |row: IndexRow| {
                if row.id.namespace == namespace && is_wanted {
                    let IndexRow { id, parent, depth, sequence, .. } = row;
                    let uses = self.shared.table.uses(id.fingerprint()).map_or(0, |uses| uses.count());
                    is_wanted = each(&KnownRecord { id, parent, depth, uses, sequence });
                }
            };
            match index.scan_after(Some(&cursor), ROWS_COUNTED_AT_ONCE, &mut each_row)? {
                Some(next) if next.namespace == namespace && is_wanted => cursor = next,
                _ => return Ok(()),
            }
        }
    }
}
