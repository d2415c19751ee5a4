//! The index of the store: a compact table in memory that answers lookups, and RocksDB, the durable log behind it.
