//! A GPU must give back the bytes that it was given: whatever the layout, the places and the method, under cancels and
//! detaches, and in the order of the streams. Where there is no GPU every test passes and says so.
#![expect(clippy::unwrap_used, clippy::expect_used, reason = "a test")]

use std::ffi::c_void;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, bounded};
use cudarc::driver::sys;
use pegaflow_tiers::{
    Arena, ArenaConfig, ArenaView, CopyDirection, CudaMemory, DeviceMemory, Error, ErrorKind, Fence, Fragment,
    PlacedCopy, RangeFragment, Slot, gpu_count,
};
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rand::{Rng, RngCore, SeedableRng};

const PATIENCE: Duration = Duration::from_secs(60);

/// Memory of GPU 0.
struct Gpu {
    start: u64,
    bytes: usize,
}

/// Makes GPU 0 current in this thread.
fn enter() {
    let (mut device, mut context) = (0, std::ptr::null_mut());
    // SAFETY: there is a driver, see `has_gpu`; the primary context is retained for the whole process.
    unsafe {
        sys::cuInit(0).result().unwrap();
        sys::cuDeviceGet(&mut device, 0).result().unwrap();
        sys::cuDevicePrimaryCtxRetain(&mut context, device).result().unwrap();
        sys::cuCtxSetCurrent(context).result().unwrap();
    }
}

impl Gpu {
    fn new(bytes: usize) -> Self {
        enter();
        let mut start = 0;
        // SAFETY: the context is current.
        unsafe { sys::cuMemAlloc_v2(&mut start, bytes).result().unwrap() };
        Self { start, bytes }
    }

    fn write(&self, from: &[u8]) {
        assert_eq!(from.len(), self.bytes);
        // SAFETY: the memory has that length.
        unsafe { sys::cuMemcpyHtoD_v2(self.start, from.as_ptr().cast(), from.len()).result().unwrap() };
    }

    fn read(&self) -> Vec<u8> {
        let mut to = vec![0; self.bytes];
        // SAFETY: the memory has that length.
        unsafe { sys::cuMemcpyDtoH_v2(to.as_mut_ptr().cast(), self.start, to.len()).result().unwrap() };
        to
    }
}

impl Drop for Gpu {
    fn drop(&mut self) {
        // SAFETY: allocated by `new`; the memory that describes it is gone.
        let _ = unsafe { sys::cuMemFree_v2(self.start) };
    }
}

fn has_gpu() -> bool {
    match gpu_count() {
        Ok(count) if count > 0 => {
            enter();
            true
        }
        Ok(_) => {
            println!("skipped: no CUDA device");
            false
        }
        Err(error) => {
            assert_eq!(error.kind(), ErrorKind::Unsupported);
            println!("skipped: no CUDA device ({error})");
            false
        }
    }
}

/// Layers with a fragment of every block, a guard of 4 KiB behind each.
struct Layers {
    layers: Vec<Arc<Gpu>>,
    memory: Arc<CudaMemory>,
    blocks: u32,
    fragments: Vec<(usize, usize)>,
}

impl Layers {
    /// `fragments`: bytes and stride in each layer.
    fn new(blocks: u32, fragments: &[(usize, usize)], method: Option<&str>) -> Self {
        let layers: Vec<_> =
            fragments.iter().map(|(_, stride)| Arc::new(Gpu::new(stride * blocks as usize + 4096))).collect();
        let ranges: Vec<_> = layers.iter().map(|layer| (layer.start, layer.bytes as u64 - 4096)).collect();
        let described = fragments.iter().zip(0..).map(|((bytes, stride), range)| RangeFragment {
            range,
            fragment: Fragment { offset: 0, stride: *stride as u64, bytes: *bytes as u64 },
        });
        // SAFETY: the memory holds the layers.
        let mut memory =
            unsafe { CudaMemory::new(0, &ranges, described.collect(), blocks, Box::new(layers.clone())) }.unwrap();
        if let Some(method) = method {
            memory.force_method(method).unwrap();
        }
        Self { layers, memory: Arc::new(memory), blocks, fragments: fragments.to_vec() }
    }

    fn block_bytes(&self) -> usize {
        self.fragments.iter().map(|(bytes, _)| bytes).sum()
    }

    fn fill(&self, random: &mut StdRng) -> Vec<Vec<u8>> {
        let fill = |layer: &Arc<Gpu>| {
            let mut bytes = vec![0; layer.bytes];
            random.fill_bytes(&mut bytes);
            layer.write(&bytes);
            bytes
        };
        self.layers.iter().map(fill).collect()
    }

    fn read(&self) -> Vec<Vec<u8>> {
        self.layers.iter().map(|layer| layer.read()).collect()
    }

    /// The block as it lies in a slot.
    fn block_of(&self, layers: &[Vec<u8>], block: u32) -> Vec<u8> {
        let fragment =
            |(layer, (bytes, stride)): (&Vec<u8>, &(usize, usize))| layer[block as usize * stride..][..*bytes].to_vec();
        layers.iter().zip(&self.fragments).flat_map(fragment).collect()
    }

    fn put(&self, layers: &mut [Vec<u8>], block: u32, bytes: &[u8]) {
        let mut at = 0;
        for (layer, (length, stride)) in layers.iter_mut().zip(&self.fragments) {
            layer[block as usize * stride..][..*length].copy_from_slice(&bytes[at..at + length]);
            at += length;
        }
    }
}

type Ended = Receiver<Result<(), Error>>;

struct Placed {
    arena: Arc<Arena>,
    view: Arc<ArenaView>,
}

impl Placed {
    fn new(bytes: u64) -> Self {
        let arena = Arena::new(ArenaConfig { touch: false, ..ArenaConfig::new(bytes) }).unwrap();
        Self { view: arena.view(), arena }
    }

    fn attach(&self, memory: &CudaMemory) {
        memory.attach(&self.view).unwrap();
        let start = Instant::now();
        while !memory.is_attached(&self.view).unwrap() {
            assert!(start.elapsed() < PATIENCE, "the arena is never attached");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn slots(&self, count: usize, bytes: usize, random: &mut StdRng) -> Vec<Slot> {
        let mut slots: Vec<_> = (0..count).map(|_| self.arena.alloc(bytes).expect("room")).collect();
        slots.shuffle(random);
        slots
    }

    fn copy(&self, direction: CopyDirection, blocks: &[u32], slots: &[Slot]) -> (PlacedCopy, Ended) {
        let (done, ended) = bounded(2);
        let copy = PlacedCopy {
            arena: Arc::clone(&self.view),
            direction,
            blocks: blocks.iter().copied().zip(slots.iter().map(Slot::place)).collect(),
            after: None,
            cancelled: Arc::default(),
            done: Box::new(move |result| done.send(result).unwrap()),
        };
        (copy, ended)
    }
}

fn end(ended: &Ended) -> Result<(), ErrorKind> {
    ended.recv_timeout(PATIENCE).expect("copies end").map_err(|error| error.kind())
}

/// Saves some blocks, wipes the device, loads them elsewhere; everything must be where it should, nothing else changed.
fn round_trip(layers: &Layers, placed: &Placed, random: &mut StdRng, count: usize, urgent: bool) {
    let before = layers.fill(random);
    let mut numbers: Vec<u32> = (0..layers.blocks).collect();
    numbers.shuffle(random);
    let from = numbers[..count].to_vec();
    let slots = placed.slots(count, layers.block_bytes(), random);
    let (copy, ended) = placed.copy(CopyDirection::ToSlots, &from, &slots);
    Arc::clone(&layers.memory).start(copy);
    end(&ended).unwrap();
    let saved: Vec<_> = from.iter().map(|block| layers.block_of(&before, *block)).collect();
    // The process that maps an arena by descriptor cannot read it itself.
    if !placed.view.is_foreign() {
        for (saved, slot) in saved.iter().zip(&slots) {
            assert!(slot.payload()[..saved.len()] == saved[..], "a block was saved wrongly");
        }
    }
    let mut expected = layers.fill(random);
    numbers.shuffle(random);
    let to = &numbers[..count];
    let (copy, ended) = placed.copy(CopyDirection::ToDevice, to, &slots);
    let stream = Stream::new();
    if urgent {
        Arc::clone(&layers.memory).load_before(copy, stream.0 as u64).unwrap();
    } else {
        Arc::clone(&layers.memory).start(copy);
    }
    end(&ended).unwrap();
    for (block, saved) in to.iter().zip(&saved) {
        layers.put(&mut expected, *block, saved);
    }
    for (layer, (is, should)) in layers.read().iter().zip(&expected).enumerate() {
        assert!(is == should, "layer {layer} was loaded wrongly");
    }
}

struct Stream(sys::CUstream);

impl Stream {
    fn new() -> Self {
        let mut stream = std::ptr::null_mut();
        // SAFETY: the context is current.
        unsafe { sys::cuStreamCreate(&mut stream, 1).result().unwrap() };
        Self(stream)
    }

    fn wait(&self) {
        // SAFETY: the stream lives.
        unsafe { sys::cuStreamSynchronize(self.0).result().unwrap() };
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        // SAFETY: made by `new`.
        let _ = unsafe { sys::cuStreamDestroy_v2(self.0) };
    }
}

/// Holds a stream until it is opened: the GPU waits for a word of host memory.
struct Gate {
    word: *mut u32,
}

impl Gate {
    fn close(stream: &Stream) -> Self {
        let mut word: *mut c_void = std::ptr::null_mut();
        // SAFETY: the context is current; the word is never freed.
        unsafe {
            sys::cuMemHostAlloc(&mut word, 4096, 2).result().unwrap();
            word.cast::<u32>().write_volatile(0);
            sys::cuStreamWaitValue32_v2(stream.0, word as u64, 1, 0).result().unwrap();
        }
        Self { word: word.cast() }
    }

    fn open(&self) {
        // SAFETY: the word is allocated; the GPU only reads it.
        unsafe { self.word.write_volatile(1) };
    }
}

impl Drop for Gate {
    fn drop(&mut self) {
        // A failed test must not hang in the driver.
        self.open();
    }
}

#[test]
fn blocks_come_back_bit_for_bit_by_every_method() {
    if !has_gpu() {
        return;
    }
    let seed = rand::random();
    println!("seed {seed}");
    let mut random = StdRng::seed_from_u64(seed);
    let placed = Placed::new(512 << 20);
    for case in 0..24 {
        let method = [None, Some("batch"), Some("staged"), Some("kernel")][case % 4];
        let count = random.random_range(1..20);
        let fragments: Vec<_> = (0..count)
            .map(|_| {
                let bytes = random.random_range(1..8192) * 16;
                (bytes, bytes + random.random_range(0..64) * 16)
            })
            .collect();
        let blocks = random.random_range(1..64);
        let layers = Layers::new(blocks, &fragments, method);
        placed.attach(&layers.memory);
        let count = random.random_range(1..=blocks as usize);
        println!("{method:?}: {count} of {blocks} blocks of {} in {} fragments", layers.block_bytes(), fragments.len());
        for urgent in [false, true] {
            round_trip(&layers, &placed, &mut random, count, urgent);
        }
    }
}

#[test]
fn blocks_larger_than_a_piece_and_many_small_ones_come_back() {
    if !has_gpu() {
        return;
    }
    let mut random = StdRng::seed_from_u64(7);
    let placed = Placed::new(512 << 20);
    for method in ["batch", "staged", "kernel"] {
        for (blocks, fragments) in
            [(3, vec![(24 << 20, 24 << 20), (1 << 20, 2 << 20)]), (1500, vec![(4096, 4096), (1024, 2048)])]
        {
            let layers = Layers::new(blocks, &fragments, Some(method));
            placed.attach(&layers.memory);
            for urgent in [false, true] {
                round_trip(&layers, &placed, &mut random, blocks as usize, urgent);
            }
        }
    }
}

#[test]
fn a_slot_over_the_end_of_a_window_is_copied() {
    if !has_gpu() {
        return;
    }
    let mut random = StdRng::seed_from_u64(8);
    let placed = Placed::new(1200 << 20);
    // The slots of 96 MiB lie one after the other: one of them over the end of the first GiB.
    for method in ["batch", "staged", "kernel"] {
        let layers = Layers::new(11, &[(64 << 20, 64 << 20), (31 << 20, 31 << 20)], Some(method));
        placed.attach(&layers.memory);
        round_trip(&layers, &placed, &mut random, 11, method == "staged");
    }
}

#[test]
fn a_load_runs_between_what_was_queued_before_and_after() {
    if !has_gpu() {
        return;
    }
    let placed = Placed::new(64 << 20);
    for method in ["batch", "staged", "kernel"] {
        let layers = Layers::new(8, &[(64 << 10, 64 << 10), (64 << 10, 64 << 10)], Some(method));
        placed.attach(&layers.memory);
        let mut slots = placed.slots(8, layers.block_bytes(), &mut StdRng::seed_from_u64(9));
        slots.iter_mut().for_each(|slot| slot.payload_mut().fill(7));
        let stream = Stream::new();
        let seen = Gpu::new(8 * (64 << 10));
        let gate = Gate::close(&stream);
        // Before the load the stream writes 1 everywhere, after it the stream looks.
        // SAFETY: the layers and `seen` live until the stream has run.
        unsafe { sys::cuMemsetD8Async(layers.layers[0].start, 1, seen.bytes, stream.0).result().unwrap() };
        let (copy, ended) = placed.copy(CopyDirection::ToDevice, &[0, 1, 2, 3, 4, 5, 6, 7], &slots);
        Arc::clone(&layers.memory).load_before(copy, stream.0 as u64).unwrap();
        // SAFETY: as above.
        unsafe {
            sys::cuMemcpyDtoDAsync_v2(seen.start, layers.layers[0].start, seen.bytes, stream.0).result().unwrap();
        }
        assert!(ended.recv_timeout(Duration::from_millis(200)).is_err(), "the load overtook the stream");
        gate.open();
        end(&ended).unwrap();
        stream.wait();
        assert!(seen.read().iter().all(|byte| *byte == 7), "the stream did not wait for the load");
    }
}

#[test]
fn a_copy_waits_for_its_fence_and_can_be_cancelled_meanwhile() {
    if !has_gpu() {
        return;
    }
    let placed = Placed::new(64 << 20);
    let layers = Layers::new(8, &[(64 << 10, 64 << 10), (64 << 10, 64 << 10)], None);
    placed.attach(&layers.memory);
    let slots = placed.slots(2, layers.block_bytes(), &mut StdRng::seed_from_u64(10));
    let stream = Stream::new();
    let gate = Gate::close(&stream);
    for layer in &layers.layers {
        // SAFETY: the layers live until the stream has run.
        unsafe { sys::cuMemsetD8Async(layer.start, 9, layer.bytes, stream.0).result().unwrap() };
    }
    let fence = layers.memory.fence(stream.0 as u64).unwrap();
    let start = |slots: &[Slot]| {
        let (mut copy, ended) = placed.copy(CopyDirection::ToSlots, &[0], slots);
        copy.after = fence.clone();
        let cancelled = Arc::clone(&copy.cancelled);
        Arc::clone(&layers.memory).start(copy);
        (ended, cancelled)
    };
    let (first, cancelled) = start(&slots[..1]);
    let (second, _) = start(&slots[1..]);
    cancelled.store(true, Ordering::Release);
    assert_eq!(end(&first), Err(ErrorKind::Cancelled));
    // A copy without a fence passes those that wait.
    let other = placed.slots(1, layers.block_bytes(), &mut StdRng::seed_from_u64(11));
    let (copy, third) = placed.copy(CopyDirection::ToSlots, &[1], &other);
    Arc::clone(&layers.memory).start(copy);
    end(&third).unwrap();
    assert!(second.try_recv().is_err(), "the save overtook its fence");
    gate.open();
    end(&second).unwrap();
    assert!(slots[1].payload()[..layers.block_bytes()].iter().all(|byte| *byte == 9));
}

#[test]
fn a_cancel_in_the_middle_answers_once_when_nothing_runs() {
    if !has_gpu() {
        return;
    }
    let placed = Placed::new(1100 << 20);
    let layers = Layers::new(256, &[(2 << 20, 2 << 20), (2 << 20, 2 << 20)], None);
    placed.attach(&layers.memory);
    let slots = placed.slots(200, layers.block_bytes(), &mut StdRng::seed_from_u64(12));
    let blocks: Vec<u32> = (0..200).collect();
    for direction in [CopyDirection::ToDevice, CopyDirection::ToSlots] {
        let (copy, ended) = placed.copy(direction, &blocks, &slots);
        let cancelled = Arc::clone(&copy.cancelled);
        Arc::clone(&layers.memory).start(copy);
        std::thread::sleep(Duration::from_millis(2));
        cancelled.store(true, Ordering::Release);
        let outcome = end(&ended);
        println!("{direction:?}: {outcome:?}");
        assert!(matches!(outcome, Ok(()) | Err(ErrorKind::Cancelled)));
        assert!(ended.recv_timeout(Duration::from_millis(20)).is_err(), "it answered twice");
    }
}

#[test]
fn an_arena_may_be_detached_while_it_is_copied_and_mapped_again() {
    if !has_gpu() {
        return;
    }
    let mut random = StdRng::seed_from_u64(13);
    // As a worker has it: mapped by descriptor, closed to that mapping while attached.
    let arena = Arena::new(ArenaConfig { is_shared: true, ..ArenaConfig::new(512 << 20) }).unwrap();
    let layers = Layers::new(100, &[(2 << 20, 2 << 20), (2 << 20, 2 << 20)], None);
    for _ in 0..3 {
        let view = ArenaView::map(arena.fd().unwrap(), arena.id(), arena.capacity_bytes()).unwrap();
        let placed = Placed { arena: Arc::clone(&arena), view };
        placed.attach(&layers.memory);
        round_trip(&layers, &placed, &mut random, 50, true);
        let slots = placed.slots(50, layers.block_bytes(), &mut random);
        let before = layers.fill(&mut random);
        let blocks: Vec<u32> = (0..50).collect();
        let (copy, ended) = placed.copy(CopyDirection::ToSlots, &blocks, &slots);
        Arc::clone(&layers.memory).start(copy);
        layers.memory.detach(&placed.view);
        end(&ended).unwrap();
        for (block, slot) in blocks.iter().zip(&slots) {
            assert!(slot.payload() == layers.block_of(&before, *block), "block {block} was saved wrongly");
        }
    }
}

#[test]
fn copies_of_an_arena_that_is_being_attached_wait_for_it() {
    if !has_gpu() {
        return;
    }
    let placed = Placed::new(512 << 20);
    let layers = Layers::new(4, &[(64 << 10, 64 << 10), (64 << 10, 64 << 10)], None);
    let slots = placed.slots(1, layers.block_bytes(), &mut StdRng::seed_from_u64(14));
    let (copy, ended) = placed.copy(CopyDirection::ToDevice, &[0], &slots);
    let refused = Arc::clone(&layers.memory).load_before(copy, 0).map_err(|error| error.kind());
    assert_eq!(refused, Err(ErrorKind::Busy));
    assert!(ended.try_recv().is_err(), "a load that was refused does not answer");
    let (copy, ended) = placed.copy(CopyDirection::ToSlots, &[0], &slots);
    Arc::clone(&layers.memory).start(copy);
    layers.memory.attach(&placed.view).unwrap();
    layers.memory.attach(&placed.view).unwrap();
    end(&ended).unwrap();
}

#[test]
fn wrong_memories_places_and_fences_are_refused() {
    if !has_gpu() {
        return;
    }
    let host = vec![0u8; 8192];
    let gpu = Arc::new(Gpu::new(8192));
    let fragment =
        |offset, stride, bytes| vec![RangeFragment { range: 0, fragment: Fragment { offset, stride, bytes } }];
    let make = |start: u64, bytes, fragments| {
        let owner = Box::new(Arc::clone(&gpu));
        // SAFETY: what is accepted below is held.
        unsafe { CudaMemory::new(0, &[(start, bytes)], fragments, 2, owner) }
    };
    for (start, bytes, fragments) in [
        (host.as_ptr() as u64, 8192, fragment(0, 4096, 4096)),
        (16, 8192, fragment(0, 4096, 4096)),
        (gpu.start, 1 << 50, fragment(0, 4096, 4096)),
        (gpu.start, 8192, fragment(0, 4096, 8192)),
        (gpu.start + 8, 8000, fragment(0, 2048, 2048)),
        (gpu.start, 8192, fragment(0, 1000, 992)),
    ] {
        let error = make(start, bytes, fragments).map(drop).expect_err("it must be refused");
        println!("{error}");
        assert_eq!(error.kind(), ErrorKind::InvalidInput);
    }
    // SAFETY: nothing is read of it.
    let no_gpu = unsafe { CudaMemory::new(999, &[(gpu.start, 8192)], fragment(0, 4096, 4096), 2, Box::new(())) };
    assert_eq!(no_gpu.map(drop).map_err(|error| error.kind()), Err(ErrorKind::Unsupported));

    let memory = Arc::new(make(gpu.start, 8192, fragment(0, 4096, 4096)).unwrap());
    let placed = Placed::new(4 << 20);
    placed.attach(&memory);
    let slots = placed.slots(1, 4096, &mut StdRng::seed_from_u64(15));
    let start = |change: &dyn Fn(&mut PlacedCopy)| {
        let (mut copy, ended) = placed.copy(CopyDirection::ToDevice, &[0], &slots);
        change(&mut copy);
        Arc::clone(&memory).start(copy);
        end(&ended)
    };
    assert_eq!(start(&|_| {}), Ok(()));
    assert_eq!(start(&|copy| copy.blocks[0].0 = 2), Err(ErrorKind::InvalidInput));
    assert_eq!(start(&|copy| copy.blocks[0].1.0 = 1023), Err(ErrorKind::InvalidInput));
    assert_eq!(start(&|copy| copy.blocks.clear()), Ok(()));
    assert_eq!(start(&|copy| copy.after = Some(Fence(Arc::new(1)))), Err(ErrorKind::InvalidInput));
    assert_eq!(start(&|copy| copy.cancelled = Arc::new(AtomicBool::new(true))), Err(ErrorKind::Cancelled));
}

#[test]
fn a_stream_that_is_captured_meanwhile_stays_intact() {
    if !has_gpu() {
        return;
    }
    let placed = Placed::new(256 << 20);
    let layers = Layers::new(16, &[(64 << 10, 64 << 10), (64 << 10, 64 << 10)], None);
    let slots = placed.slots(16, layers.block_bytes(), &mut StdRng::seed_from_u64(16));
    let stream = Stream::new();
    let target = Gpu::new(4096);
    let global = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_GLOBAL;
    // SAFETY: stream and memory live until the capture has ended; nothing of it is run.
    unsafe {
        sys::cuStreamBeginCapture_v2(stream.0, global).result().unwrap();
        sys::cuMemsetD8Async(target.start, 1, 4096, stream.0).result().unwrap();
    }
    // Attaching, taking memory for staging and copying go on in other threads.
    placed.attach(&layers.memory);
    let blocks: Vec<u32> = (0..16).collect();
    for direction in [CopyDirection::ToSlots, CopyDirection::ToDevice] {
        let (copy, ended) = placed.copy(direction, &blocks, &slots);
        Arc::clone(&layers.memory).start(copy);
        end(&ended).unwrap();
    }
    let (mut graph, mut nodes) = (std::ptr::null_mut(), 0usize);
    // SAFETY: as above; without a place for them the nodes are only counted.
    unsafe {
        sys::cuStreamEndCapture(stream.0, &mut graph).result().unwrap();
        sys::cuGraphGetNodes(graph, std::ptr::null_mut(), &mut nodes).result().unwrap();
        sys::cuGraphDestroy(graph).result().unwrap();
    }
    assert_eq!(nodes, 1, "something of ours was captured");
}
