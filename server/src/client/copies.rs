//! The threads that copy between the worker's memory and staging slots. A job holds both memories, so neither can be
//! unmapped while it runs; its end is reported exactly once.

use std::sync::Arc;
use std::thread::JoinHandle;

use crossbeam_channel::{Receiver, Sender, bounded};
use pegaflow_engine::{Error, HostMemory, Result};
use tokio::sync::mpsc;

use super::transfers::CHUNKS_MAX;

const COPY_THREADS: usize = 2;

/// Blocks to copy, one after the other.
pub(super) struct CopyJob {
    /// Which chunk this is for.
    pub(super) chunk: u64,
    pub(super) from: Arc<HostMemory>,
    pub(super) to: Arc<HostMemory>,
    /// Pairs of block numbers: in `from`, in `to`.
    pub(super) blocks: Vec<(u32, u32)>,
}

/// A job has ended: nothing of it is running any more.
pub(super) struct Copied {
    pub(super) chunk: u64,
    pub(super) is_complete: bool,
}

/// The threads; they end when this is dropped, after the jobs they have.
pub(super) struct CopyThreads {
    jobs: Sender<CopyJob>,
    _threads: Vec<JoinHandle<()>>,
}

impl CopyThreads {
    /// Starts the threads; ends are reported in the channel that is returned.
    ///
    /// # Errors
    /// `Io` if the system refuses a thread.
    pub(super) fn start() -> Result<(Self, mpsc::Receiver<Copied>)> {
        let (jobs, todo) = bounded::<CopyJob>(CHUNKS_MAX);
        let (done, ended) = mpsc::channel(CHUNKS_MAX);
        let threads = (0..COPY_THREADS)
            .map(|number| {
                let (todo, done) = (todo.clone(), done.clone());
                std::thread::Builder::new()
                    .name(format!("pegaflow-copy-{number}"))
                    .spawn(move || copy_all(&todo, &done))
                    .map_err(|error| Error::from_io("cannot start a copy thread", error))
            })
            .collect::<Result<_>>()?;
        Ok((Self { jobs, _threads: threads }, ended))
    }

    /// Queues a job. There are never more than the queue holds, so this does not wait.
    ///
    /// # Errors
    /// The job, if the threads are gone or the queue is full.
    pub(super) fn start_copy(&self, job: CopyJob) -> Result<(), CopyJob> {
        self.jobs.try_send(job).map_err(crossbeam_channel::TrySendError::into_inner)
    }
}

fn copy_all(jobs: &Receiver<CopyJob>, done: &mpsc::Sender<Copied>) {
    for CopyJob { chunk, from, to, blocks } in jobs {
        let copied = blocks.iter().try_for_each(|&(source, target)| from.copy_block_to(source, &to, target));
        if let Err(error) = &copied {
            tracing::error!("a copy failed: {error:#}");
        }
        drop((from, to));
        if done.blocking_send(Copied { chunk, is_complete: copied.is_ok() }).is_err() {
            return;
        }
    }
}
