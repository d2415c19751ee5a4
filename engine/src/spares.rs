//! The loops of the load and save threads, and the threads that take the place of those which wait for a worker that does
//! not answer. A spare ends when the thread that it stands in for goes on.

use std::cell::RefCell;
use std::panic::AssertUnwindSafe;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use crossbeam_channel::{Receiver, RecvTimeoutError};

/// The most spares at a time; when that many workers are stopped, others wait for them.
const SPARES_MAX: usize = 64;
/// How often an idle spare looks whether it is still needed.
const SPARE_LOOK: Duration = Duration::from_millis(100);

/// Starts another thread on the queue of the thread that has it.
type Replace = Rc<dyn Fn() -> Option<Spare>>;

thread_local! {
    static REPLACE: RefCell<Option<Replace>> = const { RefCell::new(None) };
}

/// A thread that stands in for this one, until this is dropped.
pub(crate) struct Spare(Arc<AtomicBool>);

impl Drop for Spare {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}

/// Lets another thread serve this thread's queue; `None` if this thread serves none, or there are too many spares.
pub(crate) fn replace_this_thread() -> Option<Spare> {
    let replace = REPLACE.with_borrow(Clone::clone)?;
    replace()
}

/// Runs jobs until the queue is gone. A job that panics settles itself in its `drop`; the thread goes on.
pub(crate) fn serve<J: Send + 'static>(jobs: Receiver<J>, run: fn(J), spares: Arc<AtomicUsize>) {
    may_be_replaced(jobs.clone(), run, spares);
    for job in jobs {
        run_caught(job, run);
    }
}

fn run_caught<J>(job: J, run: fn(J)) {
    if std::panic::catch_unwind(AssertUnwindSafe(|| run(job))).is_err() {
        tracing::error!("a load or save failed by a defect of the engine; its blocks were given up");
    }
}

fn may_be_replaced<J: Send + 'static>(jobs: Receiver<J>, run: fn(J), spares: Arc<AtomicUsize>) {
    let replace = Rc::new(move || start(jobs.clone(), run, &spares));
    REPLACE.set(Some(replace));
}

fn start<J: Send + 'static>(jobs: Receiver<J>, run: fn(J), spares: &Arc<AtomicUsize>) -> Option<Spare> {
    let place = Place(Arc::clone(spares));
    if place.0.fetch_add(1, Ordering::AcqRel) >= SPARES_MAX {
        tracing::warn!(SPARES_MAX, "too many workers do not answer; others wait for them");
        return None;
    }
    let is_over = Arc::<AtomicBool>::default();
    let spare = Spare(Arc::clone(&is_over));
    let serve = move || {
        may_be_replaced(jobs.clone(), run, Arc::clone(&place.0));
        while !is_over.load(Ordering::Acquire) {
            match jobs.recv_timeout(SPARE_LOOK) {
                Ok(job) => run_caught(job, run),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => break,
            }
        }
    };
    std::thread::Builder::new().name("pega-spare".into()).spawn(serve).ok().map(|_| spare)
}

/// Counts as a spare as long as it lives.
struct Place(Arc<AtomicUsize>);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}
