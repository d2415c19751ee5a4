//! A worker that stops in the middle of a copy holds what it holds, and nobody else.

mod support;

use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, bounded};
use pegaflow_engine::*;
use support::{BLOCK, BLOCKS, Worker, keys};

/// A KV cache whose copies end when somebody says so.
struct Stopped(MemoryLayout, Receiver<()>);

struct Copies(Receiver<()>, #[expect(dead_code, reason = "held while the copies run")] Vec<BlockCopy>);

impl CopyBatch for Copies {
    fn wait(&mut self, deadline: Instant) -> Result<()> {
        match self.0.recv_deadline(deadline) {
            Err(RecvTimeoutError::Timeout) => Err(Error::new(ErrorKind::Timeout, "still running")),
            _ => Ok(()),
        }
    }
}

impl KvCache for Stopped {
    fn layout(&self) -> &MemoryLayout {
        &self.0
    }

    fn copy(self: Arc<Self>, _direction: CopyDirection, copies: Vec<BlockCopy>) -> Result<Box<dyn CopyBatch>> {
        Ok(Box::new(Copies(self.1.clone(), copies)))
    }
}

#[test]
fn a_stopped_worker_does_not_stop_others() {
    let config = EngineConfig { dram: ByteSize::mib(16), load_threads: 1, save_threads: 1, ..EngineConfig::default() };
    let mut worker = Worker::new(config);
    let keys = keys(4, 1);
    worker.save(&keys, BlockKey::ROOT);
    let lease = worker.lookup(&keys).lease.expect("a lease");
    let (go_on, wait) = bounded(2);
    let layout = MemoryLayout::contiguous(BLOCK, BLOCK, BLOCKS, BLOCK * u64::from(BLOCKS)).expect("fits");
    let memory: Arc<dyn KvCache> = Arc::new(Stopped(layout, wait));
    let (ended, outcome) = bounded(1);
    let load = LoadRequest {
        session: worker.session,
        operation: OperationId(100),
        lease,
        shard: 0,
        memory: Arc::clone(&memory),
        blocks: vec![LoadBlock { index: 0, block: 0 }],
    };
    worker.engine.load(load, Box::new(move |outcome| ended.send(outcome).expect("waiting"))).expect("accepted");
    let save = SaveRequest {
        session: worker.session,
        operation: OperationId(101),
        target: worker.instance.clone().into(),
        memory,
        blocks: vec![BlockSave { key: support::keys(1, 9)[0], parent: BlockKey::ROOT, depth: 0, block: 0 }],
    };
    worker.engine.save(save, Box::new(|_| {})).expect("accepted");
    // The only thread of each kind waits for the stopped worker; these are done by others.
    let lease = worker.lookup(&keys).lease.expect("a lease");
    assert_eq!(worker.load(lease, vec![LoadBlock { index: 1, block: 5 }]).loaded_dram, 1);
    assert_eq!(worker.save(&support::keys(2, 3), BlockKey::ROOT).saved, 2);
    assert!(outcome.is_empty(), "the stopped one has not ended");
    go_on.send(()).expect("waited for");
    go_on.send(()).expect("waited for");
    assert_eq!(outcome.recv_timeout(Duration::from_secs(10)).expect("ends").loaded_dram, 1);
}
