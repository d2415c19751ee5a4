//! A GPU of this process: its context, its lanes, the arenas that it reaches and the thread that queues copies. One for all
//! memories on it; it goes with the last of them.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock, Weak};
use std::time::Duration;

use parking_lot::{Condvar, Mutex};

use super::arena::Arenas;
use super::calibrate;
use super::driver::{self, Context, DeviceBuffer, Events, PinnedBuffer, Stream, Symbols};
use super::engine;
use super::job::Job;
use super::kernel::CopyKernel;
use super::lane::{Lane, Tools};
use super::method::{Method, Tuning};
use super::plan::Slice;
use crate::error::{Error, ErrorKind, Result};
use crate::gpu::CopyDirection;

/// Copies that a GPU has accepted and that have not ended.
const JOBS_MAX: usize = 4096;

/// What the memories on a GPU and its thread share.
pub(super) struct Core {
    pub(super) tools: Tools,
    /// Loads that a stream waits for, queued by whoever asks for them.
    pub(super) urgent: Mutex<Lane>,
    pub(super) loads: Mutex<Lane>,
    pub(super) saves: Mutex<Lane>,
    /// For what is done once per memory or per GPU.
    pub(super) setup: Stream,
    pub(super) arenas: Arenas,
    pub(super) inbox: Inbox,
    tuning: Mutex<Tuning>,
    calibrated: OnceLock<()>,
    /// What the calibration took, if there was one: freeing it would wait for the device.
    calibration: OnceLock<(PinnedBuffer, DeviceBuffer)>,
}

impl Core {
    fn open(ordinal: u32) -> Result<Self> {
        let context = Context::retain(ordinal)?;
        let (lowest, highest) = context.priorities()?;
        let background = || Lane::background(&context, lowest).map(Mutex::new);
        Ok(Self {
            urgent: Mutex::new(Lane::new(&context, highest)?),
            loads: background()?,
            saves: background()?,
            setup: Stream::new(&context, lowest)?,
            arenas: Arenas::default(),
            inbox: Inbox::default(),
            tuning: Mutex::new(Tuning::DEFAULT),
            calibrated: OnceLock::new(),
            calibration: OnceLock::new(),
            tools: Tools {
                events: Events::new(&context),
                symbols: Symbols::find()?,
                kernel: CopyKernel::load(&context)?,
                context,
            },
        })
    }

    pub(super) fn keep_calibration(&self, taken: (PinnedBuffer, DeviceBuffer)) -> &(PinnedBuffer, DeviceBuffer) {
        self.calibration.get_or_init(|| taken)
    }

    /// Brings a table of slices to the GPU.
    pub(super) fn upload(&self, slices: &[Slice]) -> Result<DeviceBuffer> {
        let bytes: Vec<u8> = slices.iter().copied().flat_map(Slice::to_bytes).collect();
        let table = DeviceBuffer::new(&self.tools.context, bytes.len())?;
        // SAFETY: the buffer was made for these bytes.
        unsafe { driver::upload(&self.setup, &self.tools.events, table.address(), &bytes) }?;
        Ok(table)
    }

    pub(super) fn tuning(&self) -> Tuning {
        *self.tuning.lock()
    }

    /// Takes the memory that staged copies need, so that no copy has to: taking GPU memory may wait for the device.
    pub(super) fn take_staging(&self) {
        use CopyDirection::{ToDevice, ToSlots};
        for (lane, direction) in [(&self.urgent, ToDevice), (&self.loads, ToDevice), (&self.saves, ToSlots)] {
            let _without_it_copies_are_slower = lane.lock().method(&self.tools, Method::Staged, direction);
        }
    }

    /// Finds out how many CTAs copies take, once per process and, where the result can be kept, once per GPU and driver.
    /// Takes some 50 ms, never on the path of a copy.
    pub(super) fn calibrate(&self) {
        self.calibrated.get_or_init(|| match calibrate::tuning(self) {
            Ok(tuning) => {
                *self.tuning.lock() = tuning;
                tracing::info!(?tuning, gpu = self.tools.context.ordinal(), "copies are calibrated");
            }
            Err(error) => tracing::warn!(%error, "copies were not calibrated; the defaults are used"),
        });
    }
}

/// A GPU, for the memories on it.
pub(super) struct CudaDevice(Arc<Core>);

impl CudaDevice {
    /// The GPU `ordinal`, opened by the first who asks.
    pub(super) fn open(ordinal: u32) -> Result<Arc<Self>> {
        static OPEN: OnceLock<Mutex<HashMap<u32, Weak<CudaDevice>>>> = OnceLock::new();
        let mut open = OPEN.get_or_init(Mutex::default).lock();
        if let Some(device) = open.get(&ordinal).and_then(Weak::upgrade) {
            return Ok(device);
        }
        let core = Arc::new(Core::open(ordinal)?);
        let of_thread = Arc::clone(&core);
        std::thread::Builder::new()
            .name(format!("pega-cuda-{ordinal}"))
            .spawn(move || engine::run(&of_thread))
            .map_err(|error| Error::from_io("starting the thread that queues copies", error))?;
        let device = Arc::new(Self(core));
        open.insert(ordinal, Arc::downgrade(&device));
        Ok(device)
    }
}

impl std::ops::Deref for CudaDevice {
    type Target = Arc<Core>;

    fn deref(&self) -> &Arc<Core> {
        &self.0
    }
}

impl Drop for CudaDevice {
    fn drop(&mut self) {
        // Jobs hold their memory and so this device: none is left. The thread may be the one that runs this.
        self.0.inbox.close();
    }
}

/// Where copies wait for the thread.
#[derive(Default)]
pub(super) struct Inbox {
    state: Mutex<InboxState>,
    changed: Condvar,
    /// Tickets handed out.
    accepted: Arc<AtomicUsize>,
}

#[derive(Default)]
struct InboxState {
    jobs: Vec<Job>,
    is_closed: bool,
}

/// The right to bring one job; held until it has ended.
pub(super) struct Ticket(Arc<AtomicUsize>);

impl Drop for Ticket {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Inbox {
    /// # Errors
    /// `Busy` with too many jobs, `Closed` if the thread has ended.
    pub(super) fn accept(&self) -> Result<Ticket> {
        let ticket = Ticket(Arc::clone(&self.accepted));
        if ticket.0.fetch_add(1, Ordering::AcqRel) >= JOBS_MAX {
            return Err(Error::new(ErrorKind::Busy, format!("the GPU has {JOBS_MAX} copies queued; try again later")));
        }
        if self.state.lock().is_closed {
            return Err(Error::new(ErrorKind::Closed, "the GPU's thread has ended; see the log"));
        }
        Ok(ticket)
    }

    /// Hands a job over. One that comes too late ends at once, when what it has queued has.
    pub(super) fn push(&self, job: Job) {
        let mut state = self.state.lock();
        if state.is_closed {
            drop(state);
            drop(job);
            return;
        }
        state.jobs.push(job);
        self.changed.notify_one();
    }

    /// What has come, after waiting for it: for `patience`, or as long as it takes. The second value is true once the
    /// inbox is closed.
    pub(super) fn take(&self, patience: Option<Duration>) -> (Vec<Job>, bool) {
        let mut state = self.state.lock();
        if state.jobs.is_empty() && !state.is_closed {
            match patience {
                Some(patience) => drop(self.changed.wait_for(&mut state, patience)),
                None => self.changed.wait(&mut state),
            }
        }
        (std::mem::take(&mut state.jobs), state.is_closed)
    }

    /// No job is taken any more; those that the thread has not taken yet end.
    pub(super) fn close(&self) {
        let mut state = self.state.lock();
        state.is_closed = true;
        let jobs = std::mem::take(&mut state.jobs);
        drop(state);
        self.changed.notify_one();
        drop(jobs);
    }
}
