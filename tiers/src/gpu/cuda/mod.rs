//! The GPU backend, on the CUDA driver alone, which is loaded at run time: one build for every driver from CUDA 12.0 on and
//! for hosts without one. Copies run in the process of the worker, in the context that torch uses, on streams of their
//! own: nothing here waits for the device as a whole.
//! Data enters as a `PlacedCopy` (memory.rs), waits in a queue (queue.rs, engine.rs), is cut into pieces (plan.rs) and
//! queued on the streams of a lane (lane.rs) by the method that suits it (method.rs).
#![expect(unsafe_code, reason = "the CUDA driver's interface, and memory that only it can reach")]

mod arena;
mod calibrate;
mod device;
mod driver;
mod engine;
mod job;
mod kernel;
mod lane;
mod memory;
mod method;
mod plan;
mod queue;
mod scratch;

pub use memory::CudaMemory;
pub use scratch::CudaScratch;

use crate::error::Result;

/// How many GPUs this process sees.
///
/// # Errors
/// `Unsupported`, with the reason and the remedy, on a host without an NVIDIA driver for CUDA 12.0 or later.
pub fn gpu_count() -> Result<u32> {
    driver::device_count()
}
