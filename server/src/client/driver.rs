//! The task behind a client: it keeps a session open, repeats the registration, and moves inputs (calls, events, answers,
//! ended copies, deadlines) into [`Operations`] and its actions out. It never waits for anything but all of them at once.

use std::future::poll_fn;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::StreamExt;
use futures::future::BoxFuture;
use futures::stream::FuturesUnordered;
use pegaflow_engine::{DeviceMemory, Error, ErrorKind, Fence, LeaseId, OperationId, PlacedCopy, Result};
use tokio::sync::mpsc;
use tonic::Status;

use super::arena::SessionArena;
use super::config::{ClientConfig, Registration};
use super::copies::CopyThreads;
use super::link::{self, Link};
use super::operations::{Action, CopyJob, Operations, SENT_MAX, Work};
use super::shared::Shared;
use crate::limits::BLOCKS_MAX;
use crate::proto::session_event::Event;
use crate::proto::{CancelRequest, ConsumeRequest, CopyEndedRequest, ReleaseRequest, SessionEvent};
use crate::status::from_status;
use crate::wire;

const BACKOFF_MIN: Duration = Duration::from_millis(50);
const BACKOFF_MAX: Duration = Duration::from_secs(2);
/// The pause before a registration that failed for a passing reason is tried again.
const REGISTER_RETRY: Duration = Duration::from_secs(1);
/// How long the arena stays mapped after the session was lost, for copies at places that were told before. Short: a new
/// server wants the memory.
const ARENA_LINGER: Duration = Duration::from_secs(2);

/// What a caller asks for.
pub(super) enum Command {
    /// Answered when the server has, or at once if there is none.
    Register(Registration, crossbeam_channel::Sender<Result<()>>),
    Submit {
        operation: OperationId,
        work: Work,
        kv: Arc<dyn DeviceMemory>,
        after: Option<Fence>,
    },
    Cancel(OperationId),
    Release(LeaseId),
    /// A shard's blocks were copied by the worker itself.
    Consume(LeaseId, u16),
    /// Answered when every operation has completed.
    Close(crossbeam_channel::Sender<()>),
}

/// The end of an RPC: of a chunk, or of something that nobody waits for.
type Answered = (Option<u64>, Result<(), Status>);

/// The end of a copy: its order, its operation on the wire, whether all was copied.
type Copied = ((u64, u64), u64, bool);

pub(super) struct Driver {
    config: ClientConfig,
    shared: Arc<Shared>,
    commands: mpsc::Receiver<Command>,
    operations: Operations,
    copies: Arc<CopyThreads>,
    copied: mpsc::Receiver<Copied>,
    report_copied: mpsc::Sender<Copied>,
    /// `None` while there is no session.
    link: Option<Link>,
    last_event: Instant,
    connecting: Option<BoxFuture<'static, Result<Link>>>,
    backoff: Duration,
    registration: Option<Registration>,
    registering: Option<BoxFuture<'static, Result<Arc<SessionArena>>>>,
    /// Who waits for the registration.
    waiting: Vec<crossbeam_channel::Sender<Result<()>>>,
    rpcs: FuturesUnordered<BoxFuture<'static, Answered>>,
    releases: Vec<LeaseId>,
    consumed: Vec<(LeaseId, u16)>,
    closing: Vec<crossbeam_channel::Sender<()>>,
}

impl Driver {
    pub(super) fn new(
        config: ClientConfig,
        shared: Arc<Shared>,
        commands: mpsc::Receiver<Command>,
        copies: Arc<CopyThreads>,
    ) -> Self {
        let operations = Operations::new(Arc::clone(&shared.completions), config.operation_timeout);
        // One copy at a time for each operation, and some of those that a lost session left.
        let (report_copied, copied) = mpsc::channel(4 * SENT_MAX);
        Self {
            connecting: Some(Box::pin(link::connect(config.clone()))),
            config,
            shared,
            commands,
            operations,
            copies,
            copied,
            report_copied,
            link: None,
            last_event: Instant::now(),
            backoff: BACKOFF_MIN,
            registration: None,
            registering: None,
            waiting: Vec::new(),
            rpcs: FuturesUnordered::new(),
            releases: Vec::new(),
            consumed: Vec::new(),
            closing: Vec::new(),
        }
    }

    /// Runs until the client is closed or gone.
    ///
    /// # Cancel safety
    /// Dropping it loses completions; copies end on their own and hold their memories.
    pub(super) async fn run(mut self) {
        while self.closing.is_empty() || !self.operations.is_idle() {
            let deadline = self.next_deadline();
            tokio::select! {
                command = self.commands.recv() => match command {
                    Some(command) => self.obey(command),
                    None => break,
                },
                Some((order, wire, is_complete)) = self.copied.recv() => self.operations.copied(order, wire, is_complete),
                Some(answered) = self.rpcs.next(), if !self.rpcs.is_empty() => self.answered(answered),
                event = next_event(&mut self.link), if self.link.is_some() => self.event(event),
                linked = poll_option(&mut self.connecting), if self.connecting.is_some() => self.connected(linked),
                arena = poll_option(&mut self.registering), if self.registering.is_some() => self.registered(arena),
                () = tokio::time::sleep_until(deadline.unwrap_or_else(Instant::now).into()), if deadline.is_some() => {
                    self.tick();
                }
            }
            self.pump();
        }
        self.shared.close();
        for closing in self.closing {
            let _gone = closing.send(());
        }
    }

    fn next_deadline(&self) -> Option<Instant> {
        let silence = self.link.as_ref().map(|link| self.last_event + link.silence_max);
        silence.into_iter().chain(self.operations.next_deadline()).min()
    }

    fn tick(&mut self) {
        let now = Instant::now();
        self.operations.tick(now);
        if self.link.as_ref().is_some_and(|link| self.last_event + link.silence_max <= now) {
            self.lose_link(&Error::new(ErrorKind::Timeout, "the server has been silent for too long"));
        }
    }

    fn obey(&mut self, command: Command) {
        match command {
            Command::Register(registration, answer) => self.register(registration, answer),
            Command::Submit { operation, work, kv, after } => {
                self.operations.submit(operation, work, kv, after, Instant::now());
            }
            Command::Cancel(operation) => self.operations.cancel(operation),
            // One that is not given back runs out by itself.
            Command::Release(lease) if self.link.is_some() && self.releases.len() < BLOCKS_MAX => {
                self.releases.push(lease);
            }
            Command::Consume(lease, shard) if self.link.is_some() && self.consumed.len() < BLOCKS_MAX => {
                self.consumed.push((lease, shard));
            }
            Command::Release(_) | Command::Consume(..) => {}
            Command::Close(answer) => {
                self.closing.push(answer);
                self.shared.close();
                self.drop_link();
            }
        }
    }

    fn register(&mut self, registration: Registration, answer: crossbeam_channel::Sender<Result<()>>) {
        let refuse = |error: Error| drop(answer.try_send(Err(error)));
        match &self.registration {
            Some(known) if !known.is_same(&registration) => {
                return refuse(Error::new(
                    ErrorKind::InvalidInput,
                    "this client is registered as another worker; start a client for each worker",
                ));
            }
            Some(_) if self.shared.is_connected() => return drop(answer.try_send(Ok(()))),
            _ => {}
        }
        self.registration = Some(registration);
        self.shared.must_register();
        if self.link.is_none() {
            return drop(answer.try_send(Ok(())));
        }
        self.waiting.push(answer);
        if self.registering.is_none() {
            self.start_registering(Duration::ZERO);
        }
    }

    fn start_registering(&mut self, pause: Duration) {
        let (Some(link), Some(registration)) = (&self.link, self.registration.clone()) else { return };
        let (rpc, session, config) = (link.rpc.clone(), link.session, self.config.clone());
        let mapped = self.shared.arena().map(|arena| Arc::clone(&arena.mapped));
        self.registering = Some(Box::pin(async move {
            if !pause.is_zero() {
                tokio::time::sleep(pause).await;
            }
            link::register(rpc, session, registration, mapped, config).await
        }));
    }

    fn registered(&mut self, arena: Result<Arc<SessionArena>>) {
        self.registering = None;
        let answer = match arena {
            Ok(arena) => {
                let Some(link) = &self.link else { return };
                self.shared.set_arena(arena);
                self.operations.session_ready(link.session);
                self.backoff = BACKOFF_MIN;
                self.shared.registered();
                tracing::info!(client = self.config.name, "registered with the server at {}", self.config.endpoint);
                Ok(())
            }
            Err(error) if link::is_refusal(error.kind()) => {
                tracing::error!("the server refused the registration: {error:#}");
                self.registration = None;
                self.shared.refused(&error);
                Err(error)
            }
            Err(error) => {
                tracing::warn!("registering failed and is tried again: {error:#}");
                if error.kind() == ErrorKind::Closed || error.kind() == ErrorKind::NotFound {
                    self.lose_link(&error);
                } else {
                    self.start_registering(REGISTER_RETRY);
                }
                Ok(())
            }
        };
        self.answer_waiting(&answer);
    }

    fn answer_waiting(&mut self, answer: &Result<()>) {
        for waiting in self.waiting.drain(..) {
            // Whoever has stopped waiting learns it from the state.
            let _gone = waiting.try_send(answer.clone());
        }
    }

    fn connected(&mut self, linked: Result<Link>) {
        self.connecting = None;
        match linked {
            Ok(link) => {
                self.last_event = Instant::now();
                self.shared.linked(&link, self.registration.is_some());
                tracing::info!(client = self.config.name, "connected to the server at {}", self.config.endpoint);
                self.link = Some(link);
                if self.registration.is_some() {
                    self.start_registering(Duration::ZERO);
                } else {
                    self.backoff = BACKOFF_MIN;
                }
            }
            Err(error) => {
                if self.shared.failed(&error) {
                    tracing::warn!("{error:#}; trying again until it is there");
                }
                self.reconnect();
            }
        }
    }

    /// Connects after a pause that doubles from failure to failure.
    fn reconnect(&mut self) {
        if !self.closing.is_empty() {
            return;
        }
        let (pause, config) = (self.backoff, self.config.clone());
        self.backoff = (self.backoff * 2).min(BACKOFF_MAX);
        self.connecting = Some(Box::pin(async move {
            tokio::time::sleep(pause).await;
            link::connect(config).await
        }));
    }

    fn drop_link(&mut self) {
        self.link = None;
        self.connecting = None;
        self.registering = None;
        self.rpcs.clear();
        self.releases.clear();
        self.consumed.clear();
        self.shared.unlinked();
        self.operations.session_lost();
        if let Some(arena) = self.shared.arena() {
            let (shared, linger) = (Arc::clone(&self.shared), self.closing.is_empty());
            tokio::spawn(async move {
                if linger {
                    tokio::time::sleep(ARENA_LINGER).await;
                }
                shared.leave_arena(&arena);
            });
        }
    }

    fn lose_link(&mut self, error: &Error) {
        if self.link.is_none() {
            return;
        }
        tracing::warn!(client = self.config.name, "the session with the server is lost, connecting again: {error:#}");
        self.drop_link();
        self.shared.failed(error);
        // A worker that waits for its registration is registered with the next server.
        self.answer_waiting(&Ok(()));
        self.reconnect();
    }

    fn event(&mut self, event: Result<Option<SessionEvent>, Status>) {
        self.last_event = Instant::now();
        match event {
            Ok(Some(SessionEvent { event })) => match event {
                Some(Event::LoadEnded(ended)) => self.operations.load_ended(ended),
                Some(Event::SaveEnded(ended)) => self.operations.save_ended(&ended),
                Some(Event::Copy(order)) => self.operations.ordered(order),
                Some(Event::Opened(_) | Event::Heartbeat(_)) | None => {}
            },
            Ok(None) => self.lose_link(&Error::new(ErrorKind::Closed, "the server ended the session")),
            Err(status) => self.lose_link(&from_status(&status)),
        }
    }

    fn answered(&mut self, (wire, result): Answered) {
        if let Err(status) = &result
            && link::is_link_broken(status)
        {
            return self.lose_link(&from_status(status));
        }
        if let (Some(wire), Err(status)) = (wire, &result) {
            tracing::debug!(wire, "not accepted: {:#}", from_status(status));
        }
        if let Some(wire) = wire {
            self.operations.answered(wire, result.is_ok());
        }
    }

    /// Carries out what the transfers ask for.
    fn pump(&mut self) {
        loop {
            let actions = self.operations.pump();
            if actions.is_empty() {
                break;
            }
            actions.into_iter().for_each(|action| self.act(action));
        }
        if !self.releases.is_empty() {
            let leases = std::mem::take(&mut self.releases);
            let leases: Vec<u8> = leases.into_iter().flat_map(wire::lease_bytes).collect();
            self.call(None, |mut rpc, session| async move {
                rpc.release(ReleaseRequest { session, leases: leases.into() }).await.map(drop)
            });
        }
        for (lease, shard) in std::mem::take(&mut self.consumed) {
            self.call(None, move |mut rpc, session| async move {
                let leases = wire::lease_bytes(lease).to_vec().into();
                rpc.consume(ConsumeRequest { session, leases, shard: shard.into() }).await.map(drop)
            });
        }
    }

    fn act(&mut self, action: Action) {
        match action {
            Action::Load { wire, request } => {
                self.call(Some(wire), |mut rpc, _| async move { rpc.load(request).await.map(drop) });
            }
            Action::Save { wire, request } => {
                self.call(Some(wire), |mut rpc, _| async move { rpc.save(request).await.map(drop) });
            }
            Action::CopyEnded { order, is_complete } => {
                self.call(None, move |mut rpc, session| async move {
                    rpc.copy_ended(CopyEndedRequest { session, order, is_complete }).await.map(drop)
                });
            }
            Action::Cancel { wires: operations } => {
                self.call(None, |mut rpc, session| async move {
                    rpc.cancel(CancelRequest { session, operations }).await.map(drop)
                });
            }
            Action::Copy(job) => self.start_copy(job),
        }
    }

    fn start_copy(&mut self, job: CopyJob) {
        let CopyJob { order, wire, kv, direction, blocks, after, cancelled } = job;
        let Some(arena) = self.shared.arena() else {
            return self.operations.copied(order, wire, false);
        };
        let (report, view) = (self.report_copied.clone(), Arc::clone(&arena.mapped.view));
        let done = Box::new(move |result: Result<()>| {
            if let Err(error) = result.as_ref()
                && error.kind() != ErrorKind::Cancelled
            {
                tracing::error!("copying blocks failed: {error:#}");
            }
            // Only now may the server be told that nothing touches the arena.
            drop(arena);
            // There are never more than the channel holds; when the client is gone nobody waits.
            let _nobody_waits = report.try_send((order, wire, result.is_ok()));
        });
        let copy = PlacedCopy { arena: view, direction, blocks, after, cancelled, done };
        if let Err(refused) = self.copies.start_copy((kv, copy)) {
            (refused.1.done)(Err(Error::new(ErrorKind::Busy, "the queue of copies is full")));
        }
    }

    /// Starts an RPC on the live session. An answer that does not come in time is one from the transport: it is not known
    /// whether the server acts on the request, so the session is given up.
    fn call<F>(&mut self, wire: Option<u64>, start: impl FnOnce(link::Rpc, u64) -> F)
    where
        F: Future<Output = Result<(), Status>> + Send + 'static,
    {
        let Some(link) = &self.link else { return };
        let (rpc, timeout) = (start(link.rpc.clone(), link.session), self.config.rpc_timeout);
        self.rpcs.push(Box::pin(async move {
            let late = || Err(Status::deadline_exceeded(format!("no answer within {timeout:?}")));
            (wire, tokio::time::timeout(timeout, rpc).await.unwrap_or_else(|_| late()))
        }));
    }
}

/// The next event of the session; pending for ever while there is none.
async fn next_event(link: &mut Option<Link>) -> Result<Option<SessionEvent>, Status> {
    match link {
        Some(link) => link.events.message().await,
        None => std::future::pending().await,
    }
}

/// The result of a future that may not be there; pending for ever then.
async fn poll_option<T>(future: &mut Option<BoxFuture<'static, T>>) -> T {
    poll_fn(|cx| match future {
        Some(future) => Pin::as_mut(future).poll(cx),
        None => std::task::Poll::Pending,
    })
    .await
}
