//! A KV cache in GPU memory: one range per layer, or one for all of them.

use std::any::Any;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::device::{Core, CudaDevice};
use super::driver::{self, DeviceBuffer, StreamHandle};
use super::job::Job;
use super::method::{Method, Shape};
use super::plan::Geometry;
use crate::block::MemoryLayout;
use crate::dram::ArenaView;
use crate::error::{Error, ErrorKind, Result};
use crate::gpu::ranges::{RangeFragment, Ranges};
use crate::gpu::{CopyDirection, DeviceMemory, Fence, PlacedCopy};

/// The kernel moves 16 bytes at a time.
const ALIGN: u64 = 16;

/// GPU memory that somebody else allocated, in one or more ranges, kept alive by `owner`.
///
/// The layout numbers the bytes of all ranges one after the other, as if they were one memory.
pub struct CudaMemory {
    layout: MemoryLayout,
    geometry: Geometry,
    /// The geometry's slices, for the kernel.
    table: DeviceBuffer,
    forced: Option<Method>,
    device: Arc<CudaDevice>,
    _owner: Box<dyn Any + Send + Sync>,
}

impl CudaMemory {
    /// Describes memories of the GPU `ordinal`, each with its device address and its number of bytes, as one.
    ///
    /// # Errors
    /// `Unsupported` without a driver for CUDA 12.0 or later or without that GPU; `InvalidInput` if a fragment leaves its
    /// range or names none, if an address or stride is no multiple of 16, or if a range is not plain device memory of
    /// that GPU; those of the driver.
    ///
    /// # Safety
    /// The ranges are allocated for as long as `owner` lives. Whoever uses a block on the device at the same time as a
    /// copy of it accepts torn bytes.
    pub unsafe fn new(
        ordinal: u32,
        ranges: &[(u64, u64)],
        fragments: Vec<RangeFragment>,
        blocks: u32,
        owner: Box<dyn Any + Send + Sync>,
    ) -> Result<Self> {
        let lengths: Vec<u64> = ranges.iter().map(|(_, bytes)| *bytes).collect();
        let described = fragments.clone();
        let Ranges { layout, places } = Ranges::new(&lengths, fragments, blocks)?;
        let mut addressed = Vec::with_capacity(described.len());
        for (RangeFragment { fragment, .. }, (range, _)) in described.into_iter().zip(places) {
            let start = ranges.get(range).map_or(0, |(start, _)| *start);
            let address = start.checked_add(fragment.offset).filter(|address| address.is_multiple_of(ALIGN));
            match address {
                Some(address) if blocks == 1 || fragment.stride.is_multiple_of(ALIGN) => {
                    addressed.push((address, fragment.stride, fragment.bytes));
                }
                _ => {
                    return Err(Error::new(
                        ErrorKind::InvalidInput,
                        format!(
                            "a fragment starts {} bytes into the range at {start:#x}, with a stride of {} bytes; both must \
                             be multiples of {ALIGN} on the device",
                            fragment.offset, fragment.stride
                        ),
                    ));
                }
            }
        }
        let device = CudaDevice::open(ordinal)?;
        let context = &device.tools.context;
        let entered = context.enter()?;
        for (start, bytes) in ranges.iter().filter(|(_, bytes)| *bytes > 0) {
            driver::check_device_memory(context, *start)?;
            driver::check_device_memory(context, start.saturating_add(bytes - 1))?;
        }
        let geometry = Geometry::new(addressed);
        let table = device.upload(geometry.slices())?;
        drop(entered);
        Ok(Self { layout, geometry, table, forced: None, device, _owner: owner })
    }

    /// Copies everything by one method (`batch`, `staged` or `kernel`), whatever suits: for tests and benches.
    ///
    /// # Errors
    /// `InvalidInput` for any other name.
    #[doc(hidden)]
    pub fn force_method(&mut self, method: &str) -> Result<()> {
        self.forced = Some(match method {
            "batch" => Method::Batch,
            "staged" => Method::Staged,
            "kernel" => Method::Kernel,
            other => return Err(Error::new(ErrorKind::InvalidInput, format!("there is no copy method {other}"))),
        });
        Ok(())
    }

    /// The method that a copy takes: for benches.
    #[doc(hidden)]
    pub fn method_name(&self) -> &'static str {
        match self.forced.unwrap_or_else(|| Method::choose(self.shape())) {
            Method::Batch => "batch",
            Method::Staged => "staged",
            Method::Kernel => "kernel",
        }
    }

    pub(super) fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    pub(super) fn slices(&self) -> u64 {
        self.table.address()
    }

    pub(super) fn core(&self) -> &Arc<Core> {
        &self.device
    }

    pub(super) fn forced_method(&self) -> Option<Method> {
        self.forced
    }

    pub(super) fn shape(&self) -> Shape {
        Shape { fragments: self.geometry.fragments(), fragment_bytes: self.geometry.fragment_bytes() }
    }

    /// Queues a checked load in front of `stream`. What it returns as an error has queued nothing.
    fn queue_before(self: Arc<Self>, copy: PlacedCopy, stream: StreamHandle) -> Result<()> {
        let core = Arc::clone(self.core());
        let ticket = core.inbox.accept()?;
        let _entered = core.tools.context.enter()?;
        let mut job = Job::new(self, copy, true, ticket);
        let mut lane = core.urgent.lock();
        let prepared = job.is_arena_ready().and_then(|is_ready| {
            if !is_ready {
                return Err(Error::new(ErrorKind::Busy, "the GPU does not reach the arena yet; load with `start`"));
            }
            let method = job.method(&mut lane);
            lane.wait_for(method, &*core.tools.events.record(stream)?)?;
            job.fence()?.map_or(Ok(()), |fence| lane.wait_for(method, fence))
        });
        if let Err(error) = prepared {
            job.abandon();
            return Err(error);
        }
        while job.queue_piece(&mut lane) {}
        let ordered = job.last_end().map_or(Ok(()), |end| stream.wait_for(end));
        if let Err(error) = ordered {
            job.fail(error);
        }
        drop(lane);
        core.inbox.push(job);
        Ok(())
    }
}

impl DeviceMemory for CudaMemory {
    fn device(&self) -> &'static str {
        "cuda"
    }

    fn layout(&self) -> &MemoryLayout {
        &self.layout
    }

    /// Registers the arena with the driver, in windows of 1 GiB, on a thread of its own: 60 ms per GiB. Copies of the
    /// first windows run while the others are registered. This process itself can no longer touch the memory of an
    /// arena that it has mapped by descriptor.
    fn attach(&self, arena: &Arc<ArenaView>) -> Result<()> {
        let core = Arc::clone(self.core());
        let is_staged = self.shape().fragments > 1;
        self.core().arenas.attach(&self.core().tools.context, arena, move || {
            if is_staged {
                core.take_staging();
            }
            core.calibrate();
        })
    }

    fn is_attached(&self, arena: &ArenaView) -> Result<bool> {
        let registration = self.core().arenas.get(arena);
        registration.map_or(Ok(false), |registration| registration.is_ready(arena.range().1 as u64))
    }

    fn detach(&self, arena: &ArenaView) {
        self.core().arenas.detach(arena);
    }

    fn fence(&self, stream: u64) -> Result<Option<Fence>> {
        let tools = &self.core().tools;
        let _entered = tools.context.enter()?;
        let recorded = tools.events.record(StreamHandle::foreign(stream))?;
        Ok(Some(Fence(Arc::new(recorded))))
    }

    /// Hands the copy to the GPU's thread. It waits there for its fence, and up to 60 s for its places to be registered.
    /// A cancel takes back what is not on the device yet: of loads all but 256 MiB, of saves all but 64 MiB.
    fn start(self: Arc<Self>, copy: PlacedCopy) {
        match copy.check(&self.layout).and_then(|()| self.core().inbox.accept()) {
            Ok(ticket) => {
                let core = Arc::clone(self.core());
                core.inbox.push(Job::new(self, copy, false, ticket));
            }
            Err(error) => (copy.done)(Err(error)),
        }
    }

    /// Queues all of the load at once, on the caller's thread (1 ms per GiB), so it cannot be cancelled later.
    ///
    /// What fails before anything is queued is returned, and `done` is not called. What fails later is told to `done`
    /// alone, after what was queued has ended: `stream` then runs on with blocks that were not loaded.
    ///
    /// # Errors
    /// `Busy` if the places are not registered yet, or with too many copies queued; `Cancelled`; `InvalidInput` for a
    /// save, or a block or place outside; those of the driver.
    fn load_before(self: Arc<Self>, copy: PlacedCopy, stream: u64) -> Result<()> {
        copy.check(&self.layout)?;
        if copy.direction != CopyDirection::ToDevice {
            return Err(Error::new(ErrorKind::InvalidInput, "only loads can run before a stream; save with `start`"));
        }
        if copy.cancelled.load(Ordering::Acquire) {
            return Err(Error::new(ErrorKind::Cancelled, "the copy was cancelled"));
        }
        self.queue_before(copy, StreamHandle::foreign(stream))
    }
}
