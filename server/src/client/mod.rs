//! The client of the server, for callers that block: a scheduler looks up, a worker loads and saves its own memory, which it
//! copies itself from and to the server's arena. It keeps a session open by itself, registers again after every restart of the server,
//! and never makes a caller wait longer than the call's timeout; without a server everything fails at once with `Closed`.
//!
//! Fencing: an accepted operation ends in exactly one [`Completion`], and only when none of its copies into or out of the
//! worker's memory can happen any more, whatever became of the server. Start it after a fork, not before.

mod arena;
mod completions;
mod config;
mod copies;
mod driver;
mod jobs;
mod link;
mod operations;
mod pins;
mod questions;
mod shared;

use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use pegaflow_engine::{
    ArenaId, BlockSave, CopyDirection, DeviceMemory, Error, ErrorKind, HitTier, InstanceSpec, LeaseId, LoadBlock,
    LoadPolicy, LocateRequest, LookupReply, LookupRequest, NamespaceId, OperationId, Place, PlacedCopy, PlacedLoads,
    PurgeOutcome, Result, SaveTarget,
};
use tokio::runtime::Runtime;
use tokio::sync::mpsc;
use tonic::Status;

pub use completions::{Completion, CompletionResult, OUTSTANDING_MAX};
pub use config::{ClientConfig, Endpoint, Token};

use crate::limits::{BLOCKS_MAX, FLUSH_TIMEOUT_MAX};
use crate::proto::{
    ExplainRequest, FlushRequest, ListNamespacesRequest, LoadPolicyRequest, LocateReply,
    LocateRequest as LocateQuestion, PurgeRequest, ReopenStoreRequest, StatsReply, StatsRequest,
};
use crate::status::from_status;
use crate::wire;
use config::Registration;
use copies::CopyThreads;
use driver::{Command, Driver};
use operations::Work;
use questions::Questions;
use shared::Shared;

/// Calls waiting for the client's task; more are refused with `Busy`.
const COMMANDS_MAX: usize = 4096;

/// A client. Cloning gives another handle; the last one ends the session.
#[derive(Clone)]
pub struct Client {
    inner: Arc<Inner>,
}

struct Inner {
    config: ClientConfig,
    shared: Arc<Shared>,
    commands: mpsc::Sender<Command>,
    copies: Arc<CopyThreads>,
    registration: Mutex<Option<Registration>>,
    questions: Arc<Questions>,
    runtime: Option<Runtime>,
}

impl Drop for Inner {
    fn drop(&mut self) {
        // Not waited for: the last handle may go away anywhere. Copies hold their memories and end by themselves.
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

impl Client {
    /// Starts a client; it connects in the background and goes on trying until it is closed.
    ///
    /// # Errors
    /// `InvalidInput` for a bad configuration, `Io` if the system refuses a thread.
    pub fn start(config: ClientConfig) -> Result<Self> {
        config.validate()?;
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .max_blocking_threads(2)
            .thread_name("pegaflow-client")
            .enable_all()
            .build()
            .map_err(|error| Error::from_io("cannot start the client's thread", error))?;
        let shared = Arc::new(Shared::default());
        let (commands, receiver) = mpsc::channel(COMMANDS_MAX);
        let copies = Arc::new(CopyThreads::start()?);
        let driver = Driver::new(config.clone(), Arc::clone(&shared), receiver, Arc::clone(&copies));
        runtime.spawn(driver.run());
        let inner = Inner {
            config,
            shared,
            commands,
            copies,
            registration: Mutex::default(),
            questions: Arc::default(),
            runtime: Some(runtime),
        };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// Whether there is a session now and, for a worker, it is registered.
    pub fn is_connected(&self) -> bool {
        self.inner.shared.is_connected()
    }

    /// Waits until [`Client::is_connected`].
    ///
    /// # Errors
    /// `Timeout` with the reason, the server's refusal of the registration, or `Closed`.
    pub fn wait_connected(&self, timeout: Duration) -> Result<()> {
        self.inner.shared.wait_connected(timeout)
    }

    /// How many sessions there have been; raised at each new one, when all leases are gone.
    pub fn epoch(&self) -> u64 {
        self.inner.shared.epoch()
    }

    /// Makes this client a worker with the memory of its groups, all of one block size. Remembered, and repeated by itself
    /// with every new server. With no server there it returns at once; otherwise when the server has answered. A client is
    /// one worker: repeating it with the same memory is allowed.
    ///
    /// # Errors
    /// `InvalidInput` for memory that does not fit the geometry or for a second worker, `GeometryMismatch` and other
    /// lasting refusals of the server; passing ones are tried again in the background.
    pub fn register(&self, spec: InstanceSpec, memory: Arc<dyn DeviceMemory>) -> Result<()> {
        let registration = Registration::new(spec, memory)?;
        let earlier = self.inner.registration.lock().replace(registration.clone());
        let (answer, answered) = crossbeam_channel::bounded(1);
        let sent = self.send(Command::Register(registration, answer));
        let result = sent.and_then(|()| {
            // Three round trips, each with the timeout of one; after that it goes on in the background.
            answered.recv_timeout(self.inner.config.rpc_timeout * 3).unwrap_or(Ok(()))
        });
        if result.is_err() {
            *self.inner.registration.lock() = earlier;
        }
        result
    }

    /// The longest prefix of the keys that is there, with a lease if asked for.
    ///
    /// # Errors
    /// `Closed` at once without a server, `Timeout` after the lookup timeout, and what the engine gives.
    pub fn lookup(&self, request: &LookupRequest) -> Result<LookupReply> {
        if request.keys.len() > BLOCKS_MAX {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                format!("{} keys; give at most {BLOCKS_MAX} in one lookup", request.keys.len()),
            ));
        }
        let Inner { config, shared, questions, runtime, .. } = &*self.inner;
        let (mut rpc, session) = shared.session()?;
        let request = wire::lookup_to_wire(session, request);
        if let (Endpoint::Unix(socket), Some(runtime)) = (&config.endpoint, runtime)
            && let Some(answer) = questions.ask(&request, socket, runtime, config.lookup_timeout)
        {
            return wire::lookup_reply(&answer?);
        }
        let found = self.call(config.lookup_timeout, async move { rpc.lookup(request).await })?;
        wire::lookup_reply(&found)
    }

    /// Where each of some blocks is: the tier from which all its shards can be had, if there is one.
    ///
    /// # Errors
    /// `Closed` at once without a server, `Timeout`, and what the engine gives.
    pub fn locate(&self, request: &LocateRequest) -> Result<Vec<Option<HitTier>>> {
        let (mut rpc, question) = self.question_where(request)?;
        let reply = self.call(self.inner.config.rpc_timeout, async move { rpc.locate(question).await })?;
        tiers_told(request, &reply)
    }

    /// As [`Client::locate`], for callers that must not block; with the namespace in which the blocks were looked for.
    ///
    /// # Errors
    /// As of [`Client::locate`]; `Timeout` after `timeout`.
    ///
    /// # Cancel safety
    /// Dropping it gives the question up.
    pub async fn locate_soon(
        &self,
        request: &LocateRequest,
        timeout: Duration,
    ) -> Result<(NamespaceId, Vec<Option<HitTier>>)> {
        let (mut rpc, question) = self.question_where(request)?;
        let late = |_| Error::new(ErrorKind::Timeout, format!("no answer from the server within {timeout:?}"));
        let reply = tokio::time::timeout(timeout, rpc.locate(question)).await.map_err(late)?;
        let reply = reply.map_err(|status| from_status(&status))?.into_inner();
        Ok((wire::namespace_id(&reply.namespace)?, tiers_told(request, &reply)?))
    }

    fn question_where(&self, request: &LocateRequest) -> Result<(link::Rpc, LocateQuestion)> {
        let asked = request.keys.len();
        if asked > BLOCKS_MAX {
            let message = format!("{asked} keys; give at most {BLOCKS_MAX} in one request");
            return Err(Error::new(ErrorKind::InvalidInput, message));
        }
        let (rpc, session) = self.inner.shared.session()?;
        Ok((rpc, wire::locate_to_wire(session, request)))
    }

    /// Gives a lease back; best effort, it runs out by itself.
    pub fn release(&self, lease: LeaseId) {
        let _best_effort = self.inner.commands.try_send(Command::Release(lease));
    }

    /// The arena that the worker's device can reach wholly by now; `None` without a registered session, or while it is still
    /// being made reachable.
    ///
    /// # Errors
    /// Why the device never will reach it.
    pub fn arena(&self) -> Result<Option<ArenaId>> {
        let (Some(arena), Ok(memory)) = (self.inner.shared.arena(), self.memory()) else { return Ok(None) };
        Ok(memory.is_attached(&arena.mapped.view)?.then(|| arena.mapped.id()))
    }

    /// Starts a load of leased blocks into the worker's memory, behind what is queued on the device's stream `stream` (0 for
    /// host memory). Ends in a [`Completion`] if this returns `Ok`, and in none otherwise.
    ///
    /// # Errors
    /// `Closed` without a registered session, `InvalidInput` for a block outside the memory, `Busy` at a bound.
    pub fn load(
        &self,
        operation: OperationId,
        lease: LeaseId,
        shard: u16,
        blocks: Vec<LoadBlock>,
        stream: u64,
    ) -> Result<()> {
        let kv = self.memory()?;
        check_blocks(&kv, blocks.len(), blocks.iter().map(|block| block.block))?;
        self.submit(operation, Work::Load { lease, shard, blocks }, kv, stream)
    }

    /// Loads blocks from the places that a lookup told, without the server: it is only told when the copy has ended. With
    /// `before`, what is queued on `stream` from now on runs after the load; otherwise only the load runs after what is queued
    /// there already. Ends in a [`Completion`] if this returns `Ok`, and in none otherwise.
    ///
    /// # Errors
    /// `NotFound` if `arena` is not the one that this worker has, `Busy` if its device cannot reach all of it yet, `Timeout` if
    /// the lease has less than 10 s `remaining`, `InvalidInput` for a block or place outside; nothing was copied then.
    #[expect(clippy::too_many_arguments, reason = "the values of one request")]
    pub fn load_placed(
        &self,
        operation: OperationId,
        lease: LeaseId,
        shard: u16,
        arena: ArenaId,
        blocks: Vec<(u32, Place)>,
        remaining: Duration,
        (stream, before): (u64, bool),
    ) -> Result<()> {
        let kv = self.known_memory()?;
        check_blocks(&kv, blocks.len(), blocks.iter().map(|(block, _)| *block))?;
        PlacedLoads::check_lease(remaining)?;
        let held = self.inner.shared.arena().filter(|held| held.mapped.id() == arena).ok_or_else(|| {
            Error::new(ErrorKind::NotFound, "the blocks lie in the memory of another server; look them up again")
        })?;
        if !kv.is_attached(&held.mapped.view)? {
            return Err(Error::new(ErrorKind::Busy, "the device cannot reach all of the server's memory yet"));
        }
        self.inner.shared.completions.accept(operation)?;
        let cancelled = self.inner.shared.placed.start(operation);
        let (shared, commands) = (Arc::clone(&self.inner.shared), self.inner.commands.clone());
        let numbers: Vec<u32> = blocks.iter().map(|(block, _)| *block).collect();
        let view = Arc::clone(&held.mapped.view);
        let done = Box::new(move |result: Result<()>| {
            drop(held);
            let outcome = PlacedLoads::outcome(result, numbers);
            // A lease that cannot be given back runs out by itself.
            let _best_effort = commands.try_send(Command::Consume(lease, shard));
            shared.placed.end(operation);
            shared.completions.end(operation, CompletionResult::Load(outcome));
        });
        let not_started = |error: Error| {
            self.inner.shared.placed.end(operation);
            self.inner.shared.completions.retract(operation);
            Err(error)
        };
        let direction = CopyDirection::ToDevice;
        if before {
            let copy = PlacedCopy { arena: view, direction, blocks, after: None, cancelled, done };
            return kv.load_before(copy, stream).or_else(not_started);
        }
        let after = match kv.fence(stream) {
            Ok(after) => after,
            Err(error) => return not_started(error),
        };
        let copy = PlacedCopy { arena: view, direction, blocks, after, cancelled, done };
        match self.inner.copies.start_copy((kv, copy)) {
            Ok(()) => Ok(()),
            Err(_) => not_started(Error::new(ErrorKind::Busy, "the queue of copies is full; try again later")),
        }
    }

    /// Starts a save of blocks out of the worker's memory, ancestors first, behind what is queued on the device's
    /// stream `stream` (0 for host memory). Ends in a [`Completion`] if this returns `Ok`, and in none otherwise. Saves reach
    /// the server in the order of these calls.
    ///
    /// # Errors
    /// As [`Client::load`].
    pub fn save(&self, operation: OperationId, target: SaveTarget, blocks: Vec<BlockSave>, stream: u64) -> Result<()> {
        let kv = self.memory()?;
        check_blocks(&kv, blocks.len(), blocks.iter().map(|block| block.block))?;
        self.submit(operation, Work::Save { target, blocks }, kv, stream)
    }

    /// Asks for an operation to end early; its completion still comes, soon. Unknown ones are ignored.
    pub fn cancel(&self, operation: OperationId) {
        self.inner.shared.placed.cancel(Some(operation));
        if self.inner.commands.try_send(Command::Cancel(operation)).is_err() {
            tracing::warn!(operation = operation.0, "not cancelled: the client is closed or its queue is full");
        }
    }

    /// What has ended since the last call. Never waits.
    pub fn poll(&self) -> Vec<Completion> {
        self.inner.shared.completions.fetch()
    }

    /// Waits until [`Client::poll`] has something to return; whether it has.
    pub fn wait_completion(&self, timeout: Duration) -> bool {
        self.inner.shared.completions.wait(timeout)
    }

    /// Makes everything durable whose save has completed before.
    ///
    /// # Errors
    /// `Closed` at once without a server, `Timeout`, and what the engine gives.
    pub fn flush(&self, timeout: Duration) -> Result<()> {
        let (mut rpc, _) = self.inner.shared.session()?;
        let (timeout_ms, patience) = self.patience(timeout);
        self.call(patience, async move { rpc.flush(FlushRequest { timeout_ms }).await }).map(drop)
    }

    /// Whether what lookups find is loaded; with `change`, from now on.
    ///
    /// # Errors
    /// `Closed` without a server, `Timeout`.
    pub fn load_policy(&self, change: Option<LoadPolicy>) -> Result<LoadPolicy> {
        let (mut rpc, _) = self.inner.shared.session()?;
        let policy = change.map(|policy| policy.to_string()).unwrap_or_default();
        let timeout = self.inner.config.rpc_timeout;
        let reply = self.call(timeout, async move { rpc.load_policy(LoadPolicyRequest { policy }).await })?;
        reply.policy.parse()
    }

    /// The latest decisions of the server whether to load, newest first, as a JSON array: for requests of this name, or for
    /// all if it is empty. `limit`: 1 to 1,024.
    ///
    /// # Errors
    /// `Closed` without a server, `Timeout`, `InvalidInput`.
    pub fn explain(&self, request: &str, limit: u32) -> Result<String> {
        let (mut rpc, _) = self.inner.shared.session()?;
        let (request, timeout) = (request.to_owned(), self.inner.config.rpc_timeout);
        let reply = self.call(timeout, async move { rpc.explain(ExplainRequest { request, limit }).await })?;
        Ok(reply.decisions_json)
    }

    /// Tries now to open the server's store again, if it went out of use.
    ///
    /// # Errors
    /// Why it can not be opened; `Closed` at once without a server, `Timeout`.
    pub fn reopen_store(&self, timeout: Duration) -> Result<()> {
        let (mut rpc, _) = self.inner.shared.session()?;
        let (timeout_ms, patience) = self.patience(timeout);
        self.call(patience, async move { rpc.reopen_store(ReopenStoreRequest { timeout_ms }).await }).map(drop)
    }

    /// The namespaces of the server behind `after`, or from the first on, as a JSON array of at most 64; and whether those are the
    /// last. At most `rows_max` rows of its index are counted, up to 100,000,000; 0: the drive is not looked at.
    ///
    /// # Errors
    /// `Closed` at once without a server, `Timeout` after `timeout`, `InvalidInput`, `Busy` if too many requests wait.
    pub fn list_namespaces(
        &self,
        after: Option<&NamespaceId>,
        rows_max: u64,
        timeout: Duration,
    ) -> Result<(String, bool)> {
        let (mut rpc, _) = self.inner.shared.session()?;
        let after = after.map(|id| id.as_bytes().to_vec()).unwrap_or_default().into();
        let request = ListNamespacesRequest { after, rows_max };
        let reply = self.call(timeout, async move { rpc.list_namespaces(request).await })?;
        Ok((reply.namespaces_json, reply.is_last))
    }

    /// Purges a namespace of the server: nothing of it is found again, which is durable when this returns. With `unused_for` only
    /// if it was neither looked up nor saved to for so long.
    ///
    /// # Errors
    /// `NotFound` if there is none, `Busy` if it was used since, or the server was started since; `InvalidInput` for that of objects, `Poisoned` while its store is out of use, `Timeout` after
    /// `timeout` (purge it again), `Closed` at once without a server, and what its store reports.
    pub fn purge(
        &self,
        namespace: &NamespaceId,
        unused_for: Option<Duration>,
        timeout: Duration,
    ) -> Result<PurgeOutcome> {
        let (mut rpc, _) = self.inner.shared.session()?;
        let (timeout_ms, patience) = self.patience(timeout);
        let unused_for_ms = unused_for.map_or(0, jobs::wire_ms);
        let request = PurgeRequest { namespace: namespace.as_bytes().to_vec().into(), timeout_ms, unused_for_ms };
        let reply = self.call(patience, async move { rpc.purge(request).await })?;
        Ok(PurgeOutcome {
            dram_blocks: reply.dram_blocks,
            dram_bytes: reply.dram_bytes,
            drive_blocks: reply.drive_blocks,
            drive_bytes: reply.drive_bytes,
            destroyed_keys: reply.destroyed_keys,
            is_swept: reply.is_swept,
        })
    }

    /// A timeout that the server keeps to itself, in milliseconds, and how long its answer is waited for: it still has to
    /// travel.
    fn patience(&self, timeout: Duration) -> (u32, Duration) {
        let timeout = timeout.clamp(Duration::from_millis(1), FLUSH_TIMEOUT_MAX);
        (u32::try_from(timeout.as_millis()).unwrap_or(u32::MAX), timeout + self.inner.config.rpc_timeout)
    }

    /// The server's counters and gauges: the engine's under `engine`, the server's own beside it.
    ///
    /// # Errors
    /// `Closed` at once without a server, `Timeout`.
    pub fn stats(&self) -> Result<serde_json::Value> {
        let (mut rpc, _) = self.inner.shared.session()?;
        let reply = self.call(self.inner.config.rpc_timeout, async move { rpc.stats(StatsRequest {}).await })?;
        let StatsReply { engine_json, server_version, uptime_ms, sessions, operations } = reply;
        let engine: serde_json::Value = serde_json::from_str(&engine_json)
            .map_err(|error| Error::new(ErrorKind::Corrupt, format!("the server's counters are no JSON: {error}")))?;
        Ok(serde_json::json!({
            "engine": engine,
            "server_version": server_version,
            "uptime_ms": uptime_ms,
            "sessions": sessions,
            "operations": operations,
        }))
    }

    /// Ends the session: operations in flight complete as failed or dropped, as soon as their copies have ended. Waits for
    /// that, at most `timeout`. Completions can still be polled; everything else fails with `Closed`.
    pub fn close(&self, timeout: Duration) {
        let (answer, answered) = crossbeam_channel::bounded(1);
        let deadline = Instant::now() + timeout;
        self.inner.shared.placed.cancel(None);
        let mut command = Command::Close(answer);
        while let Err(error) = self.inner.commands.try_send(command) {
            match error {
                // The queue is full of calls that the client's task is working off.
                mpsc::error::TrySendError::Full(back) if Instant::now() < deadline => {
                    command = back;
                    std::thread::sleep(Duration::from_millis(1));
                }
                _ => return,
            }
        }
        let _late = answered.recv_deadline(deadline);
        let _in_time = self.inner.shared.placed.wait(deadline);
    }

    fn memory(&self) -> Result<Arc<dyn DeviceMemory>> {
        self.inner.shared.check_working()?;
        self.known_memory()
    }

    fn known_memory(&self) -> Result<Arc<dyn DeviceMemory>> {
        let registration = self.inner.registration.lock();
        let memory = registration.as_ref().map(|registration| Arc::clone(&registration.memory));
        memory.ok_or_else(|| Error::new(ErrorKind::InvalidInput, "no memory is registered; call register first"))
    }

    fn submit(&self, operation: OperationId, work: Work, kv: Arc<dyn DeviceMemory>, stream: u64) -> Result<()> {
        let after = kv.fence(stream)?;
        self.inner.shared.completions.accept(operation)?;
        self.send(Command::Submit { operation, work, kv, after })
            .inspect_err(|_| self.inner.shared.completions.retract(operation))
    }

    fn send(&self, command: Command) -> Result<()> {
        if self.inner.shared.is_closed() {
            return Err(Error::new(ErrorKind::Closed, "the client is closed; start another"));
        }
        self.inner.commands.try_send(command).map_err(|error| match error {
            mpsc::error::TrySendError::Full(_) => Error::new(
                ErrorKind::Busy,
                format!("{COMMANDS_MAX} calls are waiting, which is the limit; try again later"),
            ),
            mpsc::error::TrySendError::Closed(_) => {
                Error::new(ErrorKind::Closed, "the client is closed; start another")
            }
        })
    }

    /// Runs an RPC on the client's thread and waits for its answer, at most `timeout`.
    fn call<T: Send + 'static>(
        &self,
        timeout: Duration,
        rpc: impl Future<Output = Result<tonic::Response<T>, Status>> + Send + 'static,
    ) -> Result<T> {
        let late = || Error::new(ErrorKind::Timeout, format!("no answer from the server within {timeout:?}"));
        let Some(runtime) = &self.inner.runtime else {
            return Err(Error::new(ErrorKind::Closed, "the client is closed; start another"));
        };
        let (answer, answered) = crossbeam_channel::bounded(1);
        runtime.spawn(async move {
            if let Ok(result) = tokio::time::timeout(timeout, rpc).await {
                let _gone = answer.try_send(result);
            }
        });
        let result = answered.recv_timeout(timeout).map_err(|_| late())?;
        result.map(tonic::Response::into_inner).map_err(|status| from_status(&status))
    }
}

fn tiers_told(request: &LocateRequest, reply: &LocateReply) -> Result<Vec<Option<HitTier>>> {
    let (told, asked) = (reply.tiers.len(), request.keys.len());
    if told != asked {
        return Err(Error::new(ErrorKind::Corrupt, format!("the server told of {told} blocks, not of {asked}")));
    }
    reply.tiers.iter().copied().map(wire::tier).collect()
}

fn check_blocks(kv: &Arc<dyn DeviceMemory>, count: usize, mut blocks: impl Iterator<Item = u32>) -> Result<()> {
    let limit = kv.layout().blocks();
    if count > BLOCKS_MAX {
        return Err(Error::new(
            ErrorKind::InvalidInput,
            format!("{count} blocks; give at most {BLOCKS_MAX} in one operation"),
        ));
    }
    match blocks.find(|block| *block >= limit) {
        Some(block) => Err(Error::new(
            ErrorKind::InvalidInput,
            format!("block {block} is outside the registered memory of {limit} blocks"),
        )),
        None => Ok(()),
    }
}
