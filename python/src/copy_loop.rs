//! Copies at full speed until it is stopped, for measuring what they do to a model that runs beside them.
#![expect(unsafe_code, reason = "registers GPU memory of its own")]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam_channel::bounded;
use parking_lot::Mutex;
use pegaflow_engine::{
    CopyDirection, CudaMemory, CudaScratch, DeviceMemory, Error, ErrorKind, Fragment, PlacedCopy, RangeFragment, Result,
};
use pegaflow_tiers::{Arena, ArenaConfig, Slot};
use pyo3::prelude::*;

use crate::error::{detached, to_python};

/// Bytes that go back and forth.
const BYTES: u64 = 1 << 30;
/// Copies in flight: while one ends the next one runs.
const IN_FLIGHT: usize = 2;
/// How long one of them may take, with whatever else the GPU does beside it.
const COPY_TIMEOUT: Duration = Duration::from_secs(30);

struct Traffic {
    memory: Arc<CudaMemory>,
    direction: CopyDirection,
    arena: Arc<Arena>,
    slots: Vec<Slot>,
}

struct Running {
    thread: JoinHandle<Result<()>>,
    started: Instant,
}

/// Loads or saves as the connector does them, over and over, between GPU memory and DRAM of its own: `fragments` equal
/// parts of blocks of `block_bytes` bytes, of 1 GiB in all. For benches.
#[pyclass(module = "pegaflow._native", frozen)]
pub(crate) struct CopyLoop {
    traffic: Arc<Traffic>,
    is_stopped: Arc<AtomicBool>,
    copied_bytes: Arc<AtomicU64>,
    running: Mutex<Option<Running>>,
}

impl Traffic {
    fn new(
        ordinal: u32,
        block_bytes: u64,
        fragments: u32,
        direction: CopyDirection,
        method: Option<&str>,
    ) -> Result<Self> {
        let bad = |message: String| Error::new(ErrorKind::InvalidInput, message);
        let part = block_bytes.checked_div(fragments.into()).filter(|part| *part > 0);
        let part = part.ok_or_else(|| bad(format!("{block_bytes} bytes in {fragments} fragments; give at least 1")))?;
        let blocks = u32::try_from(BYTES / (part * u64::from(fragments))).unwrap_or(u32::MAX).max(1);
        let layer_bytes = part * u64::from(blocks);
        let scratch = Arc::new(CudaScratch::new(ordinal, (layer_bytes * u64::from(fragments)) as usize)?);
        let ranges: Vec<_> =
            (0..u64::from(fragments)).map(|layer| (scratch.address() + layer * layer_bytes, layer_bytes)).collect();
        let fragment = Fragment { offset: 0, stride: part, bytes: part };
        let described = (0..fragments).map(|range| RangeFragment { range, fragment }).collect();
        // SAFETY: the scratch memory is the owner, and nobody else uses it.
        let mut memory = unsafe { CudaMemory::new(ordinal, &ranges, described, blocks, Box::new(scratch)) }?;
        if let Some(method) = method {
            memory.force_method(method)?;
        }
        let slot_bytes = Arena::slot_bytes((part * u64::from(fragments)) as usize) as u64;
        let arena = Arena::new(ArenaConfig::new((slot_bytes * u64::from(blocks) * 9 / 8).max(64 << 20)))?;
        let slots = (0..blocks).map_while(|_| arena.alloc((part * u64::from(fragments)) as usize)).collect();
        Ok(Self { memory: Arc::new(memory), direction, arena, slots })
    }

    fn run(&self, is_stopped: &AtomicBool, copied_bytes: &AtomicU64) -> Result<()> {
        let view = self.arena.view();
        self.memory.attach(&view)?;
        let (ended, wait) = bounded(IN_FLIGHT);
        let (mut in_flight, block_bytes) = (0, self.memory.layout().block_bytes());
        loop {
            while in_flight < IN_FLIGHT && !is_stopped.load(Ordering::Acquire) {
                let ended = ended.clone();
                Arc::clone(&self.memory).start(PlacedCopy {
                    arena: Arc::clone(&view),
                    direction: self.direction,
                    blocks: (0..).zip(self.slots.iter().map(Slot::place)).collect(),
                    after: None,
                    cancelled: Arc::default(),
                    done: Box::new(move |result| drop(ended.try_send(result))),
                });
                in_flight += 1;
            }
            if in_flight == 0 {
                self.memory.detach(&view);
                return Ok(());
            }
            // The copies hold what they use: leaving them behind frees nothing under them.
            wait.recv_timeout(COPY_TIMEOUT).map_err(|_| {
                let message = format!("no copy has ended for {} s: the GPU is stuck", COPY_TIMEOUT.as_secs());
                Error::new(ErrorKind::Timeout, message)
            })??;
            in_flight -= 1;
            copied_bytes.fetch_add(self.slots.len() as u64 * block_bytes, Ordering::Relaxed);
        }
    }
}

#[pymethods]
impl CopyLoop {
    #[new]
    #[pyo3(signature = (ordinal, block_bytes, fragments, direction, method = None))]
    fn new(
        py: Python<'_>,
        ordinal: u32,
        block_bytes: u64,
        fragments: u32,
        direction: &str,
        method: Option<&str>,
    ) -> PyResult<Self> {
        let direction = match direction {
            "load" => CopyDirection::ToDevice,
            "save" => CopyDirection::ToSlots,
            other => {
                let message = format!("'{other}' is no direction; give load or save");
                return Err(to_python(py, &Error::new(ErrorKind::InvalidInput, message)));
            }
        };
        let traffic = detached(py, || Traffic::new(ordinal, block_bytes, fragments, direction, method))?;
        Ok(Self {
            traffic: Arc::new(traffic),
            is_stopped: Arc::default(),
            copied_bytes: Arc::default(),
            running: Mutex::default(),
        })
    }

    /// Starts to copy, on threads of its own.
    fn start(&self, py: Python<'_>) -> PyResult<()> {
        let mut running = self.running.lock();
        if running.is_some() {
            return Err(to_python(py, &Error::new(ErrorKind::InvalidInput, "it copies already; call stop first")));
        }
        self.is_stopped.store(false, Ordering::Release);
        self.copied_bytes.store(0, Ordering::Relaxed);
        let (traffic, is_stopped, copied) =
            (Arc::clone(&self.traffic), Arc::clone(&self.is_stopped), Arc::clone(&self.copied_bytes));
        let copy = move || traffic.run(&is_stopped, &copied);
        let thread = std::thread::Builder::new().name("pega-copy-loop".into()).spawn(copy);
        let thread = thread.map_err(|error| to_python(py, &Error::from_io("cannot start a thread", error)))?;
        *running = Some(Running { thread, started: Instant::now() });
        Ok(())
    }

    /// Stops, and returns how much was copied, in GB (10^9 bytes) per second since the start. Fails if a copy failed, or
    /// none ended for 30 s.
    fn stop(&self, py: Python<'_>) -> PyResult<f64> {
        self.is_stopped.store(true, Ordering::Release);
        let Some(Running { thread, started }) = self.running.lock().take() else { return Ok(0.0) };
        let broken = || Err(Error::new(ErrorKind::Poisoned, "the thread of the copies panicked"));
        let copied = detached(py, || thread.join().unwrap_or_else(|_| broken()));
        copied.map(|()| self.copied_bytes.load(Ordering::Relaxed) as f64 / 1e9 / started.elapsed().as_secs_f64())
    }
}
