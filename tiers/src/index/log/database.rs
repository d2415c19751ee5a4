//! The seam between what the index means and what keeps its bytes: sorted rows in a few families, changed in batches that
//! are applied whole or not at all. After a power loss what is there is the state after one of the batches, not before
//! the last durable one.

use std::ops::ControlFlow;

use crate::error::Result;

/// The column families, besides the default one.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) enum Family {
    Records,
    Namespaces,
    Regions,
    Meta,
}

impl Family {
    pub(super) const ALL: [Self; 4] = [Self::Records, Self::Namespaces, Self::Regions, Self::Meta];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Records => "records",
            Self::Namespaces => "namespaces",
            Self::Regions => "regions",
            Self::Meta => "meta",
        }
    }
}

/// What a write survives when it has returned.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Durability {
    /// The end of the process.
    Process,
    /// A power loss; so does everything written before.
    Medium,
}

/// Changes that are applied together, in their order.
#[derive(Default)]
pub(super) struct Batch {
    changes: Vec<(Family, Vec<u8>, Option<Vec<u8>>)>,
}

impl Batch {
    /// Keeps a value under a key.
    pub(super) fn put(&mut self, family: Family, key: &[u8], value: &[u8]) {
        self.changes.push((family, key.to_vec(), Some(value.to_vec())));
    }

    /// Forgets a key.
    pub(super) fn delete(&mut self, family: Family, key: &[u8]) {
        self.changes.push((family, key.to_vec(), None));
    }

    pub(super) fn is_empty(&self) -> bool {
        self.changes.is_empty()
    }

    /// Family, key and value of each change; no value: the key is forgotten.
    pub(super) fn changes(&self) -> impl Iterator<Item = (Family, &[u8], Option<&[u8]>)> {
        self.changes.iter().map(|(family, key, value)| (*family, key.as_slice(), value.as_deref()))
    }
}

/// Called with a key and its value.
pub(super) type EachRow<'a> = &'a mut dyn FnMut(&[u8], &[u8]) -> Result<()>;

/// The same, until it breaks off.
pub(super) type EachUntil<'a> = &'a mut dyn FnMut(&[u8], &[u8]) -> Result<ControlFlow<()>>;

/// What keeps the rows. Shared by reference; reading is possible from any thread, writing is done by one at a time.
pub(super) trait Database: Send + Sync {
    /// The value under a key.
    ///
    /// # Errors
    /// `Corrupt` or `Io`.
    fn get(&self, family: Family, key: &[u8]) -> Result<Option<Vec<u8>>>;

    /// Calls `each` with every key and value of a family, in the order of keys.
    ///
    /// # Errors
    /// The first error of `each`; `Corrupt` or `Io`.
    fn for_each(&self, family: Family, each: EachRow<'_>) -> Result<()>;

    /// The values under many keys, in their order.
    ///
    /// # Errors
    /// `Corrupt` or `Io`.
    fn get_many(&self, family: Family, keys: &[&[u8]]) -> Result<Vec<Option<Vec<u8>>>>;

    /// Calls `each` with the keys behind `after` (all for `None`) and their values, in the order of keys, until it breaks
    /// off, which it will after `about` so many.
    ///
    /// # Errors
    /// The first error of `each`; `Corrupt` or `Io`.
    fn for_some(&self, family: Family, after: Option<&[u8]>, about: usize, each: EachUntil<'_>) -> Result<()>;

    /// How many rows a family has, about.
    fn rows_estimate(&self, family: Family) -> u64;

    /// Bytes of memory that it takes.
    fn memory_bytes(&self) -> u64;

    /// Applies all of a batch, or nothing.
    ///
    /// # Errors
    /// `NoSpace`, `Corrupt` or `Io`; then nothing was applied.
    fn write(&self, batch: Batch, durability: Durability) -> Result<()>;

    /// Makes everything written before survive a power loss.
    ///
    /// # Errors
    /// `NoSpace` or `Io`.
    fn sync(&self) -> Result<()>;

    /// Puts what was written where the next open finds it soonest.
    ///
    /// # Errors
    /// `NoSpace` or `Io`; nothing is lost then.
    fn flush(&self) -> Result<()>;

    /// Ends the work in the background.
    fn end(&self);
}
