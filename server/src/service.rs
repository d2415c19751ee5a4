//! The RPCs: each checks its request, finds its session and calls the engine. What may wait runs on the blocking pool;
//! lookups of usual size, loads and saves only touch memory and run where they arrive.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Instant;

use futures::{Stream, StreamExt};
use pegaflow_engine::{
    BlockChoice, ByteSize, Error, ErrorKind, EvictOutcome, LoadRequest, OperationId, Result, SaveRequest, Unpinned,
    Whose,
};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tonic::{Request, Response, Status};
use tracing::field::Empty;

use crate::access::Caller;
use crate::limits::{
    BLOCKS_MAX, DECISIONS_MAX, FLUSHES_MAX, KEY_BYTES, NAME_BYTES_MAX, NAMESPACE_ROWS_MAX, NAMESPACES_MAX,
};
use crate::proto::pega_flow_server::PegaFlow;
use crate::proto::{self, JobAction};
use crate::session::Sessions;
use crate::status::to_status;
use crate::wire;

/// Lookups of more keys than this go to the blocking pool.
const INLINE_KEYS_MAX: usize = 4096;

pub(crate) struct Service {
    sessions: Arc<Sessions>,
    flushes: Arc<Semaphore>,
    started: Instant,
}

impl Service {
    pub(crate) fn new(sessions: Arc<Sessions>) -> Self {
        Self { sessions, flushes: Arc::new(Semaphore::new(FLUSHES_MAX)), started: Instant::now() }
    }

    /// One of the few places for requests that wait for the drive.
    fn place_to_wait(&self) -> Result<OwnedSemaphorePermit, Status> {
        Arc::clone(&self.flushes).try_acquire_owned().map_err(|_| {
            let message = format!("{FLUSHES_MAX} flushes are waiting, which is the limit; try again");
            to_status(&Error::new(ErrorKind::Busy, message))
        })
    }
}

fn reply<T>(result: Result<T>) -> Result<Response<T>, Status> {
    result.map(Response::new).map_err(|error| to_status(&error))
}

/// Runs what may wait on the blocking pool.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<Response<T>, Status> {
    reply(on_blocking_pool(work).await)
}

async fn on_blocking_pool<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    let result = tokio::task::spawn_blocking(work).await;
    result.unwrap_or_else(|_| Err(Error::new(ErrorKind::Io, "the request's task panicked; see the server's log")))
}

/// Answers a lookup, however it came.
///
/// # Errors
/// `NotFound` for an unknown session, and what the engine gives.
///
/// # Cancel safety
/// Dropped, it may have taken its lease.
pub(crate) async fn look_up(sessions: &Arc<Sessions>, request: proto::LookupRequest) -> Result<proto::LookupReply> {
    let is_small = request.keys.len() <= INLINE_KEYS_MAX * KEY_BYTES;
    let sessions = Arc::clone(sessions);
    let look = move || {
        let session = sessions.get(request.session)?;
        let request = wire::lookup_request(&request)?;
        let span = tracing::debug_span!(
            "lookup",
            instance = %request.instance,
            session = session.engine_id.0,
            request = request.question.as_ref().map(|question| &*question.request),
            asked_blocks = request.keys.len(),
            hit_blocks = Empty,
            dram_blocks = Empty,
            decision = Empty,
        );
        let found = span.in_scope(|| sessions.engine().lookup(session.engine_id, &request))?;
        span.record("hit_blocks", found.hit_blocks).record("dram_blocks", found.dram_blocks);
        span.record("decision", found.decision);
        Ok(wire::lookup_reply_to_wire(&found))
    };
    if is_small { look() } else { on_blocking_pool(look).await }
}

fn progress_json(progress: &impl serde::Serialize) -> Result<String> {
    serde_json::to_string(progress)
        .map_err(|error| Error::new(ErrorKind::Io, format!("cannot write the progress as JSON: {error}")))
}

#[tonic::async_trait]
impl PegaFlow for Service {
    type OpenSessionStream = Pin<Box<dyn Stream<Item = Result<proto::SessionEvent, Status>> + Send>>;

    async fn open_session(
        &self,
        request: Request<proto::OpenSessionRequest>,
    ) -> Result<Response<Self::OpenSessionStream>, Status> {
        let caller = request.extensions().get::<Caller>().cloned();
        let request = request.into_inner();
        let open = || {
            let place = caller.map(|caller| caller.0.session()).transpose()?;
            wire::check_name("the client's name", &request.client_name, NAME_BYTES_MAX)?;
            wire::check_name("the client's version", &request.client_version, 64)?;
            wire::check_name("the client's kind", &request.client_kind, 64)?;
            let name = format!("{} {} {}", request.client_kind, request.client_name, request.client_version);
            let events = self.sessions.open(name.trim())?;
            // The place goes with the stream.
            let held = events.inspect(move |_| _ = &place);
            Ok(Box::pin(held) as Self::OpenSessionStream)
        };
        reply(open())
    }

    async fn register(
        &self,
        request: Request<proto::RegisterRequest>,
    ) -> Result<Response<proto::RegisterReply>, Status> {
        let request = request.into_inner();
        let sessions = Arc::clone(&self.sessions);
        blocking(move || {
            let session = sessions.get(request.session)?;
            let blocks = request.blocks;
            let spec = wire::instance_spec(request)?;
            session.set_worker(&spec, blocks)?;
            sessions.engine().register(session.engine_id, spec)?;
            Ok(proto::RegisterReply {})
        })
        .await
    }

    async fn share_arena(
        &self,
        request: Request<proto::ShareArenaRequest>,
    ) -> Result<Response<proto::ShareArenaReply>, Status> {
        reply(self.sessions.share_arena(request.into_inner().session).map(|shared| proto::ShareArenaReply {
            arena: wire::arena_bytes(shared.arena),
            bytes: shared.bytes,
            token: shared.token.to_vec().into(),
        }))
    }

    async fn lookup(&self, request: Request<proto::LookupRequest>) -> Result<Response<proto::LookupReply>, Status> {
        reply(look_up(&self.sessions, request.into_inner()).await)
    }

    async fn locate(&self, request: Request<proto::LocateRequest>) -> Result<Response<proto::LocateReply>, Status> {
        let request = request.into_inner();
        let sessions = Arc::clone(&self.sessions);
        blocking(move || {
            let session = sessions.get(request.session)?;
            let request = wire::locate_request(&request)?;
            let tiers = sessions.engine().locate(session.engine_id, &request)?;
            let namespace = match &request.whose {
                Whose::Instance(instance) => sessions.engine().namespace_of(instance)?,
                Whose::Namespace(id) => *id,
            };
            Ok(proto::LocateReply {
                tiers: tiers.iter().map(wire::tier_byte).collect::<Vec<_>>().into(),
                namespace: namespace.as_bytes().to_vec().into(),
            })
        })
        .await
    }

    async fn load(&self, request: Request<proto::LoadRequest>) -> Result<Response<proto::LoadReply>, Status> {
        let request = request.into_inner();
        let load = || {
            let session = self.sessions.get(request.session)?;
            let (lease, shard, blocks) = wire::load_blocks(&request)?;
            let memory = session.kv_cache(request.operation)?;
            let operation = session.begin(request.operation)?;
            let request = LoadRequest {
                session: session.engine_id,
                operation: OperationId(request.operation),
                lease,
                shard,
                memory,
                blocks,
            };
            self.sessions.engine().load(request, Box::new(move |outcome| operation.load_ended(outcome)))?;
            Ok(proto::LoadReply {})
        };
        reply(load())
    }

    async fn save(&self, request: Request<proto::SaveRequest>) -> Result<Response<proto::SaveReply>, Status> {
        let request = request.into_inner();
        let save = || {
            let session = self.sessions.get(request.session)?;
            let (target, blocks) = wire::save_blocks(&request)?;
            let memory = session.kv_cache(request.operation)?;
            let operation = session.begin(request.operation)?;
            let request = SaveRequest {
                session: session.engine_id,
                operation: OperationId(request.operation),
                target,
                memory,
                blocks,
            };
            self.sessions.engine().save(request, Box::new(move |outcome| operation.save_ended(outcome)))?;
            Ok(proto::SaveReply {})
        };
        reply(save())
    }

    async fn copy_ended(
        &self,
        request: Request<proto::CopyEndedRequest>,
    ) -> Result<Response<proto::CopyEndedReply>, Status> {
        let proto::CopyEndedRequest { session, order, is_complete } = request.into_inner();
        reply(self.sessions.get(session).map(|session| {
            session.copy_ended(order, is_complete);
            proto::CopyEndedReply {}
        }))
    }

    async fn consume(&self, request: Request<proto::ConsumeRequest>) -> Result<Response<proto::ConsumeReply>, Status> {
        let request = request.into_inner();
        let consume = || {
            self.sessions.get(request.session)?;
            let shard = wire::shard(request.shard)?;
            for lease in wire::leases(&request.leases)? {
                self.sessions.engine().consume(lease, shard);
            }
            Ok(proto::ConsumeReply {})
        };
        reply(consume())
    }

    async fn cancel(&self, request: Request<proto::CancelRequest>) -> Result<Response<proto::CancelReply>, Status> {
        let request = request.into_inner();
        let cancel = || {
            let session = self.sessions.get(request.session)?;
            if request.operations.len() > BLOCKS_MAX {
                return Err(Error::new(
                    ErrorKind::InvalidInput,
                    format!("{} operations; give at most {BLOCKS_MAX} in one request", request.operations.len()),
                ));
            }
            for &operation in &request.operations {
                self.sessions.engine().cancel(session.engine_id, OperationId(operation));
            }
            Ok(proto::CancelReply {})
        };
        reply(cancel())
    }

    async fn release(&self, request: Request<proto::ReleaseRequest>) -> Result<Response<proto::ReleaseReply>, Status> {
        let request = request.into_inner();
        let release = || {
            self.sessions.get(request.session)?;
            for lease in wire::leases(&request.leases)? {
                self.sessions.engine().release(lease);
            }
            Ok(proto::ReleaseReply {})
        };
        reply(release())
    }

    async fn flush(&self, request: Request<proto::FlushRequest>) -> Result<Response<proto::FlushReply>, Status> {
        let timeout = wire::flush_timeout(request.into_inner().timeout_ms).map_err(|error| to_status(&error))?;
        let place = self.place_to_wait()?;
        let engine = self.sessions.engine().clone();
        blocking(move || {
            let _place = place;
            engine.flush(Instant::now() + timeout)?;
            Ok(proto::FlushReply {})
        })
        .await
    }

    async fn reopen_store(
        &self,
        request: Request<proto::ReopenStoreRequest>,
    ) -> Result<Response<proto::ReopenStoreReply>, Status> {
        let timeout = wire::flush_timeout(request.into_inner().timeout_ms).map_err(|error| to_status(&error))?;
        let place = self.place_to_wait()?;
        let engine = self.sessions.engine().clone();
        blocking(move || {
            let _place = place;
            engine.reopen_store(Instant::now() + timeout)?;
            Ok(proto::ReopenStoreReply {})
        })
        .await
    }

    async fn list_namespaces(
        &self,
        request: Request<proto::ListNamespacesRequest>,
    ) -> Result<Response<proto::ListNamespacesReply>, Status> {
        let proto::ListNamespacesRequest { after, rows_max } = request.into_inner();
        let place = self.place_to_wait()?;
        let engine = self.sessions.engine().clone();
        blocking(move || {
            let _place = place;
            let after = (!after.is_empty()).then(|| wire::namespace_id(&after)).transpose()?;
            if rows_max > NAMESPACE_ROWS_MAX {
                let message = format!("{rows_max} rows; give at most {NAMESPACE_ROWS_MAX}");
                return Err(Error::new(ErrorKind::InvalidInput, message));
            }
            let found = engine.list_namespaces(after.as_ref(), NAMESPACES_MAX, rows_max)?;
            let is_last = found.len() < NAMESPACES_MAX;
            let found: Vec<_> = found.iter().map(wire::namespace_json).collect();
            Ok(proto::ListNamespacesReply { namespaces_json: serde_json::Value::from(found).to_string(), is_last })
        })
        .await
    }

    async fn purge(&self, request: Request<proto::PurgeRequest>) -> Result<Response<proto::PurgeReply>, Status> {
        let proto::PurgeRequest { namespace, timeout_ms, unused_for_ms } = request.into_inner();
        let timeout = wire::flush_timeout(timeout_ms).map_err(|error| to_status(&error))?;
        let place = self.place_to_wait()?;
        let engine = self.sessions.engine().clone();
        blocking(move || {
            let _place = place;
            let namespace = wire::namespace_id(&namespace)?;
            let unknown = || Error::new(ErrorKind::NotFound, format!("there is no namespace {namespace}"));
            if let Some(time) = wire::duration(unused_for_ms)
                && engine.was_used_within(&namespace, time)?
            {
                let message = format!("namespace {namespace} was used within {time:?}; it is not purged");
                return Err(Error::new(ErrorKind::Busy, message));
            }
            let purged = engine.purge(&namespace, Instant::now() + timeout)?.ok_or_else(unknown)?;
            Ok(proto::PurgeReply {
                dram_blocks: purged.dram_blocks,
                dram_bytes: purged.dram_bytes,
                drive_blocks: purged.drive_blocks,
                drive_bytes: purged.drive_bytes,
                destroyed_keys: purged.destroyed_keys,
                is_swept: purged.is_swept,
            })
        })
        .await
    }

    async fn scrub(&self, request: Request<proto::ScrubRequest>) -> Result<Response<proto::ScrubReply>, Status> {
        let request = request.into_inner();
        let engine = self.sessions.engine().clone();
        blocking(move || {
            let progress = match request.action() {
                JobAction::Look => engine.scrub_progress()?,
                JobAction::Start => engine.start_scrub(ByteSize(request.bytes_per_second))?,
                JobAction::Stop => engine.stop_scrub()?,
            };
            Ok(proto::ScrubReply { progress_json: progress_json(&progress)? })
        })
        .await
    }

    async fn warm(&self, request: Request<proto::WarmRequest>) -> Result<Response<proto::WarmReply>, Status> {
        let request = request.into_inner();
        let engine = self.sessions.engine().clone();
        blocking(move || {
            let run = match request.action() {
                JobAction::Look => engine.warming()?,
                JobAction::Start => engine.start_warming(&wire::named_namespaces(&request.namespaces)?)?,
                JobAction::Stop => engine.stop_warming()?,
            };
            Ok(proto::WarmReply { progress_json: progress_json(&run)? })
        })
        .await
    }

    async fn evict(&self, request: Request<proto::EvictRequest>) -> Result<Response<proto::EvictReply>, Status> {
        let proto::EvictRequest { namespaces, prefix, unused_for_ms } = request.into_inner();
        let place = self.place_to_wait()?;
        let engine = self.sessions.engine().clone();
        blocking(move || {
            let _place = place;
            let evicted = engine.evict(&wire::block_choice(&namespaces, &prefix, unused_for_ms)?)?;
            let EvictOutcome { namespaces, dram_blocks, dram_bytes, kept_blocks } = evicted;
            Ok(proto::EvictReply { namespaces, dram_blocks, dram_bytes, kept_blocks })
        })
        .await
    }

    async fn pin(&self, request: Request<proto::PinRequest>) -> Result<Response<proto::PinReply>, Status> {
        let proto::PinRequest { namespaces, prefix, ttl_ms } = request.into_inner();
        let place = self.place_to_wait()?;
        let engine = self.sessions.engine().clone();
        blocking(move || {
            let _place = place;
            let pin = engine.pin(&wire::block_choice(&namespaces, &prefix, 0)?, wire::duration(ttl_ms))?;
            Ok(proto::PinReply { pin_json: wire::pin_json(&pin).to_string() })
        })
        .await
    }

    async fn unpin(&self, request: Request<proto::UnpinRequest>) -> Result<Response<proto::UnpinReply>, Status> {
        let proto::UnpinRequest { pin, namespaces } = request.into_inner();
        let place = self.place_to_wait()?;
        let engine = self.sessions.engine().clone();
        blocking(move || {
            let _place = place;
            let Unpinned { pins, blocks, bytes } = match pin {
                0 => engine.unpin_namespaces(&wire::named_namespaces(&namespaces)?)?,
                number => engine.unpin(number)?,
            };
            Ok(proto::UnpinReply { pins, blocks, bytes })
        })
        .await
    }

    async fn list_prefixes(
        &self,
        request: Request<proto::ListPrefixesRequest>,
    ) -> Result<Response<proto::ListPrefixesReply>, Status> {
        let proto::ListPrefixesRequest { namespaces, under, limit } = request.into_inner();
        let place = self.place_to_wait()?;
        let engine = self.sessions.engine().clone();
        blocking(move || {
            let _place = place;
            let BlockChoice { namespaces, prefix, .. } = wire::block_choice(&namespaces, &under, 0)?;
            let found = engine.list_prefixes(&namespaces, prefix.as_ref(), limit as usize)?;
            let found: Vec<_> = found.iter().map(wire::prefix_json).collect();
            Ok(proto::ListPrefixesReply { prefixes_json: serde_json::Value::from(found).to_string() })
        })
        .await
    }

    async fn list_pins(
        &self,
        _request: Request<proto::ListPinsRequest>,
    ) -> Result<Response<proto::ListPinsReply>, Status> {
        let place = self.place_to_wait()?;
        let engine = self.sessions.engine().clone();
        blocking(move || {
            let _place = place;
            let pins: Vec<_> = engine.pins()?.iter().map(wire::pin_json).collect();
            Ok(proto::ListPinsReply { pins_json: serde_json::Value::from(pins).to_string() })
        })
        .await
    }

    async fn load_policy(
        &self,
        request: Request<proto::LoadPolicyRequest>,
    ) -> Result<Response<proto::LoadPolicyReply>, Status> {
        let wanted = request.into_inner().policy;
        let set = || {
            let engine = self.sessions.engine();
            if !wanted.is_empty() {
                engine.set_load_policy(wanted.parse()?);
            }
            Ok(proto::LoadPolicyReply { policy: engine.load_policy().to_string() })
        };
        reply(set())
    }

    async fn explain(&self, request: Request<proto::ExplainRequest>) -> Result<Response<proto::ExplainReply>, Status> {
        let proto::ExplainRequest { request, limit } = request.into_inner();
        let sessions = Arc::clone(&self.sessions);
        blocking(move || {
            wire::check_name("the request's name", &request, NAME_BYTES_MAX)?;
            let limit = limit as usize;
            if !(1..=DECISIONS_MAX).contains(&limit) {
                let message = format!("{limit} decisions; give 1 to {DECISIONS_MAX}");
                return Err(Error::new(ErrorKind::InvalidInput, message));
            }
            let name = (!request.is_empty()).then_some(request.as_str());
            let decisions_json = serde_json::to_string(&sessions.engine().explain(name, limit))
                .map_err(|error| Error::new(ErrorKind::Io, format!("cannot write the decisions as JSON: {error}")))?;
            Ok(proto::ExplainReply { decisions_json })
        })
        .await
    }

    async fn stats(&self, _request: Request<proto::StatsRequest>) -> Result<Response<proto::StatsReply>, Status> {
        let sessions = Arc::clone(&self.sessions);
        let started = self.started;
        blocking(move || {
            let engine_json = serde_json::to_string(&sessions.engine().stats())
                .map_err(|error| Error::new(ErrorKind::Io, format!("cannot write the counters as JSON: {error}")))?;
            Ok(proto::StatsReply {
                engine_json,
                server_version: env!("CARGO_PKG_VERSION").into(),
                uptime_ms: u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX),
                sessions: u32::try_from(sessions.count()).unwrap_or(u32::MAX),
                operations: u32::try_from(sessions.operations()).unwrap_or(u32::MAX),
            })
        })
        .await
    }
}
