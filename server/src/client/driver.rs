//! The task behind a client: it keeps a session open, repeats the registration, and moves inputs (calls, events, answers,
//! ended copies, deadlines) into [`Transfers`] and its actions out. It never waits for anything but all of them at once.

use std::future::poll_fn;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::StreamExt;
use futures::future::BoxFuture;
use futures::stream::FuturesUnordered;
use pegaflow_engine::{Error, ErrorKind, HostMemory, LeaseId, OperationId, Result};
use tokio::sync::mpsc;
use tonic::Status;

use super::config::{ClientConfig, Registration};
use super::copies::{Copied, CopyThreads};
use super::link::{self, Link};
use super::shared::Shared;
use super::transfers::{Action, Pool, Transfers, Work};
use crate::limits::BLOCKS_MAX;
use crate::proto::session_event::Event;
use crate::proto::{CancelRequest, ReleaseRequest, SessionEvent};
use crate::status::from_status;
use crate::wire;

const BACKOFF_MIN: Duration = Duration::from_millis(50);
const BACKOFF_MAX: Duration = Duration::from_secs(2);
/// The pause before a registration that failed for a passing reason is tried again.
const REGISTER_RETRY: Duration = Duration::from_secs(1);

/// What a caller asks for.
pub(super) enum Command {
    /// Answered when the server has, or at once if there is none.
    Register(Registration, crossbeam_channel::Sender<Result<()>>),
    Submit {
        operation: OperationId,
        work: Work,
        kv: Arc<HostMemory>,
    },
    Cancel(OperationId),
    Release(LeaseId),
    /// Answered when every operation has completed.
    Close(crossbeam_channel::Sender<()>),
}

/// The end of an RPC: of a chunk, or of something that nobody waits for.
type Answered = (Option<u64>, Result<(), Status>);

pub(super) struct Driver {
    config: ClientConfig,
    shared: Arc<Shared>,
    commands: mpsc::Receiver<Command>,
    transfers: Transfers,
    copies: CopyThreads,
    copied: mpsc::Receiver<Copied>,
    /// `None` while there is no session.
    link: Option<Link>,
    last_event: Instant,
    connecting: Option<BoxFuture<'static, Result<Link>>>,
    backoff: Duration,
    registration: Option<Registration>,
    registering: Option<BoxFuture<'static, Result<Pool>>>,
    /// Who waits for the registration.
    waiting: Vec<crossbeam_channel::Sender<Result<()>>>,
    rpcs: FuturesUnordered<BoxFuture<'static, Answered>>,
    releases: Vec<LeaseId>,
    closing: Vec<crossbeam_channel::Sender<()>>,
}

impl Driver {
    pub(super) fn new(
        config: ClientConfig,
        shared: Arc<Shared>,
        commands: mpsc::Receiver<Command>,
        (copies, copied): (CopyThreads, mpsc::Receiver<Copied>),
    ) -> Self {
        let transfers = Transfers::new(Arc::clone(&shared.completions), config.operation_timeout);
        Self {
            connecting: Some(Box::pin(link::connect(config.clone()))),
            config,
            shared,
            commands,
            transfers,
            copies,
            copied,
            link: None,
            last_event: Instant::now(),
            backoff: BACKOFF_MIN,
            registration: None,
            registering: None,
            waiting: Vec::new(),
            rpcs: FuturesUnordered::new(),
            releases: Vec::new(),
            closing: Vec::new(),
        }
    }

    /// Runs until the client is closed or gone.
    ///
    /// # Cancel safety
    /// Dropping it loses completions; copies end on their own and hold their memories.
    pub(super) async fn run(mut self) {
        while self.closing.is_empty() || !self.transfers.is_idle() {
            let deadline = self.next_deadline();
            tokio::select! {
                command = self.commands.recv() => match command {
                    Some(command) => self.obey(command),
                    None => break,
                },
                Some(copied) = self.copied.recv() => self.transfers.copied(&copied),
                Some(answered) = self.rpcs.next(), if !self.rpcs.is_empty() => self.answered(answered),
                event = next_event(&mut self.link), if self.link.is_some() => self.event(event),
                linked = poll_option(&mut self.connecting), if self.connecting.is_some() => self.connected(linked),
                pool = poll_option(&mut self.registering), if self.registering.is_some() => self.registered(pool),
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
        silence.into_iter().chain(self.transfers.next_deadline()).min()
    }

    fn tick(&mut self) {
        let now = Instant::now();
        if self.transfers.tick(now) {
            self.lose_link(&Error::new(ErrorKind::Timeout, "the server never ended a cancelled operation"));
        } else if self.link.as_ref().is_some_and(|link| self.last_event + link.silence_max <= now) {
            self.lose_link(&Error::new(ErrorKind::Timeout, "the server has been silent for too long"));
        }
    }

    fn obey(&mut self, command: Command) {
        match command {
            Command::Register(registration, answer) => self.register(registration, answer),
            Command::Submit { operation, work, kv } => self.transfers.submit(operation, work, kv, Instant::now()),
            Command::Cancel(operation) => self.transfers.cancel(operation, Instant::now()),
            // One that is not given back runs out by itself.
            Command::Release(lease) if self.link.is_some() && self.releases.len() < BLOCKS_MAX => {
                self.releases.push(lease);
            }
            Command::Release(_) => {}
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
        self.registering = Some(Box::pin(async move {
            if !pause.is_zero() {
                tokio::time::sleep(pause).await;
            }
            link::register(rpc, session, registration, config).await
        }));
    }

    fn registered(&mut self, pool: Result<Pool>) {
        self.registering = None;
        let answer = match pool {
            Ok(pool) => {
                let Some(link) = &self.link else { return };
                self.transfers.session_ready(link.session, pool);
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
        self.shared.unlinked();
        self.transfers.session_lost();
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
                Some(Event::LoadEnded(ended)) => self.transfers.load_ended(&ended),
                Some(Event::SaveEnded(ended)) => self.transfers.save_ended(&ended),
                Some(Event::Opened(_) | Event::Heartbeat(_)) | None => {}
            },
            Ok(None) => self.lose_link(&Error::new(ErrorKind::Closed, "the server ended the session")),
            Err(status) => self.lose_link(&from_status(&status)),
        }
    }

    fn answered(&mut self, (chunk, result): Answered) {
        if let Err(status) = &result
            && link::is_link_broken(status)
        {
            return self.lose_link(&from_status(status));
        }
        if let (Some(chunk), Err(status)) = (chunk, &result) {
            tracing::debug!(chunk, "not accepted: {:#}", from_status(status));
        }
        if let Some(chunk) = chunk {
            self.transfers.answered(chunk, result.is_ok());
        }
    }

    /// Carries out what the transfers ask for.
    fn pump(&mut self) {
        loop {
            let actions = self.transfers.pump();
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
    }

    fn act(&mut self, action: Action) {
        match action {
            Action::Load { chunk, request } => {
                self.call(Some(chunk), |mut rpc, _| async move { rpc.load(request).await.map(drop) });
            }
            Action::Save { chunk, request } => {
                self.call(Some(chunk), |mut rpc, _| async move { rpc.save(request).await.map(drop) });
            }
            Action::Cancel { chunks: operations } => {
                self.call(None, |mut rpc, session| async move {
                    rpc.cancel(CancelRequest { session, operations }).await.map(drop)
                });
            }
            Action::Copy(job) => {
                let chunk = job.chunk;
                if self.copies.start_copy(job).is_err() {
                    tracing::error!("the copy threads are gone; a chunk is lost");
                    self.transfers.copied(&Copied { chunk, is_complete: false });
                }
            }
        }
    }

    /// Starts an RPC on the live session. An answer that does not come in time is one from the transport: it is not known
    /// whether the server acts on the request, so the session is given up.
    fn call<F>(&mut self, chunk: Option<u64>, start: impl FnOnce(link::Rpc, u64) -> F)
    where
        F: Future<Output = Result<(), Status>> + Send + 'static,
    {
        let Some(link) = &self.link else { return };
        let (rpc, timeout) = (start(link.rpc.clone(), link.session), self.config.rpc_timeout);
        self.rpcs.push(Box::pin(async move {
            let late = || Err(Status::deadline_exceeded(format!("no answer within {timeout:?}")));
            (chunk, tokio::time::timeout(timeout, rpc).await.unwrap_or_else(|_| late()))
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
