//! Arenas that the GPU reaches: registered with the driver window by window, in the background, and given back in the
//! background when the last copy has let go of them.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use rustix::mm::MprotectFlags;

use super::driver::{self, Context};
use super::plan::{ArenaSpan, windows};
use crate::dram::ArenaView;
use crate::error::{Error, ErrorKind, Result};

/// Bytes of a window. Registering one takes 60 ms; arenas hand out their first chunks first.
const WINDOW_BYTES: u64 = 1 << 30;
/// How long an attach waits for an earlier registration of the same memory to go: as long as copies may take.
const LEAVE_PATIENCE: Duration = Duration::from_secs(60);

#[derive(Default)]
struct State {
    /// Bytes, from the start, that the GPU reaches.
    ready_bytes: u64,
    is_claimed: bool,
    failed: Option<Error>,
}

/// An arena, registered as far as it has got. The windows are given back when the last holder is gone.
pub(super) struct Registration {
    state: Mutex<State>,
    is_detached: AtomicBool,
    pinned: Option<Pinned>,
}

/// What is registered. Dropping it takes 14 ms per GiB.
struct Pinned {
    context: Arc<Context>,
    view: Arc<ArenaView>,
    ready_bytes: u64,
    is_claimed: bool,
}

impl Drop for Pinned {
    fn drop(&mut self) {
        let start = address(&self.view);
        for window in windows(self.ready_bytes, WINDOW_BYTES) {
            driver::unregister(&self.context, start + window.start);
        }
        if self.is_claimed {
            unclaim((self.context.ordinal(), start));
        }
    }
}

fn address(view: &ArenaView) -> u64 {
    view.range().0.as_ptr() as u64
}

impl Registration {
    fn new(context: &Arc<Context>, view: &Arc<ArenaView>) -> Self {
        let pinned = Pinned { context: Arc::clone(context), view: Arc::clone(view), ready_bytes: 0, is_claimed: false };
        Self { state: Mutex::default(), is_detached: AtomicBool::new(false), pinned: Some(pinned) }
    }

    pub(super) fn span(&self) -> ArenaSpan {
        let start = self.pinned.as_ref().map_or(0, |pinned| address(&pinned.view));
        ArenaSpan { start, window_bytes: WINDOW_BYTES }
    }

    /// Whether the GPU reaches the first `bytes` by now.
    ///
    /// # Errors
    /// Why it never will.
    pub(super) fn is_ready(&self, bytes: u64) -> Result<bool> {
        let state = self.state.lock();
        match &state.failed {
            _ if state.ready_bytes >= bytes => Ok(true),
            None => Ok(false),
            Some(error) => Err(error.clone()),
        }
    }

    /// Registers window after window, until all are, one fails or the arena is detached.
    fn register(&self) {
        let Some(Pinned { context, view, .. }) = &self.pinned else { return };
        let (start, bytes) = (address(view), view.range().1 as u64);
        match claim((context.ordinal(), start)) {
            Ok(()) => self.state.lock().is_claimed = true,
            Err(error) => {
                self.state.lock().failed = Some(error);
                return;
            }
        }
        for window in windows(bytes, WINDOW_BYTES) {
            if self.is_detached.load(Ordering::Acquire) {
                return;
            }
            let registered = register_window(context, view, start + window.start, (window.end - window.start) as usize);
            let mut state = self.state.lock();
            match registered {
                Ok(()) => state.ready_bytes = window.end,
                Err(error) => {
                    let error = error.with("arena_bytes", bytes).with("registered_bytes", window.start);
                    tracing::error!(
                        error = format!("{error:#}"),
                        "the GPU cannot reach the arena; give less DRAM to the server, or this container more memory"
                    );
                    state.failed = Some(error);
                    return;
                }
            }
        }
        tracing::info!(bytes, gpu = context.ordinal(), "the GPU reaches the arena");
    }
}

fn register_window(context: &Context, view: &ArenaView, start: u64, bytes: usize) -> Result<()> {
    // An arena that was attached before is still closed to this process.
    protect(view, start, bytes, MprotectFlags::READ | MprotectFlags::WRITE);
    // SAFETY: the window lies in the view, whose mapping the registration holds until it has unregistered it.
    unsafe { driver::register(context, start, bytes) }?;
    protect(view, start, bytes, MprotectFlags::READ);
    Ok(())
}

/// Changes what this process itself may do with memory of another process: only read, once the GPU has it. A stray write
/// of the worker then cannot spoil blocks of others. Reading stays: for small copies the driver itself reads the bytes.
fn protect(view: &ArenaView, start: u64, bytes: usize, flags: MprotectFlags) {
    if !view.is_foreign() {
        return;
    }
    // SAFETY: the window lies in the view, a mapping of its own through which this process forms no references.
    if let Err(error) = unsafe { rustix::mm::mprotect(start as usize as *mut _, bytes, flags) } {
        tracing::warn!(%error, bytes, "the arena's memory keeps its protection");
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        let Some(mut pinned) = self.pinned.take() else { return };
        let state = self.state.get_mut();
        (pinned.ready_bytes, pinned.is_claimed) = (state.ready_bytes, state.is_claimed);
        // If there can be no thread, the closure is dropped here, and with it what it holds.
        let _ = std::thread::Builder::new().name("pega-cuda-free".into()).spawn(move || drop(pinned));
    }
}

/// The arenas of a GPU, by where they are mapped, each with how often it is attached.
#[derive(Default)]
pub(super) struct Arenas(Mutex<HashMap<u64, (Arc<Registration>, usize)>>);

/// A GPU, and where an arena is mapped.
type Registered = (u32, u64);

/// What is registered with the driver, which registers nothing twice: an arena that is attached again waits until its
/// earlier registration has gone. Of the whole process, because a device that is opened again does not know its
/// predecessor's.
static REGISTERED: (Mutex<Vec<Registered>>, Condvar) = (Mutex::new(Vec::new()), Condvar::new());

/// Waits for an earlier registration to go, and notes the new one.
fn claim(registered: Registered) -> Result<()> {
    let deadline = Instant::now() + LEAVE_PATIENCE;
    let mut all = REGISTERED.0.lock();
    while all.contains(&registered) {
        if REGISTERED.1.wait_until(&mut all, deadline).timed_out() {
            let message = format!("the GPU has not let go of the arena within {} s", LEAVE_PATIENCE.as_secs());
            return Err(Error::new(ErrorKind::Timeout, message));
        }
    }
    all.push(registered);
    Ok(())
}

fn unclaim(registered: Registered) {
    REGISTERED.0.lock().retain(|known| *known != registered);
    REGISTERED.1.notify_all();
}

impl Arenas {
    /// Starts to register an arena, unless it is attached already, which is counted; `then` runs behind it on the same thread.
    pub(super) fn attach(
        &self,
        context: &Arc<Context>,
        view: &Arc<ArenaView>,
        then: impl FnOnce() + Send + 'static,
    ) -> Result<()> {
        let mut arenas = self.0.lock();
        let entry = match arenas.entry(address(view)) {
            Entry::Vacant(entry) => entry,
            Entry::Occupied(mut known) => {
                known.get_mut().1 += 1;
                return Ok(());
            }
        };
        let registration = Arc::new(Registration::new(context, view));
        let registering = Arc::clone(&registration);
        std::thread::Builder::new()
            .name("pega-cuda-attach".into())
            .spawn(move || {
                registering.register();
                drop(registering);
                then();
            })
            .map_err(|error| Error::from_io("starting the thread that registers the arena", error))?;
        entry.insert((registration, 1));
        Ok(())
    }

    pub(super) fn get(&self, view: &ArenaView) -> Option<Arc<Registration>> {
        self.0.lock().get(&address(view)).map(|(registration, _)| Arc::clone(registration))
    }

    /// Undoes one `attach`; the last one lets go of the arena. Copies hold it until they have ended.
    pub(super) fn detach(&self, view: &ArenaView) {
        let mut arenas = self.0.lock();
        let Entry::Occupied(mut known) = arenas.entry(address(view)) else { return };
        known.get_mut().1 -= 1;
        if known.get().1 > 0 {
            return;
        }
        let (registration, _) = known.remove();
        drop(arenas);
        registration.is_detached.store(true, Ordering::Release);
    }
}
