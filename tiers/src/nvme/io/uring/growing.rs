//! A ring on an arena that grows: what becomes ready is registered without anybody asking, and can be used before.

use std::fs::File;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crossbeam_channel::bounded;

use super::super::tests::{directory, is_denied};
use super::super::{FileId, IoBuffer, IoKind, open_direct, transfer_blocking};
use super::*;
use crate::dram::ArenaConfig;

const PATIENCE: Duration = Duration::from_secs(30);
const MIB: usize = 1 << 20;

#[test]
fn what_becomes_ready_is_registered_and_can_be_used_before() {
    let directory = directory();
    let path = directory.path().join("region");
    File::create(&path).and_then(|file| file.set_len(4 * MIB as u64)).expect("a file");
    let (file, ..) = open_direct(&path).expect("opened");
    let (step, steps) = bounded::<()>(0);
    let is_first = AtomicBool::new(true);
    let config = ArenaConfig { window_bytes: 2 << 20, ..ArenaConfig::new(16 << 20) };
    let arena = Arena::growing(config, move |mapping, window| {
        if !is_first.swap(false, Ordering::Relaxed) {
            steps.recv().map_err(std::io::Error::other)?;
        }
        mapping.populate(window)
    });
    let arena = arena.expect("memory");
    // Buffers of the ring end within windows of the arena, the last one with it.
    let options = RingOptions { buffer_bytes: 5 * MIB, ..RingOptions::new(4) };
    let engine = match UringIo::open(Files::adopt(&[file]).expect("adopted"), &arena, options) {
        Ok(engine) => engine,
        Err(error) if is_denied(&error) => return eprintln!("SKIPPED: this machine has no io_uring: {error}"),
        Err(error) => panic!("no engine: {error:#}"),
    };
    let registered = || engine.shared.registered_bytes.load(Ordering::Acquire);
    assert_eq!((registered(), arena.ready_bytes()), (0, 2 << 20));
    let use_all = || {
        // All over what is ready: registered or not.
        let slots: Vec<_> = std::iter::from_fn(|| arena.alloc(MIB - 4096)).collect();
        assert_eq!(slots.len(), arena.ready_bytes() as usize / MIB);
        for slot in slots {
            let mut buffer = IoBuffer::Slot { slot: Arc::new(slot), bytes: MIB };
            for kind in [IoKind::Write, IoKind::Read] {
                buffer = transfer_blocking(&engine, FileId(0), kind, 0, buffer, PATIENCE).expect("transferred");
            }
        }
    };
    use_all();
    for _ in 0..7 {
        step.send_timeout((), PATIENCE).expect("the arena waits");
    }
    let deadline = Instant::now() + PATIENCE;
    while registered() < 16 << 20 {
        assert!(Instant::now() < deadline, "{} bytes are registered of {}", registered(), arena.ready_bytes());
        std::thread::sleep(Duration::from_millis(1));
    }
    use_all();
}
