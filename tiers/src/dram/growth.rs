//! How an arena comes by its memory: the first window before anybody uses it, the others one by one on a thread of their
//! own. Taking hundreds of gigabytes lasts minutes; a server need not wait for that.

use std::io;
use std::ops::Range;
use std::sync::{Arc, Weak};

use super::arena::Arena;
use super::mapping::Mapping;
use crate::error::{Error, Result};

/// Takes the first window.
pub(super) fn begin(arena: &Arena, populate: impl Fn(&Mapping, Range<usize>) -> io::Result<()>) -> Result<()> {
    if let Some(window) = arena.next_window() {
        populate(arena.mapping(), window.clone()).map_err(|source| {
            Error::from_io(format!("taking the first {} bytes of DRAM (free memory)", window.end), source)
        })?;
        arena.grow(window.end);
    }
    Ok(())
}

/// Starts the thread for the other windows. It keeps the arena only while it takes a window, and ends after that window when
/// nobody else has the arena any more.
pub(super) fn go_on(
    arena: &Arc<Arena>,
    populate: impl Fn(&Mapping, Range<usize>) -> io::Result<()> + Send + 'static,
) -> Result<()> {
    if arena.next_window().is_some() {
        let arena = Arc::downgrade(arena);
        std::thread::Builder::new()
            .name("pega-arena".into())
            .spawn(move || run(&arena, populate))
            .map_err(|source| Error::from_io("starting the thread that grows the arena (see ulimit -u)", source))?;
    }
    Ok(())
}

fn run(arena: &Weak<Arena>, populate: impl Fn(&Mapping, Range<usize>) -> io::Result<()>) {
    while let Some(arena) = arena.upgrade() {
        let Some(window) = arena.next_window() else {
            return tracing::info!(bytes = arena.capacity_bytes(), "all of the arena's memory is taken");
        };
        if let Err(error) = populate(arena.mapping(), window.clone()) {
            let (ready_bytes, of_bytes) = (arena.ready_bytes(), arena.capacity_bytes());
            let remedy = "free memory and restart, or give less dram";
            return tracing::error!(ready_bytes, of_bytes, %error, remedy, "no more memory: the arena stays smaller");
        }
        arena.grow(window.end);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
    use std::time::{Duration, Instant};

    use crossbeam_channel::{Receiver, Sender, bounded};

    use super::*;
    use crate::dram::{ArenaConfig, Slot};

    const MIB: u64 = 1 << 20;
    const PATIENCE: Duration = Duration::from_secs(30);

    /// Windows of 4 MiB in chunks of 2 MiB.
    fn config(windows: u64) -> ArenaConfig {
        ArenaConfig { window_bytes: 4 * MIB, ..ArenaConfig::new(windows * 4 * MIB) }
    }

    /// An arena that grows by one window for each `send`, and tells of it; `Err` for a window that cannot be had.
    fn stepwise(windows: u64) -> (Arc<Arena>, Sender<io::Result<()>>, Receiver<()>) {
        let (step, steps) = bounded::<io::Result<()>>(0);
        let is_first = AtomicBool::new(true);
        let arena = Arena::growing(config(windows), move |mapping, window| {
            if !is_first.swap(false, Ordering::Relaxed) {
                steps.recv().unwrap_or_else(|_| Err(io::Error::other("the test has ended")))?;
            }
            mapping.populate(window)
        });
        let arena = arena.expect("memory");
        let (grew, growth) = bounded(windows as usize);
        arena.on_growth(Box::new(move || grew.send(()).expect("room for all")));
        (arena, step, growth)
    }

    fn fill(arena: &Arc<Arena>, payload_bytes: usize) -> Vec<Slot> {
        std::iter::from_fn(|| arena.alloc(payload_bytes)).collect()
    }

    fn wait_until(what: &str, is_so: impl Fn() -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !is_so() {
            assert!(Instant::now() < deadline, "not in time: {what}");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    #[test]
    fn the_first_window_can_be_used_before_the_second_is_there() {
        let (arena, step, growth) = stepwise(3);
        assert_eq!((arena.ready_bytes(), arena.capacity_bytes(), arena.free_chunks()), (4 * MIB, 12 * MIB, 2));
        let first = fill(&arena, (MIB - 4096) as usize);
        assert_eq!(first.len(), 4);
        step.send(Ok(())).expect("the thread waits");
        growth.recv_timeout(PATIENCE).expect("grown");
        assert_eq!((arena.ready_bytes(), arena.free_chunks()), (8 * MIB, 2));
        assert_eq!(fill(&arena, (MIB - 4096) as usize).len(), 4);
        drop(first);
        step.send(Ok(())).expect("the thread waits");
        growth.recv_timeout(PATIENCE).expect("grown");
        assert_eq!((arena.ready_bytes(), arena.used_bytes(), arena.free_chunks()), (12 * MIB, 0, 6));
    }

    #[test]
    fn an_arena_that_stays_small_grows_when_it_is_told_to() {
        let arena = Arena::new(ArenaConfig { stays_small: true, ..config(3) }).expect("memory");
        let (grew, growth) = bounded(3);
        arena.on_growth(Box::new(move || grew.send(()).expect("room for all")));
        assert!(growth.recv_timeout(Duration::from_millis(100)).is_err(), "nobody takes more");
        assert_eq!((arena.ready_bytes(), arena.capacity_bytes(), arena.free_chunks()), (4 * MIB, 12 * MIB, 2));
        arena.grow_on().expect("a thread");
        wait_until("all is taken", || arena.ready_bytes() == arena.capacity_bytes());
        assert_eq!((growth.len(), arena.free_chunks()), (2, 6));
    }

    #[test]
    fn a_span_may_lie_across_windows_but_never_in_one_that_is_not_there() {
        let (arena, step, growth) = stepwise(2);
        let wanted = (6 * MIB - 4096) as usize;
        assert!(arena.alloc(wanted).is_none());
        step.send(Ok(())).expect("the thread waits");
        growth.recv_timeout(PATIENCE).expect("grown");
        let mut span = arena.alloc(wanted).expect("three chunks");
        span.payload_mut().fill(1);
        assert_eq!(arena.free_chunks(), 1);
        drop(span);
        assert_eq!(arena.free_chunks(), 4);
    }

    #[test]
    fn an_arena_that_gets_no_more_memory_goes_on_with_what_it_has() {
        let (arena, step, growth) = stepwise(3);
        step.send(Err(io::Error::from_raw_os_error(libc::ENOMEM))).expect("the thread waits");
        assert!(step.send(Ok(())).is_err(), "the thread has ended");
        assert_eq!((arena.ready_bytes(), growth.is_empty()), (4 * MIB, true));
        assert_eq!(fill(&arena, (MIB - 4096) as usize).len(), 4);
        let refused = Arena::growing(config(2), |_, _| Err(io::Error::from_raw_os_error(libc::ENOMEM)));
        assert!(refused.is_err(), "nothing can be done without the first window");
    }

    #[test]
    fn an_arena_that_is_dropped_while_it_grows_is_unmapped_and_its_thread_ends() {
        let (arena, step, _growth) = stepwise(1000);
        let gone = Arc::downgrade(&arena);
        step.send(Ok(())).expect("the thread waits");
        let slot = arena.alloc(4096).expect("room");
        drop(arena);
        assert!(gone.strong_count() > 0, "a slot keeps it");
        drop(slot);
        // At most the window that is being taken is taken to its end.
        let _ = step.send_timeout(Ok(()), PATIENCE);
        let _ = step.send_timeout(Ok(()), Duration::ZERO);
        wait_until("the arena is gone", || gone.strong_count() == 0);
        wait_until("the thread is gone", || {
            step.send_timeout(Ok(()), Duration::ZERO).is_err_and(|e| e.is_disconnected())
        });
    }

    #[test]
    fn slots_are_taken_and_given_back_while_it_grows() {
        let arena = Arena::new(config(16)).expect("memory");
        let (overlaps, ready) = (AtomicUsize::new(0), || arena.ready_bytes());
        std::thread::scope(|scope| {
            for thread in 1..=4_u8 {
                let (arena, overlaps) = (&arena, &overlaps);
                scope.spawn(move || {
                    let mut seen = 0;
                    for round in 0..200_usize {
                        let now = ready();
                        assert!(now >= seen && now <= arena.capacity_bytes(), "{now} after {seen}");
                        seen = now;
                        let sizes = [4096, 60 << 10, (1 << 20) - 4096, 3 << 20];
                        let mut held: Vec<Slot> = (0..6).filter_map(|i| arena.alloc(sizes[(round + i) % 4])).collect();
                        held.iter_mut().for_each(|slot| slot.payload_mut()[..4096].fill(thread));
                        let is_ours = |slot: &Slot| slot.payload()[..4096].iter().all(|byte| *byte == thread);
                        overlaps.fetch_add(held.iter().filter(|slot| !is_ours(slot)).count(), Ordering::Relaxed);
                    }
                });
            }
        });
        wait_until("all is taken", || ready() == arena.capacity_bytes());
        assert_eq!((overlaps.into_inner(), arena.used_bytes(), arena.free_chunks()), (0, 0, 32));
    }
}
