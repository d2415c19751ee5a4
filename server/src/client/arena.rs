//! The server's arena in this process: mapped once for each arena, reached by the worker's device, and given back when the
//! last copy has ended. A new session with the same server goes on with the same mapping.

use std::collections::HashMap;
use std::os::fd::BorrowedFd;
use std::sync::{Arc, LazyLock, Weak};

use parking_lot::Mutex;
use pegaflow_engine::{ArenaId, ArenaView, DeviceMemory, Result};

use crate::memory_socket::ArenaConnection;

/// The arenas that are mapped in this process: two clients of one server share a mapping, and what the device has made
/// of it.
static MAPPED: LazyLock<Mutex<HashMap<ArenaId, Weak<ArenaView>>>> = LazyLock::new(Mutex::default);

/// Maps an arena, or finds it mapped.
///
/// # Errors
/// Those of [`ArenaView::map`].
pub(super) fn map(fd: BorrowedFd<'_>, id: ArenaId, bytes: u64) -> Result<Arc<ArenaView>> {
    let mut mapped = MAPPED.lock();
    mapped.retain(|_, view| view.strong_count() > 0);
    if let Some(view) = mapped.get(&id).and_then(Weak::upgrade) {
        return Ok(view);
    }
    let view = ArenaView::map(fd, id, bytes)?;
    mapped.insert(id, Arc::downgrade(&view));
    Ok(view)
}

/// An arena that the device can reach, or will soon.
pub(super) struct MappedArena {
    pub(super) view: Arc<ArenaView>,
    memory: Arc<dyn DeviceMemory>,
}

impl MappedArena {
    /// # Errors
    /// Those of the device.
    pub(super) fn new(view: Arc<ArenaView>, memory: Arc<dyn DeviceMemory>) -> Result<Self> {
        memory.attach(&view)?;
        Ok(Self { view, memory })
    }

    pub(super) fn id(&self) -> ArenaId {
        self.view.id()
    }
}

impl Drop for MappedArena {
    fn drop(&mut self) {
        self.memory.detach(&self.view);
    }
}

/// The arena as one session has it. Every copy holds it; dropping the last tells the server that none can touch the arena
/// any more.
pub(super) struct SessionArena {
    pub(super) mapped: Arc<MappedArena>,
    pub(super) _connection: ArenaConnection,
}
