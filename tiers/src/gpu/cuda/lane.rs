//! A lane: two streams, one for the kernel and one for the copy engines, and the staging between them. There are three,
//! for loads that a stream waits for, for other loads and for saves; what is queued in one never waits for another.

use std::ffi::c_int;
use std::sync::Arc;

use super::driver::{Context, DeviceBuffer, Event, Events, Progress, Recorded, Stream, Symbols};
use super::kernel::{CopyKernel, Other};
use super::method::{Method, STAGING_BYTES};
use super::plan::{ArenaSpan, Geometry, Piece, transfers};
use crate::dram::Place;
use crate::error::{Error, ErrorKind, Result};
use crate::gpu::CopyDirection;

/// Of a lane; of one whose pieces wait for one another, two, as many as the calibration needs.
const STAGING_BUFFERS: usize = 3;
const BACKGROUND_STAGING_BUFFERS: usize = 2;

/// What every lane of a GPU uses.
pub(super) struct Tools {
    pub(super) context: Arc<Context>,
    pub(super) events: Arc<Events>,
    pub(super) symbols: Symbols,
    pub(super) kernel: CopyKernel,
}

/// A copy, as far as a lane has to know it.
#[derive(Clone, Copy)]
pub(super) struct Copying<'a> {
    pub(super) direction: CopyDirection,
    pub(super) blocks: &'a [(u32, Place)],
    pub(super) geometry: &'a Geometry,
    /// The address of the geometry's slices on the device.
    pub(super) slices: u64,
    pub(super) arena: ArenaSpan,
}

struct Staging {
    buffer: DeviceBuffer,
    /// When each of the buffers may be filled again.
    free: Vec<Option<Arc<Recorded>>>,
    next: usize,
}

enum StagingState {
    Untried,
    Refused,
    Taken(Staging),
}

pub(super) struct Lane {
    kernels: Stream,
    copies: Stream,
    staging: StagingState,
    /// Whether each piece begins when the one before it has ended, so that the copy engine rests while the kernel runs.
    is_background: bool,
    /// The end of the last piece of a background lane.
    last_end: Option<Arc<Recorded>>,
    /// Something failed half way: nothing more is queued until what was has ended.
    has_failed: bool,
}

impl Lane {
    pub(super) fn new(context: &Arc<Context>, priority: c_int) -> Result<Self> {
        Ok(Self {
            kernels: Stream::new(context, priority)?,
            copies: Stream::new(context, priority)?,
            staging: StagingState::Untried,
            is_background: false,
            last_end: None,
            has_failed: false,
        })
    }

    /// A lane for copies that go on for long beside a model. Its copy engine has a pause after each piece: without one it
    /// serves no other stream, and the model's steps, which copy a little too, stand still.
    pub(super) fn background(context: &Arc<Context>, priority: c_int) -> Result<Self> {
        Ok(Self { is_background: true, ..Self::new(context, priority)? })
    }

    /// The method that will be used where `wanted` is: staging takes GPU memory, which may be short.
    pub(super) fn method(&mut self, tools: &Tools, wanted: Method, direction: CopyDirection) -> Method {
        if wanted == Method::Staged && self.staging(tools).is_none() {
            wanted.without_staging(direction)
        } else {
            wanted
        }
    }

    /// Takes the memory for staging at its first use.
    fn staging(&mut self, tools: &Tools) -> Option<&mut Staging> {
        if matches!(self.staging, StagingState::Untried) {
            let buffers = if self.is_background { BACKGROUND_STAGING_BUFFERS } else { STAGING_BUFFERS };
            let bytes = STAGING_BYTES as usize * buffers;
            self.staging = match DeviceBuffer::new(&tools.context, bytes) {
                Ok(buffer) => StagingState::Taken(Staging { buffer, free: vec![None; buffers], next: 0 }),
                Err(error) => {
                    tracing::warn!(
                        %error, bytes, gpu = tools.context.ordinal(),
                        "no GPU memory for staging, copies are slower; lower gpu_memory_utilization a little"
                    );
                    StagingState::Refused
                }
            };
        }
        match &mut self.staging {
            StagingState::Taken(staging) => Some(staging),
            _ => None,
        }
    }

    /// The address of the staging memory, for the calibration, which holds the lane meanwhile and has waited for it.
    pub(super) fn staging_address(&mut self, tools: &Tools) -> Option<u64> {
        self.staging(tools).map(|staging| staging.buffer.address())
    }

    /// What touches the device's memory from now on waits for `event`. Staging does not: it may be filled before.
    pub(super) fn wait_for(&self, method: Method, event: &Event) -> Result<()> {
        match method {
            Method::Batch => self.copies.wait_for(event),
            Method::Staged | Method::Kernel => self.kernels.wait_for(event),
        }
    }

    /// Whether all that was queued has ended.
    pub(super) fn progress(&self) -> Progress {
        match (self.kernels.progress(), self.copies.progress()) {
            (Progress::Lost(error), _) | (_, Progress::Lost(error)) => Progress::Lost(error),
            (Progress::Ended, Progress::Ended) => Progress::Ended,
            (Progress::Unclear(error), _) | (_, Progress::Unclear(error)) => Progress::Unclear(error),
            _ => Progress::Pending,
        }
    }

    /// Queues a piece; what is returned has run when the piece has ended.
    ///
    /// # Errors
    /// Those of the driver. Parts of the piece may have been queued then: it has ended when the whole lane has.
    ///
    /// # Safety
    /// The device's memory, the table of slices, the arena and its registration stay until the piece has ended. Blocks
    /// and places were checked.
    pub(super) unsafe fn queue(
        &mut self,
        tools: &Tools,
        copying: Copying<'_>,
        piece: &Piece,
        method: Method,
        ctas: u32,
    ) -> Result<Arc<Recorded>> {
        if self.has_failed {
            match self.progress() {
                Progress::Pending | Progress::Unclear(_) => {
                    return Err(Error::new(ErrorKind::Busy, "copies that failed to start have not ended yet"));
                }
                Progress::Lost(error) => return Err(error),
                Progress::Ended => self.has_failed = false,
            }
        }
        // SAFETY: the caller's promise.
        let queued = unsafe { self.try_queue(tools, copying, piece, method, ctas) };
        self.has_failed = queued.is_err();
        queued
    }

    /// # Safety
    /// As [`Lane::queue`].
    unsafe fn try_queue(
        &mut self,
        tools: &Tools,
        copying: Copying<'_>,
        piece: &Piece,
        method: Method,
        ctas: u32,
    ) -> Result<Arc<Recorded>> {
        let Copying { direction, blocks, geometry, slices, arena } = copying;
        let to_device = direction == CopyDirection::ToDevice;
        let Self { kernels, copies, staging, is_background, last_end, .. } = self;
        // SAFETY: the caller's promise, for both.
        let run_kernel =
            |other| unsafe { tools.kernel.queue(kernels, ctas, to_device, slices, (blocks, piece), other) };
        let run_copies = |staging| {
            let transfers = transfers(geometry, blocks, piece, arena, staging);
            // SAFETY: as above.
            unsafe { tools.symbols.copy(copies, to_device, &transfers) }
        };
        let record = |stream: &Stream| tools.events.record(stream.handle()).map(Arc::new);
        let staging = match (method, staging) {
            (Method::Staged, StagingState::Taken(staging)) => staging,
            (Method::Batch, _) => {
                run_copies(None)?;
                return record(copies);
            }
            (Method::Kernel | Method::Staged, _) => {
                run_kernel(Other::Arena(arena))?;
                return record(kernels);
            }
        };
        let number = staging.next;
        staging.next = (number + 1) % staging.free.len();
        let buffer = staging.buffer.address() + number as u64 * STAGING_BYTES;
        let Some(free) = staging.free.get_mut(number) else {
            return Err(Error::new(ErrorKind::Io, "there is no such staging buffer"));
        };
        let (first, second) = if to_device { (&*copies, &*kernels) } else { (&*kernels, &*copies) };
        if let Some(before) = if *is_background { last_end.as_ref() } else { free.as_ref() } {
            first.wait_for(before)?;
        }
        if to_device {
            run_copies(Some(buffer))?;
        } else {
            run_kernel(Other::Staging(buffer))?;
        }
        second.wait_for(&*record(first)?)?;
        if to_device {
            run_kernel(Other::Staging(buffer))?;
        } else {
            run_copies(Some(buffer))?;
        }
        let end = record(second)?;
        *free = Some(Arc::clone(&end));
        *last_end = Some(Arc::clone(&end));
        Ok(end)
    }
}
