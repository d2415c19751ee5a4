//! A server in this process over DRAM only, a server process, and a worker with KV memory of its own.
#![expect(dead_code, reason = "every test binary uses a part of it")]
#![expect(unsafe_code, reason = "registers this process's memory as KV memory")]

pub(crate) mod host;
pub(crate) mod router;

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::ptr::NonNull;
use std::sync::Arc;
use std::time::{Duration, Instant};

use pegaflow_engine::{
    BlockKey, BlockSave, ByteSize, Engine, EngineConfig, Fragment, GroupGeometry, HitTier, HostMemory, InstanceId,
    InstanceSpec, LoadBlock, LocateRequest, LookupReply, LookupRequest, NamespaceDescriptor, OperationId, Whose,
};
use pegaflow_server::client::{Client, ClientConfig, Completion, CompletionResult, Endpoint};
use pegaflow_server::{Access, Listeners, Metrics, Readiness, Role, Server, ServerConfig, TcpService};

/// Long enough for anything that is to happen; a test that waits this long has failed.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

pub(crate) const BLOCK_BYTES: u64 = Layout::USUAL.block_bytes();
pub(crate) const BLOCKS: u32 = 64;

/// What an engine's KV memory looks like, and under what names its blocks are kept.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Layout {
    pub(crate) instance: &'static str,
    pub(crate) model: &'static str,
    /// The bytes of the two fragments of a block.
    pub(crate) fragments: [usize; 2],
}

impl Layout {
    pub(crate) const USUAL: Self = Self { instance: "engine", model: "m", fragments: [4096, 48] };

    const fn block_bytes(&self) -> u64 {
        (self.fragments[0] + self.fragments[1]) as u64
    }

    pub(crate) fn spec(&self) -> InstanceSpec {
        InstanceSpec {
            instance: InstanceId(self.instance.into()),
            namespace: NamespaceDescriptor::new().with("model", self.model),
            groups: vec![GroupGeometry { group: 0, block_bytes: self.block_bytes(), shards: 1 }],
            shard: 0,
            keeps_all: false,
        }
    }
}

/// A server in this process.
pub(crate) struct Local {
    pub(crate) runtime: tokio::runtime::Runtime,
    pub(crate) engine: Engine,
    pub(crate) server: Option<Server>,
    pub(crate) socket: PathBuf,
    pub(crate) readiness: Readiness,
    pub(crate) tcp: Option<std::net::SocketAddr>,
    _directory: tempfile::TempDir,
}

impl Local {
    pub(crate) fn start() -> Self {
        Self::with(&ServerConfig::default(), None)
    }

    pub(crate) fn with(config: &ServerConfig, tcp: Option<std::net::SocketAddr>) -> Self {
        let access = Arc::new(Access::everybody(Role::Engine));
        Self::with_tcp(config, tcp.map(|address| TcpService { address, tls: None, access }))
    }

    pub(crate) fn with_tcp(config: &ServerConfig, tcp: Option<TcpService>) -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let socket = directory.path().join("p.sock");
        let runtime = tokio::runtime::Runtime::new().expect("a runtime");
        let engine =
            Engine::open(EngineConfig { dram: ByteSize::mib(64), shared_dram: true, ..EngineConfig::default() })
                .expect("opens");
        let readiness = Readiness::new(Metrics::new());
        let (server, tcp) = runtime.block_on(async {
            let listeners = Listeners::bind_with(&socket, tcp).await.expect("binds");
            let tcp = listeners.tcp_address();
            (Server::start(engine.clone(), listeners, config, &readiness), tcp)
        });
        Self { runtime, engine, server: Some(server), socket, readiness, tcp, _directory: directory }
    }

    pub(crate) fn server(&self) -> &Server {
        self.server.as_ref().expect("not stopped")
    }

    pub(crate) fn stop(&mut self) -> pegaflow_engine::Result<()> {
        let server = self.server.take().expect("not stopped");
        self.runtime.block_on(server.stop(PATIENCE))
    }

    pub(crate) fn worker(&self) -> Worker {
        let worker = Worker::new(Endpoint::Unix(self.socket.clone()));
        worker.register();
        worker.client.wait_connected(PATIENCE).expect("connects");
        worker
    }
}

/// Waits until something is so.
pub(crate) fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !is_so() {
        assert!(Instant::now() < deadline, "{what}: not so after {PATIENCE:?}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A worker of a CPU engine: blocks in two fragments.
pub(crate) struct Worker {
    pub(crate) client: Client,
    layout: Layout,
    kv: Box<[u8]>,
    memory: Arc<HostMemory>,
    next: std::cell::Cell<u64>,
}

impl Worker {
    pub(crate) fn new(endpoint: Endpoint) -> Self {
        let mut config = ClientConfig::new(endpoint, "test");
        config.lookup_timeout = PATIENCE;
        config.rpc_timeout = PATIENCE;
        Self::with(config)
    }

    pub(crate) fn with(config: ClientConfig) -> Self {
        Self::with_layout(config, Layout::USUAL)
    }

    pub(crate) fn with_layout(config: ClientConfig, layout: Layout) -> Self {
        let mut kv = vec![0u8; (layout.block_bytes() * u64::from(BLOCKS)) as usize].into_boxed_slice();
        let start = NonNull::new(kv.as_mut_ptr()).expect("memory");
        let [first, second] = layout.fragments.map(|bytes| bytes as u64);
        let fragments = vec![
            Fragment { offset: 0, stride: first, bytes: first },
            Fragment { offset: first * u64::from(BLOCKS), stride: second, bytes: second },
        ];
        // SAFETY: the worker keeps the memory until its client is closed, and touches a block only while no operation on
        // it is running.
        let memory = unsafe { HostMemory::new(start, kv.len() as u64, fragments, BLOCKS, Box::new(())) };
        let client = Client::start(config).expect("starts");
        Self { client, layout, kv, memory: Arc::new(memory.expect("fits")), next: std::cell::Cell::new(0) }
    }

    pub(crate) fn spec() -> InstanceSpec {
        Layout::USUAL.spec()
    }

    pub(crate) fn register(&self) {
        self.client.register(self.layout.spec(), self.memory.clone()).expect("registers");
    }

    pub(crate) fn memory(&self) -> Arc<HostMemory> {
        Arc::clone(&self.memory)
    }

    pub(crate) fn operation(&self) -> OperationId {
        self.next.set(self.next.get() + 1);
        OperationId(self.next.get())
    }

    fn places(&self, block: u32) -> [std::ops::Range<usize>; 2] {
        let ([first, second], block) = (self.layout.fragments, block as usize);
        let tail = first * BLOCKS as usize + block * second;
        [block * first..(block + 1) * first, tail..tail + second]
    }

    /// Fills a block with bytes of its own.
    pub(crate) fn fill(&mut self, block: u32, seed: u8) {
        for range in self.places(block) {
            for (at, byte) in self.kv[range].iter_mut().enumerate() {
                *byte = seed.wrapping_mul(31).wrapping_add((at % 241) as u8);
            }
        }
    }

    pub(crate) fn read(&self, block: u32) -> Vec<u8> {
        self.places(block).into_iter().flat_map(|range| self.kv[range].to_vec()).collect()
    }

    pub(crate) fn key(index: u32) -> BlockKey {
        BlockKey::from_bytes([index as u8 + 1; 32])
    }

    pub(crate) fn saves(count: u32) -> Vec<BlockSave> {
        let parent = |index: u32| index.checked_sub(1).map_or(BlockKey::ROOT, Self::key);
        (0..count)
            .map(|index| BlockSave { key: Self::key(index), parent: parent(index), depth: index, block: index })
            .collect()
    }

    pub(crate) fn start_save(&self, count: u32) -> pegaflow_engine::Result<OperationId> {
        let operation = self.operation();
        let spec = self.layout.spec();
        self.client.save(operation, spec.instance.into(), Self::saves(count), 0).map(|()| operation)
    }

    pub(crate) fn lookup(&self, count: u32) -> pegaflow_engine::Result<LookupReply> {
        self.lookup_with(count, false)
    }

    pub(crate) fn lookup_with(&self, count: u32, with_places: bool) -> pegaflow_engine::Result<LookupReply> {
        self.client.lookup(&LookupRequest {
            instance: self.layout.spec().instance,
            tenant: None,
            group: 0,
            keys: (0..count).map(Self::key).collect(),
            lease: Some(PATIENCE),
            tag: 1,
            with_places,
            question: None,
            prefetch: false,
        })
    }

    /// Where the blocks of these numbers are.
    pub(crate) fn locate(&self, indexes: &[u32]) -> pegaflow_engine::Result<Vec<Option<HitTier>>> {
        let keys = indexes.iter().map(|index| Self::key(*index)).collect();
        let whose = Whose::Instance(self.layout.spec().instance);
        self.client.locate(&LocateRequest { whose, tenant: None, group: 0, keys })
    }

    /// Starts a load of the first `count` blocks into the last `count` blocks of the memory.
    pub(crate) fn start_load(&self, count: u32) -> OperationId {
        let lease = self.lookup(count).expect("answers").lease.expect("found");
        let operation = self.operation();
        let blocks = (0..count).map(|index| LoadBlock { index, block: BLOCKS - count + index }).collect();
        self.client.load(operation, lease, 0, blocks, 0).expect("accepted");
        operation
    }

    /// The end of the operation, which must be the only one in flight.
    pub(crate) fn wait(&self, operation: OperationId) -> CompletionResult {
        assert!(self.client.wait_completion(PATIENCE), "operation {} never ended", operation.0);
        let mut ended = self.client.poll();
        assert_eq!(ended.len(), 1, "one operation is in flight: {ended:?}");
        let Completion { operation: which, result } = ended.remove(0);
        assert_eq!(which, operation);
        result
    }
}

/// A server process over DRAM only.
pub(crate) struct Process {
    pub(crate) child: Child,
}

impl Process {
    pub(crate) fn command(socket: &Path) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_pegaflow-server"));
        command
            .args(["--dram", "32MiB", "--http", "off", "--socket"])
            .arg(socket)
            .env_remove("PEGAFLOW_PATH")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }

    /// Starts it and waits for its line on standard output.
    pub(crate) fn start(mut command: Command) -> (Self, serde_json::Value) {
        let mut child = command.stderr(Stdio::inherit()).spawn().expect("starts");
        let stdout = child.stdout.take().expect("piped");
        let mut line = String::new();
        BufReader::new(stdout).read_line(&mut line).expect("reads");
        let ready = serde_json::from_str(&line).unwrap_or_else(|error| panic!("'{line}' is no JSON: {error}"));
        (Self { child }, ready)
    }

    /// As `start`, with what it logs.
    pub(crate) fn start_with_log(mut command: Command) -> (Self, std::process::ChildStderr) {
        let mut child = command.stderr(Stdio::piped()).spawn().expect("starts");
        let (stdout, stderr) = (child.stdout.take().expect("piped"), child.stderr.take().expect("piped"));
        let mut line = String::new();
        BufReader::new(stdout).read_line(&mut line).expect("reads");
        assert!(line.contains("ready"), "{line}");
        (Self { child }, stderr)
    }

    pub(crate) fn signal(&self, name: &str) {
        let pid = self.child.id().to_string();
        assert!(Command::new("kill").args([name, &pid]).status().expect("kill").success());
    }

    pub(crate) fn wait_exit(&mut self) -> Option<i32> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait().expect("waits") {
                return status.code();
            }
            assert!(Instant::now() < deadline, "the server had not ended after {PATIENCE:?}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _gone = self.child.kill();
        let _gone = self.child.wait();
    }
}
