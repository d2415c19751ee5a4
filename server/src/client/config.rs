//! How a client finds its server and how long it waits.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use pegaflow_engine::{DeviceMemory, Error, ErrorKind, InstanceSpec, Result};

use crate::limits::{GROUPS_MAX, NAME_BYTES_MAX};
use crate::owner_only;
use crate::tls::ClientTls;

/// Where the server listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Endpoint {
    /// A Unix socket; the server must run as the same user or as root.
    Unix(PathBuf),
    /// A loopback TCP address: lookups and counters only, no loads and saves.
    Tcp(SocketAddr),
    /// A server with a certificate, at a name and a port; no loads and saves.
    Tls {
        /// The name that the certificate is for, or an address.
        host: String,
        /// The port.
        port: u16,
        /// What the client needs to trust the server.
        tls: ClientTls,
    },
}

impl Endpoint {
    /// An address as users write it: `https://HOST:PORT`, `http://ADDRESS:PORT` on loopback, or the path of a Unix socket.
    /// `tls`: what `https` needs.
    ///
    /// # Errors
    /// `InvalidInput` for anything else, and for `https` without `tls`.
    pub fn parse(text: &str, tls: Option<&ClientTls>) -> Result<Self> {
        let bad = |message: String| Error::new(ErrorKind::InvalidInput, message);
        let wrong = || {
            let ways = "https://HOST:PORT, http://ADDRESS:PORT on loopback, or the path of a Unix socket";
            bad(format!("'{text}' is no server; write {ways}"))
        };
        let trimmed = text.trim_end_matches('/');
        if text.starts_with('/') {
            return Ok(Self::Unix(text.into()));
        }
        if let Some(address) = trimmed.strip_prefix("http://") {
            let address: SocketAddr = address.parse().map_err(|_| wrong())?;
            if !address.ip().is_loopback() {
                return Err(bad(format!("{address} is not loopback, and http is not encrypted; write https://")));
            }
            return Ok(Self::Tcp(address));
        }
        let (host, port) = trimmed.strip_prefix("https://").and_then(|rest| rest.rsplit_once(':')).ok_or_else(wrong)?;
        let host = host.trim_start_matches('[').trim_end_matches(']').to_owned();
        let port = port.parse().map_err(|_| wrong())?;
        let tls = tls.cloned().ok_or_else(|| {
            bad("https needs --ca, a file with the authorities that may vouch for the server, in PEM".into())
        })?;
        Ok(Self::Tls { host, port, tls })
    }
}

/// What a client shows a server to be let in over TCP. `Debug` shows nothing of it.
#[derive(Clone, PartialEq, Eq)]
pub struct Token(String);

impl Token {
    /// A token as `pegaflow token new` has printed it; white space around it does not count.
    ///
    /// # Errors
    /// `InvalidInput` for anything that cannot be one.
    pub fn new(text: &str) -> Result<Self> {
        let text = text.trim();
        if text.is_empty() || text.len() > NAME_BYTES_MAX || !text.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                "this is no token; give what pegaflow token new has printed",
            ));
        }
        Ok(Self(text.to_owned()))
    }

    /// Reads one from a file that nobody but its owner may read.
    ///
    /// # Errors
    /// `PermissionDenied` for a file that others have rights to, `InvalidInput`, and what the file system reports.
    pub fn read(path: &Path) -> Result<Self> {
        Self::new(&owner_only::read("the file of the token", path)?).map_err(|error| error.with("path", path.display()))
    }

    pub(super) fn as_str(&self) -> &str {
        &self.0
    }
}

impl std::fmt::Debug for Token {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Token(..)")
    }
}

impl Default for Endpoint {
    fn default() -> Self {
        Self::Unix(crate::default_socket_path())
    }
}

impl std::fmt::Display for Endpoint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Unix(path) => path.display().fmt(f),
            Self::Tcp(address) => address.fmt(f),
            Self::Tls { host, port, .. } => write!(f, "https://{host}:{port}"),
        }
    }
}

/// How a client works. Start from `ClientConfig::new`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClientConfig {
    /// The server. Default: the default Unix socket.
    pub endpoint: Endpoint,
    /// What the server is shown over TCP. Default: none.
    pub token: Option<Token>,
    /// The client's name in the server's log. At most 256 bytes.
    pub name: String,
    /// The longest wait for a lookup; it stands in the way of the model. Default: 50 ms.
    pub lookup_timeout: Duration,
    /// The longest wait for any other answer. Default: 5 s.
    pub rpc_timeout: Duration,
    /// The longest life of a load or a save; then it is cancelled and its blocks fail. Default: 60 s.
    pub operation_timeout: Duration,
}

impl ClientConfig {
    /// The defaults, for a client of that name.
    pub fn new(endpoint: Endpoint, name: impl Into<String>) -> Self {
        Self {
            endpoint,
            token: None,
            name: name.into(),
            lookup_timeout: Duration::from_millis(50),
            rpc_timeout: Duration::from_secs(5),
            operation_timeout: Duration::from_secs(60),
        }
    }

    pub(super) fn validate(&self) -> Result<()> {
        let bad = |message: String| Err(Error::new(ErrorKind::InvalidInput, message));
        if self.name.len() > NAME_BYTES_MAX {
            return bad(format!("the client's name has {} bytes; give at most {NAME_BYTES_MAX}", self.name.len()));
        }
        for (name, timeout) in [
            ("lookup_timeout", self.lookup_timeout),
            ("rpc_timeout", self.rpc_timeout),
            ("operation_timeout", self.operation_timeout),
        ] {
            if timeout.is_zero() || timeout > Duration::from_secs(3600) {
                return bad(format!("{name} is {timeout:?}; give more than zero, at most an hour"));
            }
        }
        Ok(())
    }
}

/// A worker: what it says of itself, and its memory. Repeated to every new server.
#[derive(Clone)]
pub(super) struct Registration {
    pub(super) spec: InstanceSpec,
    pub(super) memory: Arc<dyn DeviceMemory>,
}

impl Registration {
    /// # Errors
    /// `InvalidInput` if the memory does not fit the groups.
    pub(super) fn new(spec: InstanceSpec, memory: Arc<dyn DeviceMemory>) -> Result<Self> {
        let bad = |message: String| Err(Error::new(ErrorKind::InvalidInput, message));
        if spec.groups.is_empty() || spec.groups.len() > GROUPS_MAX {
            return bad(format!("{} groups; give 1 to {GROUPS_MAX}", spec.groups.len()));
        }
        let block_bytes = memory.layout().block_bytes();
        if let Some(geometry) = spec.groups.iter().find(|geometry| geometry.block_bytes != block_bytes) {
            return bad(format!(
                "the memory has blocks of {block_bytes} bytes, group {} has {}; start a client for each block size",
                geometry.group, geometry.block_bytes
            ));
        }
        Ok(Self { spec, memory })
    }

    /// Whether the other one says the same of the same memory.
    pub(super) fn is_same(&self, other: &Self) -> bool {
        let (a, b) = (&self.spec, &other.spec);
        (&a.instance, &a.namespace, &a.groups, a.shard) == (&b.instance, &b.namespace, &b.groups, b.shard)
            && Arc::ptr_eq(&self.memory, &other.memory)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_a_socket_loopback_or_a_server_with_a_certificate() {
        let tls = ClientTls { authorities: "/ca.pem".into(), identity: None };
        let parse = |text: &str| Endpoint::parse(text, Some(&tls)).ok();
        assert_eq!(parse("/run/p.sock"), Some(Endpoint::Unix("/run/p.sock".into())));
        assert_eq!(parse("http://127.0.0.1:9"), Some(Endpoint::Tcp(([127, 0, 0, 1], 9).into())));
        let named = |host: &str| Some(Endpoint::Tls { host: host.into(), port: 9, tls: tls.clone() });
        assert_eq!((parse("https://h:9/"), parse("https://[::1]:9")), (named("h"), named("::1")));
        for wrong in ["", "run/p.sock", "http://10.0.0.1:9", "http://h:9", "https://h", "https://h:x", "ftp://h:9"] {
            assert_eq!(parse(wrong), None, "{wrong}");
        }
        let error = Endpoint::parse("https://h:9", None).expect_err("nobody vouches");
        assert!(error.to_string().contains("--ca"), "{error}");
    }
}
