//! The server around one [`pegaflow_engine::Engine`]: gRPC over a Unix socket, sessions, memory shared with workers,
//! HTTP health and metrics; and [`client`], the other end of the same protocol, which the Python package uses.
//! Policy and block storage live in the engine. No byte of a block crosses gRPC.
#![deny(unsafe_code)]

pub mod client;
mod daemon;
mod exit;
mod http;
pub mod limits;
mod memory_socket;
mod metrics;
mod peer;
mod serve;
mod service;
mod session;
pub mod settings;
mod status;
mod transport;
mod wire;

/// The protocol as generated from `proto/pegaflow.proto`, where every field is described.
pub mod proto {
    #![expect(missing_docs, clippy::allow_attributes, reason = "generated code; see pegaflow.proto")]
    tonic::include_proto!("pegaflow.v1");
}

pub use daemon::run_server;
pub use exit::ExitStatus;
pub use http::{HttpServer, Readiness};
pub use metrics::Metrics;
pub use serve::{Server, ServerConfig};
pub use status::ERROR_KIND;
pub use transport::{Listeners, default_socket_path, memory_socket_path};
