//! The index of the store: where every record lies. Two halves: [`Table`], a compact table in memory that answers every
//! lookup, and [`IndexLog`], its durable log in RocksDB, written behind the records and read once, when a store opens.
//! Neither reads or writes a record, and neither is believed: a record says itself what it is, so a lost or stale entry
//! costs a miss, never a wrong byte, and the whole index can be deleted and rebuilt from the regions.

mod location;
mod log;
mod row;
mod table;

pub use location::Location;
#[cfg(test)]
pub(crate) use log::spoil_row;
pub use log::{IndexChange, IndexLog};
#[cfg(any(test, feature = "fault-injection"))]
pub(crate) use log::{TwinEvents, TwinIndex};
pub use row::{IndexRow, NamespaceEnd, NamespaceRow, RegionMark};
pub use table::{Table, TableEntry, Uses};
