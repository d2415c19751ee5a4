//! The server around one [`pegaflow_engine::Engine`]: gRPC over a Unix socket, sessions, memory shared with workers,
//! HTTP health and metrics; and [`client`], the other end of the same protocol, which the Python package uses.
//! Policy and block storage live in the engine. No byte of a block crosses gRPC.
#![deny(unsafe_code)]

mod access;
pub mod client;
mod daemon;
mod exit;
#[cfg(feature = "fuzzing")]
pub mod fuzzing;
mod http;
mod http_listener;
pub mod limits;
mod lookup_socket;
mod memory_socket;
mod metrics;
mod otlp;
mod owner_only;
#[doc(hidden)]
pub mod pack;
mod peer;
mod serve;
mod service;
mod session;
pub mod settings;
mod status;
mod tcp;
mod tls;
mod transport;
mod wire;

/// The protocol as generated from `proto/pegaflow.proto`, where every field is described.
pub mod proto {
    #![expect(missing_docs, clippy::allow_attributes, reason = "generated code; see pegaflow.proto")]
    tonic::include_proto!("pegaflow.v1");
}

pub use access::{Access, NewToken, Role, Tokens};
pub use daemon::run_server;
pub use exit::ExitStatus;
pub use http::{HttpServer, Readiness};
pub use metrics::Metrics;
pub use serve::{Server, ServerConfig};
pub use status::ERROR_KIND;
pub use tls::{ClientTls, ServerTls, TlsFiles};
pub use transport::{Listeners, TcpService, default_socket_path, memory_socket_path};
