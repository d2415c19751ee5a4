//! Every bound of the protocol and of the server, by name. Checked before anything is allocated for a request.

use std::time::Duration;

/// The longest message in either direction, in bytes.
pub const MESSAGE_BYTES_MAX: usize = 8 << 20;
/// The most keys or blocks in one request.
pub const BLOCKS_MAX: usize = 65_536;
/// The most groups of an instance.
pub const GROUPS_MAX: usize = 64;
/// The longest name of an instance or a client, in bytes.
pub const NAME_BYTES_MAX: usize = 256;
/// The longest namespace descriptor as JSON, in bytes.
pub const NAMESPACE_BYTES_MAX: usize = 64 << 10;
/// The most shards of a block; shards are numbered from 0.
pub const SHARDS_MAX: u32 = 1024;
/// The longest lease.
pub const LEASE_MAX: Duration = Duration::from_secs(600);
/// The longest wait that a flush may ask for.
pub const FLUSH_TIMEOUT_MAX: Duration = Duration::from_secs(600);
/// The most sessions at once.
pub const SESSIONS_MAX: usize = 1024;
/// The most connections at once on each listening socket; more wait in the kernel's backlog.
pub(crate) const CONNECTIONS_MAX: usize = 2048;
/// The most requests at once on one connection.
pub(crate) const CONNECTION_REQUESTS_MAX: usize = 256;
/// The most loads and saves in flight in one session.
pub const OPERATIONS_MAX: usize = 1024;
/// The most flushes that wait at once.
pub(crate) const FLUSHES_MAX: usize = 4;
/// The most clients at once that fetch a descriptor.
pub(crate) const MEMORY_CONNECTIONS_MAX: usize = 64;
/// The length of a token, in bytes.
pub const TOKEN_BYTES: usize = 16;
/// A heartbeat is sent when a session had no event for this long.
pub(crate) const HEARTBEAT: Duration = Duration::from_secs(5);
/// The length of a key, in bytes.
pub(crate) const KEY_BYTES: usize = 32;
/// The length of a lease on the wire, in bytes.
pub(crate) const LEASE_BYTES: usize = 16;
/// The most computations that one question tells of.
pub(crate) const COMPUTED_MAX: usize = 256;
/// The most decisions in one explanation.
pub(crate) const DECISIONS_MAX: usize = 1024;
