//! What the whole-system tests share: an oracle for block contents, a server process that can be killed, and a worker
//! that saves and loads through the socket as a CPU engine of vLLM does. Nothing here knows the engine's insides.

mod oracle;
pub mod power_loss;
mod server_process;
mod worker;

pub use oracle::{Chain, block_bytes, first_difference};
pub use server_process::{ServerOptions, ServerProcess};
pub use worker::{KvDevice, Missing, TestWorker, WorkerOptions};
