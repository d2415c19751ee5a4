//! The threads that start copies of blocks. A job holds memory and arena, so neither can be unmapped while it runs; its end
//! is reported exactly once. Host memory is copied on these threads; a GPU copies on its own.

use std::sync::Arc;
use std::thread::JoinHandle;

use crossbeam_channel::{Receiver, Sender, bounded};
use pegaflow_engine::{DeviceMemory, Error, PlacedCopy, Result};

use super::operations::SENT_MAX;

const COPY_THREADS: usize = 2;

/// A copy to start.
pub(super) type Job = (Arc<dyn DeviceMemory>, PlacedCopy);

/// The threads; they end when this is dropped, after the jobs they have.
pub(super) struct CopyThreads {
    jobs: Sender<Job>,
    _threads: Vec<JoinHandle<()>>,
}

impl CopyThreads {
    /// Starts the threads.
    ///
    /// # Errors
    /// `Io` if the system refuses a thread.
    pub(super) fn start() -> Result<Self> {
        let (jobs, todo) = bounded::<Job>(2 * SENT_MAX);
        let threads = (0..COPY_THREADS)
            .map(|number| {
                let todo: Receiver<Job> = todo.clone();
                std::thread::Builder::new()
                    .name(format!("pegaflow-copy-{number}"))
                    .spawn(move || todo.iter().for_each(|(memory, copy)| memory.start(copy)))
                    .map_err(|error| Error::from_io("cannot start a copy thread", error))
            })
            .collect::<Result<_>>()?;
        Ok(Self { jobs, _threads: threads })
    }

    /// Queues a copy.
    ///
    /// # Errors
    /// The job, if the threads are gone or the queue is full.
    pub(super) fn start_copy(&self, job: Job) -> Result<(), Box<Job>> {
        self.jobs.try_send(job).map_err(|refused| Box::new(refused.into_inner()))
    }
}
