//! A server as the cache: the server's client, and one more of them for every epoch. A client is one worker of one
//! instance for its whole life; a worker that registers under another name goes on with a new client, while the old one
//! ends what it has in flight.

use std::collections::HashSet;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use pegaflow_engine::{
    ArenaId, BlockSave, DeviceMemory, Error, ErrorKind, HitTier, InstanceId, InstanceSpec, LeaseId, LoadBlock,
    LocateRequest, LookupReply, LookupRequest, OperationId, Result, SaveTarget,
};
use pegaflow_server::client::{Client, ClientConfig, Completion, CompletionResult, Endpoint};

use crate::embedded::{Ended, PlacedLoad};

/// How long a client of an earlier epoch is waited for; what is in flight then is fetched later.
const RETIRE_TIMEOUT: Duration = Duration::from_secs(1);

/// A client, and what it has in flight.
struct Used {
    client: Client,
    instance: Option<InstanceId>,
    in_flight: HashSet<OperationId>,
}

/// A session with a server.
pub(crate) struct Remote {
    config: ClientConfig,
    /// The client of every epoch that still has something in flight; the last is the present one.
    clients: Mutex<Vec<Used>>,
}

impl Remote {
    /// Starts connecting; a server need not be there.
    ///
    /// # Errors
    /// Those of [`Client::start`].
    pub(crate) fn start(
        address: Result<SocketAddr, PathBuf>,
        name: &str,
        lookup_timeout: Duration,
        rpc_timeout: Duration,
    ) -> Result<Self> {
        let endpoint = address.map_or_else(Endpoint::Unix, Endpoint::Tcp);
        let config = ClientConfig { lookup_timeout, rpc_timeout, ..ClientConfig::new(endpoint, name) };
        let client = Client::start(config.clone())?;
        Ok(Self { config, clients: Mutex::new(vec![Used::new(client)]) })
    }

    fn present(&self) -> Result<Client> {
        self.clients.lock().last().map(|used| used.client.clone()).ok_or_else(closed)
    }

    pub(crate) fn is_connected(&self) -> bool {
        self.present().is_ok_and(|client| client.is_connected())
    }

    pub(crate) fn wait_connected(&self, timeout: Duration) -> bool {
        self.present().is_ok_and(|client| client.wait_connected(timeout).is_ok())
    }

    pub(crate) fn register(&self, spec: InstanceSpec, memory: Arc<dyn DeviceMemory>) -> Result<()> {
        let instance = spec.instance.clone();
        let earlier = {
            let clients = self.clients.lock();
            let used = clients.last().ok_or_else(closed)?;
            used.instance.as_ref().is_some_and(|earlier| *earlier != instance).then(|| used.client.clone())
        };
        if earlier.is_some() {
            let next = Client::start(self.config.clone())?;
            self.clients.lock().push(Used::new(next));
        }
        let client = self.present()?;
        client.register(spec, memory)?;
        // Only now: both map the same arena, and the one mapping goes on being used.
        if let Some(earlier) = earlier {
            client.wait_connected(RETIRE_TIMEOUT).unwrap_or_else(|error| tracing::debug!(%error, "not connected yet"));
            earlier.close(RETIRE_TIMEOUT);
        }
        if let Some(used) = self.clients.lock().last_mut() {
            used.instance = Some(instance);
        }
        Ok(())
    }

    pub(crate) fn lookup(&self, request: &LookupRequest) -> Result<LookupReply> {
        self.present()?.lookup(request)
    }

    pub(crate) fn locate(&self, request: &LocateRequest) -> Result<Vec<Option<HitTier>>> {
        self.present()?.locate(request)
    }

    pub(crate) fn release(&self, lease: LeaseId) {
        if let Ok(client) = self.present() {
            client.release(lease);
        }
    }

    /// Starts an operation on the present client and notes that it is in flight there.
    fn start_operation(&self, operation: OperationId, start: impl FnOnce(&Client) -> Result<()>) -> Result<()> {
        // Held while the operation is handed over, which never waits: a completion cannot be polled before it is noted.
        let mut clients = self.clients.lock();
        let used = clients.last_mut().ok_or_else(closed)?;
        start(&used.client)?;
        used.in_flight.insert(operation);
        Ok(())
    }

    pub(crate) fn load(
        &self,
        operation: OperationId,
        lease: LeaseId,
        shard: u16,
        blocks: Vec<LoadBlock>,
        stream: u64,
    ) -> Result<()> {
        self.start_operation(operation, |client| client.load(operation, lease, shard, blocks, stream))
    }

    pub(crate) fn arena(&self) -> Result<Option<ArenaId>> {
        self.present()?.arena()
    }

    pub(crate) fn load_placed(&self, load: PlacedLoad) -> Result<()> {
        let PlacedLoad { operation, lease, shard, arena, blocks, remaining, stream, before } = load;
        self.start_operation(operation, |client| {
            client.load_placed(operation, lease, shard, arena, blocks, remaining, (stream, before))
        })
    }

    pub(crate) fn save(
        &self,
        operation: OperationId,
        target: SaveTarget,
        blocks: Vec<BlockSave>,
        stream: u64,
    ) -> Result<()> {
        self.start_operation(operation, |client| client.save(operation, target, blocks, stream))
    }

    pub(crate) fn cancel(&self, operation: OperationId) {
        let clients = self.clients.lock();
        if let Some(used) = clients.iter().find(|used| used.in_flight.contains(&operation)) {
            used.client.cancel(operation);
        }
    }

    pub(crate) fn poll(&self, wait: Duration) -> Vec<Ended> {
        let ended = self.fetch();
        if ended.is_empty() && !wait.is_zero() {
            // The oldest client with something in flight is what a caller who waits is waiting for.
            let waited_for = {
                let clients = self.clients.lock();
                clients.iter().find(|used| !used.in_flight.is_empty()).map(|used| used.client.clone())
            };
            match waited_for {
                Some(client) => client.wait_completion(wait),
                None => return ended,
            };
            return self.fetch();
        }
        ended
    }

    fn fetch(&self) -> Vec<Ended> {
        let mut clients = self.clients.lock();
        let mut ended = Vec::new();
        for used in clients.iter_mut() {
            for Completion { operation, result } in used.client.poll() {
                used.in_flight.remove(&operation);
                ended.push(match result {
                    CompletionResult::Load(outcome) => Ended::Load(operation, outcome),
                    CompletionResult::Save(outcome) => Ended::Save(operation, outcome),
                });
            }
        }
        let present = clients.len().saturating_sub(1);
        let mut index = 0;
        clients.retain(|used| {
            index += 1;
            index > present || !used.in_flight.is_empty()
        });
        ended
    }

    pub(crate) fn flush(&self, timeout: Duration) -> Result<()> {
        self.present()?.flush(timeout)
    }

    /// The server's statistics as a JSON text.
    pub(crate) fn stats(&self) -> Result<String> {
        Ok(self.present()?.stats()?.to_string())
    }

    pub(crate) fn close(&self, timeout: Duration) -> Result<()> {
        let deadline = Instant::now() + timeout;
        let clients: Vec<Client> = self.clients.lock().iter().map(|used| used.client.clone()).collect();
        for client in clients {
            client.close(deadline.saturating_duration_since(Instant::now()));
        }
        Ok(())
    }
}

impl Used {
    fn new(client: Client) -> Self {
        Self { client, instance: None, in_flight: HashSet::new() }
    }
}

fn closed() -> Error {
    Error::new(ErrorKind::Closed, "the cache is closed; open it again")
}
