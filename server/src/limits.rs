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
/// The most TCP connections at once; what comes beyond is closed. Also at most a quarter of the files that the process may
/// open.
pub const TCP_CONNECTIONS_MAX: usize = 512;
/// Of these, from one address.
pub const CONNECTIONS_PER_ADDRESS_MAX: usize = 64;
/// How long a TLS handshake may take.
pub const HANDSHAKE_MAX: Duration = Duration::from_secs(5);
/// How long a TCP connection may be without a request that is let in.
pub const ADMISSION_MAX: Duration = Duration::from_secs(10);
/// The most connections to the HTTP port at once; what comes beyond is closed.
pub const HTTP_CONNECTIONS_MAX: usize = 128;
/// How long a connection to the HTTP port may keep the server waiting: for a request, or for an answer to be taken.
pub const HTTP_WAIT_MAX: Duration = Duration::from_secs(30);
/// The most sessions at once of one client over TCP.
pub const SESSIONS_PER_CLIENT_MAX: usize = 64;
/// Requests of one client over TCP in a second, on average, and at once.
pub const REQUESTS_PER_SECOND_MAX: f64 = 2000.0;
/// See [`REQUESTS_PER_SECOND_MAX`].
pub const REQUESTS_BURST_MAX: f64 = 4000.0;
/// The most tokens of a server.
pub const TOKENS_MAX: usize = 1024;
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
/// The most namespaces in one answer: with descriptors of 64 KiB they fit into a message.
pub(crate) const NAMESPACES_MAX: usize = 64;
/// The most rows of the index that one list of namespaces counts.
pub(crate) const NAMESPACE_ROWS_MAX: u64 = 100_000_000;
/// The most namespaces that one request names to be brought to DRAM, or to leave it.
pub(crate) const NAMED_NAMESPACES_MAX: usize = 4096;
/// The most decisions in one explanation.
pub(crate) const DECISIONS_MAX: usize = 1024;
