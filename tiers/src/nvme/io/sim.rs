//! A drive in memory whose power can be cut. Each file has an image as programs see it and one as a power loss leaves it,
//! and the writes that lie between them: those since the last sync. [`SimDisk`] is the drive, which outlives the
//! processes that use it; [`SimIo`] is the engine of one of them.
//!
//! Nothing happens by itself: operations wait until [`SimDisk::step`] ends one, which one is drawn from the seed. What a
//! thread waits for (recovery, headers, superblocks: demand priority) ends at once, on that thread. So the same seed and
//! the same calls give the same history. Every operation has a number, and at any of them the power can be cut or a
//! fault injected.

mod file;

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;

use parking_lot::Mutex;
use rand::rngs::SmallRng;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};

use self::file::SimFile;
use super::operation::Operation;
use super::{BlockIo, FaultAction, IO_ALIGN, IoKind, IoPriority, IoRequest};
use crate::error::{Error, ErrorKind, Result};

/// The most operations that wait to be ended; more are refused as busy.
const PENDING_MAX: usize = 4096;
/// Larger transfers are cut, as everywhere.
const PIECE_BYTES: usize = 1 << 30;

/// What an operation of the simulation was.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum SimOperation {
    /// Of the drive.
    Drive(IoKind),
    /// A read of the index.
    IndexRead,
    /// A write or a sync of the index.
    IndexWrite,
    /// A write of a small file, or its sync.
    SmallFile,
}

/// How a life of the store ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SimCrash {
    /// Each write since the last sync is there, is not, or is there in part.
    PowerLoss,
    /// What was done stays, though it is no more durable than before; what was on its way may get there.
    Kill,
}

/// The drive, with its power. Shared by the engines of all lives of a store.
pub struct SimDisk {
    state: Mutex<State>,
}

struct State {
    random: SmallRng,
    /// By the number of the real file that stands for each: its name and length are real, its bytes are not.
    files: HashMap<u64, SimFile>,
    /// Their numbers in the order in which they came: the file system's own order differs from run to run.
    numbers: Vec<u64>,
    pending: Vec<InFlight>,
    /// Rises with every event, to tell what came before what.
    now: u64,
    operations: u64,
    kinds: Vec<SimOperation>,
    cut_at: u64,
    is_off: bool,
    is_inline: bool,
    faults: Vec<Planned>,
    /// A file whose device goes with the operation of this number.
    gone: Option<(u64, u64)>,
    fired: u64,
    failed_syncs: u64,
    is_told: bool,
    /// A digest of the history, to tell whether two were the same.
    trace: u64,
}

/// The images of a drive at one moment.
pub struct SavedImages(Vec<(u64, Vec<u8>)>);

/// A fault that will happen.
struct Planned {
    number: u64,
    /// Whether it waits for the next write or sync.
    is_of_write: bool,
    action: FaultAction,
}

/// An accepted operation.
struct InFlight {
    operation: Operation,
    file: u64,
    offset: u64,
    /// The number of its write in the file, or of the last event before a sync was asked for.
    mark: u64,
    fault: Option<FaultAction>,
}

impl SimDisk {
    /// An empty drive, with power; what happens by chance is drawn from `seed`.
    pub fn new(seed: u64) -> Arc<Self> {
        Arc::new(Self {
            state: Mutex::new(State {
                random: SmallRng::seed_from_u64(seed),
                files: HashMap::new(),
                numbers: Vec::new(),
                pending: Vec::new(),
                now: 0,
                operations: 0,
                kinds: Vec::new(),
                cut_at: u64::MAX,
                is_off: false,
                is_inline: false,
                faults: Vec::new(),
                gone: None,
                fired: 0,
                failed_syncs: 0,
                is_told: false,
                trace: 0,
            }),
        })
    }

    /// Ends one of the operations that wait, by chance; false if there is none.
    pub fn step(&self) -> bool {
        let mut state = self.state.lock();
        if state.pending.is_empty() {
            return false;
        }
        let count = state.pending.len();
        let chosen = state.random.random_range(0..count);
        let chosen = state.pending.swap_remove(chosen);
        drop(state);
        self.end(chosen);
        true
    }

    /// Whether operations end when they are submitted; otherwise they wait for [`SimDisk::step`].
    pub fn set_inline(&self, is_inline: bool) {
        self.state.lock().is_inline = is_inline;
    }

    /// Operations that wait.
    pub fn pending(&self) -> usize {
        self.state.lock().pending.len()
    }

    /// Operations so far, those of the index and of small files included.
    pub fn operations(&self) -> u64 {
        self.state.lock().operations
    }

    /// What each operation was, from the first on.
    pub fn history(&self) -> Vec<SimOperation> {
        self.state.lock().kinds.clone()
    }

    /// A digest of all operations so far: equal for equal histories.
    pub fn trace(&self) -> u64 {
        self.state.lock().trace
    }

    /// Lets the operation with this number, counted from 1, fail so. Its kind decides what an action means; where it
    /// means nothing, nothing happens.
    pub fn inject(&self, number: u64, action: FaultAction) {
        self.state.lock().faults.push(Planned { number, is_of_write: false, action });
    }

    /// The same for the first write or sync from this number on.
    pub fn inject_in_write(&self, number: u64, action: FaultAction) {
        self.state.lock().faults.push(Planned { number, is_of_write: true, action });
    }

    /// Lets the writes to a part of the files fail that wait to be ended; how many those are.
    pub fn fail_pending_writes(&self, part: Range<u64>) -> usize {
        let mut state = self.state.lock();
        let is_meant = |waits: &&mut InFlight| waits.operation.kind() == IoKind::Write && part.contains(&waits.offset);
        let failed =
            state.pending.iter_mut().filter(is_meant).map(|waits| waits.fault = Some(FaultAction::Errno(libc::EIO)));
        let failed = failed.count();
        state.fired += failed as u64;
        failed
    }

    /// Takes the device of a file away: every operation on it fails with ENXIO from the operation with this number on,
    /// until [`SimDisk::restart`] or [`SimDisk::bring_back`]. At most one is gone at a time.
    pub fn remove_at(&self, number: u64, file: &File) -> io::Result<()> {
        self.state.lock().gone = Some((number, file.metadata()?.ino()));
        Ok(())
    }

    /// The device that was taken away is there again.
    pub fn bring_back(&self) {
        self.state.lock().gone = None;
    }

    /// Says on standard error what is done and what fails.
    pub fn tell(&self) {
        self.state.lock().is_told = true;
    }

    /// How many faults have happened.
    pub fn fired(&self) -> u64 {
        self.state.lock().fired
    }

    /// How many syncs have failed with power: what they covered may be lost.
    pub fn failed_syncs(&self) -> u64 {
        self.state.lock().failed_syncs
    }

    /// Cuts the power in the middle of the operation with this number, counted from 1.
    pub fn cut_power_at(&self, number: u64) {
        self.state.lock().cut_at = number;
    }

    /// Cuts the power: from now on everything fails, and nothing more reaches the drive.
    pub fn cut_power(&self) {
        let mut state = self.state.lock();
        state.is_off = true;
        let pending = std::mem::take(&mut state.pending);
        drop(state);
        for in_flight in pending {
            in_flight.operation.finish(Err(no_power()));
        }
    }

    /// Whether there is no power.
    pub fn is_off(&self) -> bool {
        self.state.lock().is_off
    }

    /// The drive once more, after a loss of power or the end of the process; what is left is drawn from `seed`. To be
    /// called when nobody uses the drive any more.
    pub fn restart(&self, seed: u64, after: SimCrash) {
        let mut random = SmallRng::seed_from_u64(seed);
        let mut state = self.state.lock();
        let now = state.now;
        let State { numbers, files, .. } = &mut *state;
        for number in numbers {
            if let Some(file) = files.get_mut(number) {
                match after {
                    SimCrash::PowerLoss => file.lose_power(&mut random),
                    SimCrash::Kill => file.lose_process(&mut random, now),
                }
            }
        }
        state.random = random;
        (state.is_off, state.cut_at, state.is_inline, state.gone) = (false, u64::MAX, false, None);
    }

    /// Reads the image of a real file as programs see it.
    pub fn bytes_of(&self, file: &File, offset: u64, bytes: usize) -> io::Result<Vec<u8>> {
        let number = file.metadata()?.ino();
        let state = self.state.lock();
        let image = state.files.get(&number).map_or(&[][..], |file| file.live());
        let from = (offset as usize).min(image.len());
        Ok(image[from..(from + bytes).min(image.len())].to_vec())
    }

    /// Changes the image of a real file behind everybody's back, durably: decay.
    pub fn overwrite(&self, file: &File, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let number = file.metadata()?.ino();
        if let Some(file) = self.state.lock().files.get_mut(&number) {
            file.decay(offset as usize, bytes);
        }
        Ok(())
    }

    /// What programs see of all files, to be put back by [`SimDisk::load`].
    pub fn save(&self) -> SavedImages {
        let state = self.state.lock();
        SavedImages(state.files.iter().map(|(number, file)| (*number, file.live().to_vec())).collect())
    }

    /// Puts the images back, durably. To be called when nobody uses the drive.
    pub fn load(&self, saved: &SavedImages) {
        let mut state = self.state.lock();
        for (number, bytes) in &saved.0 {
            state.files.insert(*number, SimFile::holding(bytes.clone()));
        }
    }

    /// Counts an operation that is not of the drive.
    ///
    /// # Errors
    /// What it is to fail with.
    pub(crate) fn count(&self, what: SimOperation) -> Result<()> {
        let fault = {
            let mut state = self.state.lock();
            state.note(what, 0)
        };
        self.cut_if_due();
        if self.is_off() {
            return Err(no_power());
        }
        match fault {
            Some(FaultAction::Errno(errno)) => {
                self.state.lock().fired += 1;
                Err(Error::from_io("a planned fault", io::Error::from_raw_os_error(errno)))
            }
            _ => Ok(()),
        }
    }

    /// Changes the image of a file, which is made if it is not there.
    pub(crate) fn with_file<T>(&self, number: u64, change: impl FnOnce(&mut SimFile, u64) -> T) -> T {
        let mut state = self.state.lock();
        state.now += 1;
        let now = state.now;
        if !state.files.contains_key(&number) {
            state.numbers.push(number);
        }
        change(state.files.entry(number).or_default(), now)
    }

    fn cut_if_due(&self) {
        let state = self.state.lock();
        let is_due = state.operations >= state.cut_at && !state.is_off;
        drop(state);
        if is_due {
            self.cut_power();
        }
    }

    /// Takes an operation up: a write is on its way to the drive from now on.
    fn begin(&self, file: u64, request: IoRequest) -> InFlight {
        let mut state = self.state.lock();
        let mut fault = state.note(SimOperation::Drive(request.kind), request.offset);
        if state.is_gone(file) {
            fault = Some(FaultAction::Errno(libc::ENXIO));
        }
        let now = state.now;
        let mut mark = now;
        if let (IoKind::Write, Some(buffer), false) = (request.kind, &request.buffer, state.is_off) {
            let bytes = buffer.copy_of(buffer.bytes());
            let mut bytes = bytes.as_slice()[..buffer.bytes()].to_vec();
            let mut offset = request.offset;
            match fault {
                Some(FaultAction::FlipBit { byte, bit }) => {
                    let byte = byte % bytes.len();
                    bytes[byte] ^= 1 << (bit % 8);
                }
                Some(FaultAction::Misdirected { by }) => offset = offset.saturating_add(by),
                Some(FaultAction::Torn { bytes: kept }) => bytes.truncate(kept / IO_ALIGN * IO_ALIGN),
                Some(FaultAction::Lost | FaultAction::Errno(_)) => bytes.clear(),
                _ => {}
            }
            mark = state.files.entry(file).or_default().begin_write(offset, bytes, now);
        }
        if fault.is_some() {
            state.fired += 1;
        }
        // A single transfer can not be cut short of its first page.
        if matches!(fault, Some(FaultAction::Short { bytes }) if bytes < IO_ALIGN) {
            fault = None;
        }
        let offset = request.offset;
        InFlight { operation: Operation::new(request, true, PIECE_BYTES), file, offset, mark, fault }
    }

    /// Makes an operation, and calls its completion.
    fn end(&self, mut in_flight: InFlight) {
        loop {
            let outcome = self.state.lock().transfer(&mut in_flight);
            if let Some(result) = in_flight.operation.advance(outcome) {
                return in_flight.operation.finish(result);
            }
        }
    }
}

impl State {
    fn is_gone(&self, file: u64) -> bool {
        self.gone.is_some_and(|(number, gone)| gone == file && self.operations >= number)
    }

    /// Counts an operation; what is planned for it.
    fn note(&mut self, what: SimOperation, offset: u64) -> Option<FaultAction> {
        // Without power nothing happens; what threads still try depends on their timing.
        if self.is_off {
            return None;
        }
        self.operations += 1;
        self.now += 1;
        self.kinds.push(what);
        let mixed = (self.trace ^ offset ^ ((what.number() + 1) << 56)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        self.trace = mixed ^ (mixed >> 29);
        let number = self.operations;
        let is_write = !matches!(what, SimOperation::Drive(IoKind::Read) | SimOperation::IndexRead);
        let place = self.faults.iter().position(|planned| match planned.is_of_write {
            true => is_write && number >= planned.number,
            false => number == planned.number,
        });
        let action = place.map(|place| self.faults.swap_remove(place).action);
        if self.is_told {
            eprintln!("{number:>6}   {what:?} at {offset} {action:?}");
        }
        action
    }

    /// One system call of an operation.
    fn transfer(&mut self, in_flight: &mut InFlight) -> io::Result<usize> {
        if self.is_off {
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        self.now += 1;
        let now = self.now;
        if self.is_gone(in_flight.file) && !matches!(in_flight.fault, Some(FaultAction::Errno(_))) {
            // It was on its way when the device went.
            in_flight.fault = Some(FaultAction::Errno(libc::ENXIO));
            self.fired += 1;
        }
        let file = self.files.entry(in_flight.file).or_default();
        let operation = &mut in_flight.operation;
        let mut piece = operation.piece();
        match in_flight.fault {
            Some(FaultAction::Interrupted) => {
                in_flight.fault = None;
                return Err(io::Error::from_raw_os_error(libc::EINTR));
            }
            Some(FaultAction::Short { bytes }) if bytes < piece.bytes => {
                in_flight.fault = None;
                piece.bytes = bytes / IO_ALIGN * IO_ALIGN;
            }
            Some(FaultAction::Errno(errno)) => {
                if operation.kind() == IoKind::Sync {
                    // The kernel gives the data up and forgets about it: a later sync succeeds without them.
                    file.fail_sync(in_flight.mark, &mut self.random);
                    self.failed_syncs += 1;
                }
                return Err(io::Error::from_raw_os_error(errno));
            }
            _ => {}
        }
        match operation.kind() {
            IoKind::Sync => {
                if in_flight.fault != Some(FaultAction::Lost) {
                    file.sync(in_flight.mark);
                }
                Ok(0)
            }
            IoKind::Write => {
                file.end_write(in_flight.mark, piece.from..piece.from + piece.bytes, now);
                match in_flight.fault {
                    Some(FaultAction::Torn { .. }) => Err(io::Error::from_raw_os_error(libc::EIO)),
                    _ => Ok(piece.bytes),
                }
            }
            IoKind::Read => {
                if matches!(in_flight.fault, Some(FaultAction::Torn { .. })) {
                    return Err(io::Error::from_raw_os_error(libc::EIO));
                }
                let moved_by = match in_flight.fault {
                    Some(FaultAction::Misdirected { by }) => by,
                    _ => 0,
                };
                let image = file.live();
                let from = usize::try_from(piece.offset + moved_by).unwrap_or(usize::MAX).min(image.len());
                let bytes = &image[from..from.saturating_add(piece.bytes).min(image.len())];
                if let Some(buffer) = operation.buffer_mut()
                    && in_flight.fault != Some(FaultAction::Lost)
                {
                    buffer.fill(piece.from, bytes);
                    if let Some(FaultAction::FlipBit { byte, bit }) = in_flight.fault {
                        buffer.flip_bit(byte, bit);
                    }
                }
                Ok(bytes.len())
            }
        }
    }
}

impl SimOperation {
    fn number(self) -> u64 {
        match self {
            Self::Drive(kind) => kind as u64,
            Self::IndexRead => 3,
            Self::IndexWrite => 4,
            Self::SmallFile => 5,
        }
    }
}

/// The engine of one life of a store.
pub struct SimIo {
    disk: Arc<SimDisk>,
    files: Vec<(u64, File)>,
    depth: usize,
    is_closed: Mutex<bool>,
}

impl SimIo {
    /// An engine on `disk`; `files` are real files that stand for the images, which get their lengths.
    ///
    /// # Errors
    /// What the file system reports of them.
    pub fn open(disk: &Arc<SimDisk>, files: &[File], depth: usize) -> io::Result<Self> {
        let mut numbered = Vec::with_capacity(files.len());
        for file in files {
            let number = file.metadata()?.ino();
            disk.with_file(number, |_, _| ());
            numbered.push((number, file.try_clone()?));
        }
        Ok(Self { disk: Arc::clone(disk), files: numbered, depth, is_closed: Mutex::new(false) })
    }
}

impl BlockIo for SimIo {
    fn name(&self) -> &'static str {
        "simulated"
    }

    fn depth(&self) -> usize {
        self.depth
    }

    fn submit(&self, request: IoRequest) -> Result<(), (IoRequest, Error)> {
        if *self.is_closed.lock() {
            return Err((request, Error::new(ErrorKind::Closed, "the I/O engine is closed")));
        }
        let bytes = request.buffer.as_ref().map_or(0, super::IoBuffer::bytes);
        let is_aligned = [request.offset, bytes as u64].iter().all(|number| number.is_multiple_of(IO_ALIGN as u64));
        let Some((file, real)) = self.files.get(request.file.0 as usize).filter(|_| is_aligned) else {
            return Err((request, Error::new(ErrorKind::InvalidInput, "an unknown file, or no multiple of 4096")));
        };
        if self.disk.pending() >= PENDING_MAX {
            return Err((request, Error::new(ErrorKind::Busy, "too many operations wait for the simulated drive")));
        }
        // Files grow while they are open.
        if self.disk.with_file(*file, |image, _| image.live().len() as u64) < request.offset + bytes as u64 {
            let length = real.metadata().map_or(0, |file| file.len());
            self.disk.with_file(*file, |image, _| image.grow(length as usize));
        }
        let is_waited_for = request.priority == IoPriority::Demand;
        let in_flight = self.disk.begin(*file, request);
        self.disk.cut_if_due();
        let mut state = self.disk.state.lock();
        if is_waited_for || state.is_inline || state.is_off {
            drop(state);
            self.disk.end(in_flight);
        } else {
            state.pending.push(in_flight);
        }
        Ok(())
    }

    fn close(&self) {
        *self.is_closed.lock() = true;
        let mut state = self.disk.state.lock();
        // What was on its way when the process ended ends by itself: a kill is no power loss.
        let mut pending = std::mem::take(&mut state.pending);
        let State { random, .. } = &mut *state;
        pending.shuffle(random);
        drop(state);
        for in_flight in pending {
            self.disk.end(in_flight);
        }
    }
}

impl Drop for SimIo {
    fn drop(&mut self) {
        self.close();
    }
}

fn no_power() -> Error {
    Error::from_io("the simulated drive has no power", io::Error::from_raw_os_error(libc::EIO))
}
