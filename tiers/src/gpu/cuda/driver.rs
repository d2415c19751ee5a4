//! The CUDA driver as this crate uses it: presence, contexts, streams, events, memory, copies. Every call of the driver
//! stands in this file. Handles free themselves; none of them synchronizes the device while copies run.

use std::ffi::{CStr, c_int, c_uint, c_void};
use std::sync::{Arc, OnceLock};

use cudarc::driver::sys;
use parking_lot::Mutex;

use crate::error::{Error, ErrorKind, Result};

/// CUDA 12.0: the oldest driver that takes our PTX.
const DRIVER_VERSION_MIN: c_int = 12_000;
/// Events that are kept for reuse.
const POOLED_EVENTS_MAX: usize = 4096;

/// Fails unless there is a driver, new enough, with a GPU. The answer is found once per process.
pub(super) fn version() -> Result<c_int> {
    static VERSION: OnceLock<Result<c_int>> = OnceLock::new();
    VERSION
        .get_or_init(|| {
            let unsupported = |message: String| Err(Error::new(ErrorKind::Unsupported, message));
            // SAFETY: opens and closes the driver's library, whose initializers may run anywhere.
            if !unsafe { sys::is_culib_present() } {
                return unsupported("no CUDA driver: libcuda.so.1 is not on this host".into());
            }
            let mut version = 0;
            // SAFETY: the library is there; the pointer is valid for the call.
            check(unsafe { sys::cuDriverGetVersion(&mut version) }, "asking for the driver's version")?;
            if version < DRIVER_VERSION_MIN {
                return unsupported(format!(
                    "the NVIDIA driver is for CUDA {}.{}; install one for CUDA 12.0 or later",
                    version / 1000,
                    version % 1000 / 10
                ));
            }
            // SAFETY: the library is there; 0 is the only flag.
            match check(unsafe { sys::cuInit(0) }, "starting the CUDA driver") {
                Ok(()) => Ok(version),
                Err(error) => unsupported(error.message().to_string()),
            }
        })
        .clone()
}

/// How many GPUs there are.
///
/// # Errors
/// `Unsupported`, with the reason, where there is no usable driver.
pub(super) fn device_count() -> Result<u32> {
    version()?;
    let mut count = 0;
    // SAFETY: the driver is started; the pointer is valid for the call.
    check(unsafe { sys::cuDeviceGetCount(&mut count) }, "counting GPUs")?;
    Ok(count.unsigned_abs())
}

/// The error for a status of the driver; `doing` completes "... failed".
fn check(status: sys::CUresult, doing: &str) -> Result<()> {
    if status == sys::CUresult::CUDA_SUCCESS {
        return Ok(());
    }
    let kind = match status {
        sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY => ErrorKind::NoSpace,
        sys::CUresult::CUDA_ERROR_NO_DEVICE
        | sys::CUresult::CUDA_ERROR_INVALID_DEVICE
        | sys::CUresult::CUDA_ERROR_NOT_SUPPORTED
        | sys::CUresult::CUDA_ERROR_NO_BINARY_FOR_GPU
        | sys::CUresult::CUDA_ERROR_UNSUPPORTED_PTX_VERSION => ErrorKind::Unsupported,
        _ => ErrorKind::Io,
    };
    let mut name = std::ptr::null();
    // SAFETY: the driver writes a pointer to a string of its own, which lives as long as the library.
    let name = unsafe {
        match sys::cuGetErrorName(status, &mut name) {
            sys::CUresult::CUDA_SUCCESS if !name.is_null() => CStr::from_ptr(name).to_string_lossy().into_owned(),
            _ => format!("error {}", status as u32),
        }
    };
    Err(Error::new(kind, format!("{doing} failed: {name}")).with("cuda_status", status as u32))
}

/// Whether queued work has ended.
#[derive(Debug, Clone)]
pub(super) enum Progress {
    Pending,
    Ended,
    /// The context is lost: nothing of it runs any more, and what was copied is not to be trusted.
    Lost(Error),
    /// The driver did not answer: the work may still run.
    Unclear(Error),
}

/// The driver reports the failures of earlier work here. Only those that end the context end the copies; anything else
/// says nothing about them.
fn progress(status: sys::CUresult) -> Progress {
    use sys::CUresult as S;
    match status {
        S::CUDA_SUCCESS => Progress::Ended,
        S::CUDA_ERROR_NOT_READY => Progress::Pending,
        S::CUDA_ERROR_DEINITIALIZED
        | S::CUDA_ERROR_ECC_UNCORRECTABLE
        | S::CUDA_ERROR_NVLINK_UNCORRECTABLE
        | S::CUDA_ERROR_CONTAINED
        | S::CUDA_ERROR_ILLEGAL_ADDRESS
        | S::CUDA_ERROR_LAUNCH_TIMEOUT
        | S::CUDA_ERROR_CONTEXT_IS_DESTROYED
        | S::CUDA_ERROR_ASSERT
        | S::CUDA_ERROR_HARDWARE_STACK_ERROR
        | S::CUDA_ERROR_ILLEGAL_INSTRUCTION
        | S::CUDA_ERROR_MISALIGNED_ADDRESS
        | S::CUDA_ERROR_INVALID_ADDRESS_SPACE
        | S::CUDA_ERROR_INVALID_PC
        | S::CUDA_ERROR_LAUNCH_FAILED
        | S::CUDA_ERROR_EXTERNAL_DEVICE
        | S::CUDA_ERROR_UNKNOWN => match check(status, "work of this process on the GPU") {
            Err(error) => Progress::Lost(error),
            Ok(()) => Progress::Ended,
        },
        other => match check(other, "asking whether work on the GPU has ended") {
            Err(error) => Progress::Unclear(error),
            Ok(()) => Progress::Ended,
        },
    }
}

/// The primary context of a GPU, the one that torch uses too; retained until dropped.
pub(super) struct Context {
    raw: sys::CUcontext,
    device: sys::CUdevice,
    ordinal: u32,
}

// SAFETY: contexts may be made current in any thread, in several at once.
unsafe impl Send for Context {}
// SAFETY: as above.
unsafe impl Sync for Context {}

impl Context {
    pub(super) fn retain(ordinal: u32) -> Result<Arc<Self>> {
        version()?;
        let (mut device, mut raw) = (0, std::ptr::null_mut());
        let number = c_int::try_from(ordinal)
            .map_err(|_| Error::new(ErrorKind::InvalidInput, format!("there is no GPU {ordinal}")))?;
        // SAFETY: the driver is started; the pointers are valid for the calls.
        unsafe {
            check(sys::cuDeviceGet(&mut device, number), &format!("looking for GPU {ordinal}"))?;
            check(sys::cuDevicePrimaryCtxRetain(&mut raw, device), &format!("opening GPU {ordinal}"))?;
        }
        Ok(Arc::new(Self { raw, device, ordinal }))
    }

    pub(super) fn ordinal(&self) -> u32 {
        self.ordinal
    }

    /// Makes the context current in this thread until the guard is dropped, and leaves alone what another thread
    /// captures into a CUDA graph meanwhile.
    pub(super) fn enter(&self) -> Result<Entered<'_>> {
        // SAFETY: the context is retained.
        check(unsafe { sys::cuCtxPushCurrent_v2(self.raw) }, "making the GPU current")?;
        let mut mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
        // SAFETY: the pointer is valid for the call, which swaps the mode of this thread.
        let swapped = check(unsafe { sys::cuThreadExchangeStreamCaptureMode(&mut mode) }, "relaxing the capture mode");
        let entered =
            Entered { mode: swapped.is_ok().then_some(mode), _context: self, _thread: std::marker::PhantomData };
        swapped.map(|()| entered)
    }

    /// The GPU's UUID as 32 hexadecimal digits.
    pub(super) fn uuid(&self) -> Result<String> {
        let mut uuid = sys::CUuuid { bytes: [0; 16] };
        // SAFETY: the device is open; the pointer is valid for the call.
        check(unsafe { sys::cuDeviceGetUuid_v2(&mut uuid, self.device) }, "asking for the GPU's UUID")?;
        Ok(uuid.bytes.iter().map(|byte| format!("{byte:02x}")).collect())
    }

    /// The lowest and the highest priority of streams; the highest is the lower number.
    pub(super) fn priorities(&self) -> Result<(c_int, c_int)> {
        let _entered = self.enter()?;
        let (mut lowest, mut highest) = (0, 0);
        // SAFETY: the context is current; the pointers are valid for the call.
        check(unsafe { sys::cuCtxGetStreamPriorityRange(&mut lowest, &mut highest) }, "asking for stream priorities")?;
        Ok((lowest, highest))
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: retained once by `retain`; every handle of the context holds an `Arc` of it.
        if let Err(error) = check(unsafe { sys::cuDevicePrimaryCtxRelease_v2(self.device) }, "closing the GPU") {
            tracing::debug!(%error, "the context goes with the process");
        }
    }
}

/// While it lives the context is current in this thread.
pub(super) struct Entered<'a> {
    mode: Option<sys::CUstreamCaptureMode>,
    _context: &'a Context,
    /// What is current belongs to a thread.
    _thread: std::marker::PhantomData<*const ()>,
}

impl Drop for Entered<'_> {
    fn drop(&mut self) {
        let mut popped = std::ptr::null_mut();
        // SAFETY: undoes what `enter` did in this thread; the pointers are valid for the calls.
        unsafe {
            if let Some(mut mode) = self.mode {
                let _ = sys::cuThreadExchangeStreamCaptureMode(&mut mode);
            }
            let _ = sys::cuCtxPopCurrent_v2(&mut popped);
        }
    }
}

/// Frees a handle in its context; what the driver says is only of use to those who debug it.
fn free(context: &Context, what: &str, call: impl FnOnce() -> sys::CUresult) {
    let freed = context.enter().and_then(|_entered| check(call(), what));
    if let Err(error) = freed {
        tracing::debug!(%error, "a CUDA handle was not freed");
    }
}

/// A stream that waits for no other, the default stream included.
pub(super) struct Stream {
    raw: sys::CUstream,
    context: Arc<Context>,
}

// SAFETY: the driver takes stream handles in any thread.
unsafe impl Send for Stream {}
// SAFETY: as above.
unsafe impl Sync for Stream {}

impl Stream {
    pub(super) fn new(context: &Arc<Context>, priority: c_int) -> Result<Self> {
        let _entered = context.enter()?;
        let mut raw = std::ptr::null_mut();
        let flags = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as c_uint;
        // SAFETY: the context is current; the pointer is valid for the call.
        check(unsafe { sys::cuStreamCreateWithPriority(&mut raw, flags, priority) }, "creating a stream")?;
        Ok(Self { raw, context: Arc::clone(context) })
    }

    pub(super) fn handle(&self) -> StreamHandle {
        StreamHandle(self.raw)
    }

    /// Whether all that was queued has ended.
    pub(super) fn progress(&self) -> Progress {
        // SAFETY: the stream lives.
        progress(unsafe { sys::cuStreamQuery(self.raw) })
    }

    /// What is queued from now on waits for `event`.
    pub(super) fn wait_for(&self, event: &Event) -> Result<()> {
        self.handle().wait_for(event)
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        // SAFETY: created by `new`, and nobody else has it.
        free(&self.context, "destroying a stream", || unsafe { sys::cuStreamDestroy_v2(self.raw) });
    }
}

/// A stream by its handle: ours, or one of the caller.
#[derive(Clone, Copy)]
pub(super) struct StreamHandle(sys::CUstream);

impl StreamHandle {
    /// The handle that a caller gave. The driver refuses those it does not know.
    pub(super) fn foreign(handle: u64) -> Self {
        Self(handle as usize as sys::CUstream)
    }

    pub(super) fn wait_for(self, event: &Event) -> Result<()> {
        // SAFETY: the event lives; the driver keeps what it needs of it.
        check(unsafe { sys::cuStreamWaitEvent(self.0, event.raw, 0) }, "making a stream wait")
    }
}

/// A point in a stream.
pub(super) struct Event {
    raw: sys::CUevent,
    context: Arc<Context>,
}

// SAFETY: the driver takes event handles in any thread.
unsafe impl Send for Event {}
// SAFETY: as above.
unsafe impl Sync for Event {}

impl Event {
    fn new(context: &Arc<Context>, flags: sys::CUevent_flags) -> Result<Self> {
        let _entered = context.enter()?;
        let mut raw = std::ptr::null_mut();
        // SAFETY: the context is current; the pointer is valid for the call.
        check(unsafe { sys::cuEventCreate(&mut raw, flags as c_uint) }, "creating an event")?;
        Ok(Self { raw, context: Arc::clone(context) })
    }

    /// An event that can tell times.
    pub(super) fn timed(context: &Arc<Context>) -> Result<Self> {
        Self::new(context, sys::CUevent_flags::CU_EVENT_DEFAULT)
    }

    pub(super) fn record(&self, stream: StreamHandle) -> Result<()> {
        // SAFETY: the event lives; the driver checks the stream.
        check(unsafe { sys::cuEventRecord(self.raw, stream.0) }, "recording an event")
    }

    pub(super) fn progress(&self) -> Progress {
        // SAFETY: the event lives.
        progress(unsafe { sys::cuEventQuery(self.raw) })
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: created by `new`, and nobody else has it; the driver lets waits for it run to their end.
        free(&self.context, "destroying an event", || unsafe { sys::cuEventDestroy_v2(self.raw) });
    }
}

/// Events for reuse: making one costs more than recording it.
pub(super) struct Events {
    context: Arc<Context>,
    free: Mutex<Vec<Event>>,
}

/// An event of the pool, recorded; goes back when dropped.
pub(super) struct Recorded {
    event: Option<Event>,
    pool: Arc<Events>,
}

impl Events {
    pub(super) fn new(context: &Arc<Context>) -> Arc<Self> {
        Arc::new(Self { context: Arc::clone(context), free: Mutex::default() })
    }

    /// Records an event behind all that `stream` was given so far.
    pub(super) fn record(self: &Arc<Self>, stream: StreamHandle) -> Result<Recorded> {
        let pooled = self.free.lock().pop();
        let event = match pooled {
            Some(event) => event,
            None => Event::new(&self.context, sys::CUevent_flags::CU_EVENT_DISABLE_TIMING)?,
        };
        event.record(stream)?;
        Ok(Recorded { event: Some(event), pool: Arc::clone(self) })
    }
}

impl std::ops::Deref for Recorded {
    type Target = Event;

    #[expect(clippy::expect_used, reason = "only `drop` takes the event")]
    fn deref(&self) -> &Event {
        self.event.as_ref().expect("invariant: held until dropped")
    }
}

impl Drop for Recorded {
    fn drop(&mut self) {
        let mut free = self.pool.free.lock();
        if free.len() < POOLED_EVENTS_MAX {
            free.extend(self.event.take());
        }
    }
}

/// Memory of the GPU. Freeing it may wait for what runs there, so it goes only with a memory or a device.
pub(super) struct DeviceBuffer {
    address: u64,
    context: Arc<Context>,
}

impl DeviceBuffer {
    pub(super) fn new(context: &Arc<Context>, bytes: usize) -> Result<Self> {
        let _entered = context.enter()?;
        let mut address = 0;
        // SAFETY: the context is current; the pointer is valid for the call.
        check(unsafe { sys::cuMemAlloc_v2(&mut address, bytes) }, &format!("taking {bytes} bytes of GPU memory"))?;
        Ok(Self { address, context: Arc::clone(context) })
    }

    pub(super) fn address(&self) -> u64 {
        self.address
    }
}

impl Drop for DeviceBuffer {
    fn drop(&mut self) {
        // SAFETY: taken by `new`; whoever queues work on it holds it until that has ended.
        free(&self.context, "freeing GPU memory", || unsafe { sys::cuMemFree_v2(self.address) });
    }
}

/// Host memory that the GPU reaches. Freeing it may wait for what runs there.
pub(super) struct PinnedBuffer {
    start: *mut c_void,
    context: Arc<Context>,
}

// SAFETY: plain memory; who may touch it is the holder's to decide.
unsafe impl Send for PinnedBuffer {}
// SAFETY: as above.
unsafe impl Sync for PinnedBuffer {}

impl PinnedBuffer {
    pub(super) fn new(context: &Arc<Context>, bytes: usize) -> Result<Self> {
        let _entered = context.enter()?;
        let mut start = std::ptr::null_mut();
        // SAFETY: the context is current; the pointer is valid for the call.
        check(unsafe { sys::cuMemHostAlloc(&mut start, bytes, 0) }, &format!("pinning {bytes} bytes"))?;
        Ok(Self { start, context: Arc::clone(context) })
    }

    pub(super) fn address(&self) -> u64 {
        self.start as u64
    }
}

impl Drop for PinnedBuffer {
    fn drop(&mut self) {
        // SAFETY: taken by `new`; whoever queues work on it holds it until that has ended.
        free(&self.context, "freeing pinned memory", || unsafe { sys::cuMemFreeHost(self.start) });
    }
}

/// Registers host memory with the driver, so that the GPU reaches it at its host address.
///
/// # Safety
/// The range stays mapped until [`unregister`] has returned.
pub(super) unsafe fn register(context: &Context, start: u64, bytes: usize) -> Result<()> {
    let _entered = context.enter()?;
    let at = start as usize as *mut c_void;
    let mut seen = 0;
    let flags = sys::CU_MEMHOSTREGISTER_PORTABLE | sys::CU_MEMHOSTREGISTER_DEVICEMAP;
    // SAFETY: the caller's promise; the pointers are valid for the calls.
    unsafe {
        check(sys::cuMemHostRegister_v2(at, bytes, flags), &format!("registering {bytes} bytes of DRAM with CUDA"))?;
        check(sys::cuMemHostGetDevicePointer_v2(&mut seen, at, 0), "asking where the GPU sees DRAM")?;
    }
    if seen == start {
        return Ok(());
    }
    unregister(context, start);
    Err(Error::new(ErrorKind::Unsupported, "the GPU sees registered memory at another address than the host"))
}

/// Undoes [`register`]; no copy of the range may be in flight.
pub(super) fn unregister(context: &Context, start: u64) {
    // SAFETY: the driver refuses what it has not registered.
    free(context, "unregistering DRAM", || unsafe { sys::cuMemHostUnregister(start as usize as *mut c_void) });
}

/// Whether `address` is plain device memory of the GPU `ordinal`; the error says what else it is.
pub(super) fn check_device_memory(context: &Context, address: u64) -> Result<()> {
    use sys::CUpointer_attribute as A;
    let ordinal = context.ordinal();
    let ask = |attribute: A| -> Result<u32> {
        let mut value = 0u32;
        // SAFETY: each attribute asked for below is at most 4 bytes long; the pointer is valid for the call.
        let status = unsafe { sys::cuPointerGetAttribute((&raw mut value).cast(), attribute, address) };
        check(status, &format!("asking CUDA about address {address:#x}")).map(|()| value)
    };
    let bad = |what: String| {
        Err(Error::new(
            ErrorKind::InvalidInput,
            format!("address {address:#x} of the KV cache {what}; it must be device memory of GPU {ordinal}"),
        ))
    };
    match ask(A::CU_POINTER_ATTRIBUTE_MEMORY_TYPE) {
        Err(_) => return bad("is unknown to CUDA".into()),
        Ok(kind) if kind != sys::CUmemorytype::CU_MEMORYTYPE_DEVICE as u32 => {
            return bad("is host memory".into());
        }
        Ok(_) => {}
    }
    if ask(A::CU_POINTER_ATTRIBUTE_IS_MANAGED)? & 0xff != 0 {
        return bad("is managed memory, which moves".into());
    }
    match ask(A::CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL)? {
        found if found == ordinal => Ok(()),
        found => bad(format!("belongs to GPU {found}")),
    }
}

/// One copy between the GPU and host memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Transfer {
    pub(super) device: u64,
    pub(super) host: u64,
    pub(super) bytes: u64,
}

/// `CUmemcpyAttributes` as CUDA 12.8 defined it; unchanged since.
#[repr(C)]
struct CopyAttributes {
    source_order: c_uint,
    source_hint: [c_int; 2],
    destination_hint: [c_int; 2],
    flags: c_uint,
}

/// `cuMemcpyBatchAsync` as CUDA 12.8 defined it. Version 13.0 dropped the eighth parameter, under a versioned symbol.
type BatchCopy = unsafe extern "C" fn(
    *mut sys::CUdeviceptr,
    *mut sys::CUdeviceptr,
    *mut usize,
    usize,
    *mut CopyAttributes,
    *mut usize,
    usize,
    *mut usize,
    sys::CUstream,
) -> c_uint;
type ElapsedTime = unsafe extern "C" fn(*mut f32, sys::CUevent, sys::CUevent) -> c_uint;

const BATCH_COPY_VERSION: c_int = 12_080;

/// What differs between drivers, found at run time.
#[derive(Clone, Copy)]
pub(super) struct Symbols {
    batch_copy: Option<BatchCopy>,
    elapsed_time: Option<ElapsedTime>,
}

/// The driver's function `name` in the shape that it had in `since`.
fn symbol(name: &CStr, since: c_int) -> Option<*mut c_void> {
    let mut found = std::ptr::null_mut();
    let mut status = sys::CUdriverProcAddressQueryResult::CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND;
    // SAFETY: the driver is started; name and pointers are valid for the call.
    let result = unsafe { sys::cuGetProcAddress_v2(name.as_ptr(), &mut found, since, 0, &mut status) };
    (result == sys::CUresult::CUDA_SUCCESS && !found.is_null()).then_some(found)
}

impl Symbols {
    pub(super) fn find() -> Result<Self> {
        let version = version()?;
        let batch_copy =
            if version >= BATCH_COPY_VERSION { symbol(c"cuMemcpyBatchAsync", BATCH_COPY_VERSION) } else { None };
        // SAFETY: asked for by the version in which the function has this type.
        let batch_copy = batch_copy.map(|found| unsafe { std::mem::transmute::<*mut c_void, BatchCopy>(found) });
        let elapsed_time = symbol(c"cuEventElapsedTime", DRIVER_VERSION_MIN)
            // SAFETY: as above.
            .map(|found| unsafe { std::mem::transmute::<*mut c_void, ElapsedTime>(found) });
        Ok(Self { batch_copy, elapsed_time })
    }

    /// Milliseconds from one ended event to the other.
    pub(super) fn elapsed_ms(&self, from: &Event, to: &Event) -> Option<f32> {
        let mut elapsed = 0.0;
        // SAFETY: both events live; the pointer is valid for the call.
        let status = unsafe { self.elapsed_time?(&mut elapsed, from.raw, to.raw) };
        (status == 0).then_some(elapsed)
    }

    /// Queues copies, in any order among themselves. After an error some of them may have been queued.
    ///
    /// # Safety
    /// All addresses are of memory that stays in place until the stream has come past the copies, and of those read
    /// from the host nobody changes the bytes until then.
    pub(super) unsafe fn copy(&self, stream: &Stream, to_device: bool, transfers: &[Transfer]) -> Result<()> {
        let doing = if to_device { "copying to the GPU" } else { "copying from the GPU" };
        match (self.batch_copy, transfers) {
            (_, []) => Ok(()),
            (Some(batch_copy), [_, _, ..]) => {
                let mut device: Vec<u64> = transfers.iter().map(|transfer| transfer.device).collect();
                let mut host: Vec<u64> = transfers.iter().map(|transfer| transfer.host).collect();
                let mut sizes: Vec<usize> = transfers.iter().map(|transfer| transfer.bytes as usize).collect();
                let (to, from) = if to_device { (&mut device, &mut host) } else { (&mut host, &mut device) };
                // In the order of the stream (1), or at any time (3): a leased slot does not change.
                let order = if to_device { 3 } else { 1 };
                let mut attributes =
                    CopyAttributes { source_order: order, source_hint: [0; 2], destination_hint: [0; 2], flags: 0 };
                let (mut first, mut failed) = (0usize, usize::MAX);
                // SAFETY: the caller's promise for the addresses; the arrays, of equal length, live until the call returns.
                let status = unsafe {
                    batch_copy(
                        to.as_mut_ptr(),
                        from.as_mut_ptr(),
                        sizes.as_mut_ptr(),
                        transfers.len(),
                        &mut attributes,
                        &mut first,
                        1,
                        &mut failed,
                        stream.raw,
                    )
                };
                if status == 0 {
                    return Ok(());
                }
                Err(Error::new(ErrorKind::Io, format!("{doing} failed: CUDA error {status}")).with("copy", failed))
            }
            _ => transfers.iter().try_for_each(|transfer| {
                let (to, from) =
                    if to_device { (transfer.device, transfer.host) } else { (transfer.host, transfer.device) };
                // SAFETY: the caller's promise.
                check(unsafe { sys::cuMemcpyAsync(to, from, transfer.bytes as usize, stream.raw) }, doing)
            }),
        }
    }
}

/// Copies host bytes to the GPU and waits for the end, by polling. For tables made once.
///
/// # Safety
/// `to` has room for `bytes`.
pub(super) unsafe fn upload(stream: &Stream, events: &Arc<Events>, to: u64, bytes: &[u8]) -> Result<()> {
    // SAFETY: the caller's promise; pageable memory has been read when the call returns.
    let copied = unsafe { sys::cuMemcpyHtoDAsync_v2(to, bytes.as_ptr().cast(), bytes.len(), stream.raw) };
    check(copied, "copying a table to the GPU")?;
    let end = events.record(stream.handle())?;
    wait(|| end.progress())
}

/// Copies host bytes to the GPU; blocks until they are there.
///
/// # Safety
/// `to` has room for `bytes`.
pub(super) unsafe fn write(context: &Context, to: u64, bytes: &[u8]) -> Result<()> {
    let _entered = context.enter()?;
    // SAFETY: the caller's promise; the call returns when the bytes were read.
    check(unsafe { sys::cuMemcpyHtoD_v2(to, bytes.as_ptr().cast(), bytes.len()) }, "writing GPU memory")
}

/// Copies bytes of the GPU to the host; blocks until they are there.
///
/// # Safety
/// `bytes` bytes can be read at `from`.
pub(super) unsafe fn read(context: &Context, from: u64, bytes: &mut [u8]) -> Result<()> {
    let _entered = context.enter()?;
    // SAFETY: the caller's promise; the call returns when the bytes were written.
    check(unsafe { sys::cuMemcpyDtoH_v2(bytes.as_mut_ptr().cast(), from, bytes.len()) }, "reading GPU memory")
}

/// Waits for work that takes milliseconds.
pub(super) fn wait(mut progress: impl FnMut() -> Progress) -> Result<()> {
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(30);
    loop {
        match progress() {
            Progress::Ended => return Ok(()),
            Progress::Lost(error) => return Err(error),
            Progress::Pending | Progress::Unclear(_) if std::time::Instant::now() > deadline => {
                return Err(Error::new(ErrorKind::Timeout, "the GPU did not answer within 30 s"));
            }
            Progress::Pending | Progress::Unclear(_) => std::thread::sleep(std::time::Duration::from_micros(50)),
        }
    }
}

/// A kernel of a module made from PTX.
pub(super) struct Kernel {
    module: sys::CUmodule,
    function: sys::CUfunction,
    context: Arc<Context>,
}

// SAFETY: the driver takes module and function handles in any thread.
unsafe impl Send for Kernel {}
// SAFETY: as above.
unsafe impl Sync for Kernel {}

impl Kernel {
    /// Compiles PTX for the GPU.
    pub(super) fn load(context: &Arc<Context>, ptx: &CStr, name: &CStr) -> Result<Self> {
        let _entered = context.enter()?;
        let (mut module, mut function) = (std::ptr::null_mut(), std::ptr::null_mut());
        // SAFETY: the context is current; text and pointers are valid for the calls.
        unsafe {
            check(sys::cuModuleLoadData(&mut module, ptx.as_ptr().cast()), "loading the copy kernel")?;
            check(sys::cuModuleGetFunction(&mut function, module, name.as_ptr()), "finding the copy kernel")?;
        }
        Ok(Self { module, function, context: Arc::clone(context) })
    }

    /// Queues `grid` CTAs of `threads` with one parameter.
    ///
    /// # Safety
    /// The kernel takes one parameter of type `P`, and what it does with it is sound until it has ended.
    pub(super) unsafe fn launch<P>(&self, stream: &Stream, grid: u32, threads: u32, parameter: &P) -> Result<()> {
        let mut parameters = [std::ptr::from_ref(parameter).cast_mut().cast::<c_void>()];
        // SAFETY: the caller's promise; the driver reads the parameter before the call returns.
        let status = unsafe {
            sys::cuLaunchKernel(
                self.function,
                grid,
                1,
                1,
                threads,
                1,
                1,
                0,
                stream.raw,
                parameters.as_mut_ptr(),
                std::ptr::null_mut(),
            )
        };
        check(status, "starting the copy kernel")
    }
}

impl Drop for Kernel {
    fn drop(&mut self) {
        // SAFETY: loaded by `load`; whoever launched it holds it until that has ended.
        free(&self.context, "unloading the copy kernel", || unsafe { sys::cuModuleUnload(self.module) });
    }
}
