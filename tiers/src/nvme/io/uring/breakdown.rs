//! What becomes of requests and memory when the kernel takes the ring away.
#![expect(unsafe_code, reason = "puts another file in the place of the ring's descriptor")]

use std::fs::File;
use std::os::fd::AsRawFd;
use std::time::Duration;

use crossbeam_channel::bounded;

use super::super::tests::{arena, directory, is_denied};
use super::super::{FileId, IoBuffer, IoCompletion, IoKind, IoPriority, open_direct};
use super::*;

const PATIENCE: Duration = Duration::from_secs(30);
const SLOT: usize = 8192;

fn read(arena: &Arc<Arena>, done: impl FnOnce(IoCompletion) + Send + 'static) -> IoRequest {
    let slot = Arc::new(arena.alloc(4096).expect("room"));
    let buffer = Some(IoBuffer::Slot { slot, bytes: SLOT });
    let done = Box::new(done);
    IoRequest { file: FileId(0), kind: IoKind::Read, offset: 0, buffer, priority: IoPriority::Demand, done }
}

#[test]
fn everything_is_completed_and_memory_in_flight_is_never_reused() {
    let directory = directory();
    let path = directory.path().join("region");
    File::create(&path).and_then(|file| file.set_len(1 << 20)).expect("a file");
    let (file, ..) = open_direct(&path).expect("opened");
    let arena = arena(1);
    let engine = match UringIo::open(Files::adopt(&[file]).expect("adopted"), &arena, RingOptions::new(1)) {
        Ok(engine) => engine,
        Err(error) if is_denied(&error) => return eprintln!("SKIPPED: this machine has no io_uring: {error}"),
        Err(error) => panic!("no engine: {error:#}"),
    };
    let (release, released) = bounded::<()>(0);
    let (entered, blocked) = bounded(1);
    let first = read(&arena, move |_| {
        entered.send(()).expect("the test waits");
        let _ = released.recv_timeout(PATIENCE);
    });
    assert!(engine.submit(first).is_ok());
    blocked.recv_timeout(PATIENCE).expect("the completion runs");
    let (sender, receiver) = bounded(8);
    for _ in 0..3 {
        let sender = sender.clone();
        let request = read(&arena, move |completion| sender.send(completion).expect("the test waits"));
        assert!(engine.submit(request).is_ok());
    }
    let other = File::open("/dev/null").expect("a file");
    // SAFETY: replaces a descriptor that the ring owns and closes later as its own; nobody else uses it.
    assert!(unsafe { libc::dup2(other.as_raw_fd(), engine.ring_descriptor) } >= 0);
    drop(release);

    let ends: Vec<_> = (0..3).map(|_| receiver.recv_timeout(PATIENCE).expect("a completion")).collect();
    let kinds: Vec<_> = ends.iter().map(|end| end.result.as_ref().err().map(Error::kind)).collect();
    assert_eq!(kinds, [Some(ErrorKind::Poisoned); 3]);
    let returned = ends.iter().filter(|end| end.buffer.is_some()).count();
    assert_eq!(returned, 2, "what was not given to the ring comes back");
    drop(ends);
    let (_, error) = engine.submit(read(&arena, |_| ())).expect_err("broken");
    assert_eq!(error.kind(), ErrorKind::Poisoned);
    engine.close();
    assert!(receiver.is_empty());
    assert_eq!(arena.used_bytes(), SLOT as u64, "what the kernel may still use stays taken");
}
