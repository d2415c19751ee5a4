//! Where the bytes of a KV cache live and how they move: the device (GPU or host memory), the pinned DRAM
//! arena, the NVMe store and its index. This crate is mechanism only: it never decides what to keep, and it
//! knows nothing of vLLM, sessions or the network. Data enters as blocks copied out of a device into arena
//! slots, leaves the same way, and in between lives in slots and in records of the store.
#![deny(unsafe_code)]

mod block;
mod codec;
mod dram;
mod error;
mod gpu;
mod index;
mod latency;
mod nvme;
mod prelude;

pub use prelude::*;
