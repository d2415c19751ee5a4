//! A worker as vLLM's CPU engine has one: KV memory of its own, registered with the server through the client.
#![expect(unsafe_code, reason = "registers this process's memory as KV memory")]

use std::collections::HashMap;
use std::path::Path;
use std::ptr::NonNull;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use parking_lot::Mutex;
use pegaflow_engine::{
    BlockSave, CudaMemory, CudaScratch, DeviceMemory, ErrorKind, Fragment, GroupGeometry, HostMemory, InstanceId,
    InstanceSpec, LeaseId, LoadBlock, LoadOutcome, LoadQuestion, LookupReply, LookupRequest, NamespaceDescriptor,
    OperationId, RangeFragment, SaveOutcome,
};
use pegaflow_server::client::{Client, ClientConfig, Completion, CompletionResult, Endpoint};

use crate::oracle::{Chain, block_bytes, first_difference};

/// Longer than a placed load needs; a dead worker's lease lasts no longer.
const PLACED_LEASE: Duration = Duration::from_secs(12);

/// Where a worker's KV cache is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum KvDevice {
    /// Host memory.
    #[default]
    Host,
    /// A GPU, by its number.
    Cuda(u32),
}

impl std::fmt::Display for KvDevice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Host => f.write_str("host"),
            Self::Cuda(ordinal) => write!(f, "cuda:{ordinal}"),
        }
    }
}

impl std::str::FromStr for KvDevice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.strip_prefix("cuda:") {
            None if text == "host" => Ok(Self::Host),
            Some(ordinal) => ordinal.parse().map(Self::Cuda).map_err(|error| format!("{text}: {error}")),
            None => Err(format!("'{text}' is no device; give host or cuda:0")),
        }
    }
}

/// What the worker looks like.
#[derive(Debug, Clone)]
pub struct WorkerOptions {
    /// Its instance; workers with the same name are one engine.
    pub instance: String,
    /// The namespace's model field.
    pub model: String,
    /// Bytes of a block; a multiple of 48, it lies in three fragments.
    pub block_bytes: u64,
    /// Blocks of KV memory.
    pub blocks: u32,
    /// Where they are.
    pub device: KvDevice,
}

/// The worker.
pub struct TestWorker {
    /// Its connection.
    pub client: Client,
    options: WorkerOptions,
    kv: Arc<Kv>,
    next: u64,
    ended: HashMap<OperationId, CompletionResult>,
}

/// KV memory in three parts ("layers"), each with a part of every block.
enum Kv {
    Host([Mutex<Box<[u8]>>; 3]),
    Cuda(u32, [CudaScratch; 3]),
}

impl Kv {
    fn new(device: KvDevice, layer_bytes: usize) -> Result<Self> {
        let host = || Mutex::new(vec![0u8; layer_bytes].into_boxed_slice());
        Ok(match device {
            KvDevice::Host => Self::Host([host(), host(), host()]),
            KvDevice::Cuda(ordinal) => {
                let layer = || CudaScratch::new(ordinal, layer_bytes);
                Self::Cuda(ordinal, [layer()?, layer()?, layer()?])
            }
        })
    }

    /// Writes a part of a layer. GPU memory that cannot be written is a failure of the test.
    fn write(&self, layer: usize, at: usize, bytes: &[u8]) {
        match self {
            Self::Host(layers) => layers[layer].lock()[at..at + bytes.len()].copy_from_slice(bytes),
            Self::Cuda(_, layers) => layers[layer].write(at, bytes).unwrap_or_else(|error| panic!("{error:#}")),
        }
    }

    fn read(&self, layer: usize, at: usize, bytes: &mut [u8]) {
        match self {
            Self::Host(layers) => bytes.copy_from_slice(&layers[layer].lock()[at..at + bytes.len()]),
            Self::Cuda(_, layers) => layers[layer].read(at, bytes).unwrap_or_else(|error| panic!("{error:#}")),
        }
    }
}

/// Blocks that were to be there and are not.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Missing {
    /// Not found by the lookup, or failed to load.
    pub blocks: usize,
    /// Loaded with other bytes than were saved.
    pub wrong: usize,
    /// Loaded and right.
    pub right: usize,
}

impl TestWorker {
    /// Connects to the server at `socket` and registers; waits until both is done.
    ///
    /// # Errors
    /// If that has not happened after `timeout`.
    pub fn connect(socket: &Path, options: WorkerOptions, timeout: Duration) -> Result<Self> {
        let mut config = ClientConfig::new(Endpoint::Unix(socket.to_owned()), "test-worker");
        config.lookup_timeout = Duration::from_secs(5);
        config.rpc_timeout = Duration::from_secs(10);
        let client = Client::start(config)?;
        client.wait_connected(timeout)?;
        let part = (options.block_bytes / 3) as usize;
        let kv = Arc::new(Kv::new(options.device, part * options.blocks as usize)?);
        let worker = Self { client, options, kv, next: 0, ended: HashMap::new() };
        worker.client.register(worker.spec(), worker.memory()?)?;
        let deadline = Instant::now() + timeout;
        while worker.lookup(&Chain::new(0, 1), None).is_err() {
            if Instant::now() >= deadline {
                bail!("the worker was not registered after {timeout:?}");
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(worker)
    }

    fn spec(&self) -> InstanceSpec {
        InstanceSpec {
            instance: self.instance(),
            namespace: NamespaceDescriptor::new()
                .with("model", &self.options.model)
                .with("block", self.options.block_bytes.to_string()),
            groups: vec![GroupGeometry { group: 0, block_bytes: self.options.block_bytes, shards: 1 }],
            shard: 0,
            keeps_all: false,
        }
    }

    fn instance(&self) -> InstanceId {
        InstanceId(self.options.instance.as_str().into())
    }

    fn memory(&self) -> Result<Arc<dyn DeviceMemory>> {
        let part = self.options.block_bytes / 3;
        let fragment = Fragment { offset: 0, stride: part, bytes: part };
        let fragments = (0..3).map(|range| RangeFragment { range, fragment }).collect();
        let (blocks, owner) = (self.options.blocks, Box::new(Arc::clone(&self.kv)));
        Ok(match &*self.kv {
            Kv::Host(layers) => {
                let mut ranges = Vec::new();
                for layer in layers {
                    let mut bytes = layer.lock();
                    ranges.push((NonNull::new(bytes.as_mut_ptr()).context("no memory")?, bytes.len() as u64));
                }
                // SAFETY: the owner keeps the layers; this worker touches a block only while no operation on it runs.
                Arc::new(unsafe { HostMemory::from_ranges(&ranges, fragments, blocks, owner) }?)
            }
            Kv::Cuda(ordinal, layers) => {
                let ranges = layers.each_ref().map(|layer| (layer.address(), part * u64::from(blocks)));
                // SAFETY: as above.
                Arc::new(unsafe { CudaMemory::new(*ordinal, &ranges, fragments, blocks, owner) }?)
            }
        })
    }

    fn operation(&mut self) -> OperationId {
        self.next += 1;
        OperationId(self.next)
    }

    /// Writes what a chain's blocks must hold into KV blocks 0, 1, ... and starts a save of `from..to` of the chain.
    ///
    /// # Errors
    /// If the client refuses it.
    pub fn start_save(&mut self, chain: &Chain, from: usize, to: usize) -> Result<OperationId> {
        let mut blocks = Vec::new();
        for (block, index) in (from..to).enumerate() {
            let key = *chain.keys.get(index).context("no such block")?;
            self.fill(block as u32, |bytes| block_bytes(&key, bytes));
            blocks.push(BlockSave { key, parent: chain.parent(index), depth: index as u32, block: block as u32 });
        }
        let operation = self.operation();
        self.client.save(operation, self.instance().into(), blocks, 0)?;
        Ok(operation)
    }

    /// Saves `from..to` of a chain and waits for it.
    ///
    /// # Errors
    /// If the client refuses it or it does not end in time.
    pub fn save(&mut self, chain: &Chain, from: usize, to: usize) -> Result<SaveOutcome> {
        let operation = self.start_save(chain, from, to)?;
        match self.wait(operation, Duration::from_secs(60))? {
            CompletionResult::Save(outcome) => Ok(outcome),
            CompletionResult::Load(_) => bail!("a save ended as a load"),
        }
    }

    /// Looks a chain up.
    ///
    /// # Errors
    /// If the server does not answer.
    pub fn lookup(&self, chain: &Chain, lease: Option<Duration>) -> Result<LookupReply> {
        let request = LookupRequest {
            instance: self.instance(),
            tenant: None,
            group: 0,
            keys: chain.keys.clone(),
            lease,
            tag: chain.seed,
            with_places: false,
            question: None,
            prefetch: false,
        };
        Ok(self.client.lookup(&request)?)
    }

    /// Starts a load of the first `count` leased blocks into KV blocks 0, 1, ...
    ///
    /// # Errors
    /// If the client refuses it.
    pub fn start_load(&mut self, lease: LeaseId, count: u32) -> Result<OperationId> {
        (0..count).for_each(|block| self.fill(block, |bytes| bytes.fill(0xa5)));
        let operation = self.operation();
        let blocks = (0..count).map(|index| LoadBlock { index, block: index }).collect();
        self.client.load(operation, lease, 0, blocks, 0)?;
        Ok(operation)
    }

    /// Waits for a load.
    ///
    /// # Errors
    /// If it does not end in time.
    pub fn wait_load(&mut self, operation: OperationId) -> Result<LoadOutcome> {
        match self.wait(operation, Duration::from_secs(60))? {
            CompletionResult::Load(outcome) => Ok(outcome),
            CompletionResult::Save(_) => bail!("a load ended as a save"),
        }
    }

    /// Loads a chain at the places that the lookup tells, without asking the server, if all of what is found is in DRAM.
    ///
    /// # Errors
    /// If the server does not answer or the load does not end in time.
    pub fn load_placed(&mut self, chain: &Chain) -> Result<()> {
        let request = LookupRequest {
            instance: self.instance(),
            tenant: None,
            group: 0,
            keys: chain.keys.clone(),
            lease: Some(PLACED_LEASE),
            tag: chain.seed,
            with_places: true,
            question: None,
            prefetch: false,
        };
        let reply = self.client.lookup(&request)?;
        let (Some(lease), Some(places)) = (reply.lease, reply.places) else {
            reply.lease.into_iter().for_each(|lease| self.client.release(lease));
            return Ok(());
        };
        let operation = self.operation();
        let blocks = (0..self.options.blocks).zip(places.places).collect();
        match self.client.load_placed(operation, lease, 0, places.arena, blocks, PLACED_LEASE, (0, false)) {
            Ok(()) => self.wait_load(operation).map(drop),
            Err(error) if error.kind() == ErrorKind::Busy => {
                self.client.release(lease);
                Ok(())
            }
            Err(error) => Err(error.into()),
        }
    }

    /// As [`TestWorker::check`], for a request with a name, of which the server decides whether it is loaded.
    ///
    /// # Errors
    /// If the server does not answer.
    pub fn ask_and_check(&mut self, chain: &Chain, request: &str) -> Result<Missing> {
        let question = LoadQuestion { request: request.to_owned(), block_tokens: 16, ..LoadQuestion::default() };
        let reply = self.client.lookup(&LookupRequest {
            instance: self.instance(),
            tenant: None,
            group: 0,
            keys: chain.keys.clone(),
            lease: Some(Duration::from_secs(60)),
            tag: chain.seed,
            with_places: false,
            question: Some(question),
            prefetch: false,
        })?;
        self.load_and_compare(chain, &reply)
    }

    /// Looks a chain up, loads what is found and compares every byte.
    ///
    /// # Errors
    /// If the server does not answer.
    pub fn check(&mut self, chain: &Chain) -> Result<Missing> {
        let reply = self.lookup(chain, Some(Duration::from_secs(60)))?;
        self.load_and_compare(chain, &reply)
    }

    fn load_and_compare(&mut self, chain: &Chain, reply: &LookupReply) -> Result<Missing> {
        let mut result = Missing { blocks: chain.keys.len(), ..Missing::default() };
        let Some(lease) = reply.lease else { return Ok(result) };
        let count = reply.hit_blocks.min(self.options.blocks);
        let operation = self.start_load(lease, count)?;
        let outcome = self.wait_load(operation)?;
        for (index, key) in chain.keys.iter().enumerate().take(count as usize) {
            if outcome.failed.contains(&(index as u32)) {
                continue;
            }
            match self.difference(index as u32, key) {
                Some(at) => {
                    eprintln!("wrong byte: chain {:#x} block {index} byte {at}", chain.seed);
                    result.wrong += 1;
                }
                None => result.right += 1,
            }
            result.blocks -= 1;
        }
        Ok(result)
    }

    /// Where a KV block differs from what the key's block must hold.
    pub fn difference(&self, block: u32, key: &pegaflow_engine::BlockKey) -> Option<usize> {
        first_difference(key, &self.read(block))
    }

    /// Waits until an operation has ended.
    ///
    /// # Errors
    /// If that has not happened after `timeout`.
    pub fn wait(&mut self, operation: OperationId, timeout: Duration) -> Result<CompletionResult> {
        let deadline = Instant::now() + timeout;
        loop {
            for Completion { operation, result } in self.client.poll() {
                if self.ended.insert(operation, result).is_some() {
                    bail!("operation {} ended twice", operation.0);
                }
            }
            if let Some(result) = self.ended.remove(&operation) {
                return Ok(result);
            }
            if Instant::now() >= deadline {
                bail!("operation {} had not ended after {timeout:?}", operation.0);
            }
            self.client.wait_completion(Duration::from_millis(100));
        }
    }

    fn part(&self) -> usize {
        (self.options.block_bytes / 3) as usize
    }

    fn fill(&self, block: u32, fill: impl FnOnce(&mut [u8])) {
        let mut whole = vec![0; self.options.block_bytes as usize];
        fill(&mut whole);
        let at = block as usize * self.part();
        for (layer, part) in whole.chunks(self.part()).enumerate() {
            self.kv.write(layer, at, part);
        }
    }

    fn read(&self, block: u32) -> Vec<u8> {
        let at = block as usize * self.part();
        let mut whole = vec![0; self.options.block_bytes as usize];
        for (layer, part) in whole.chunks_mut(self.part()).enumerate() {
            self.kv.read(layer, at, part);
        }
        whole
    }
}
