//! Lookup: the longest prefix that is there, in memory only. On the critical path of vLLM's scheduler.

mod ahead;

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use pegaflow_tiers::{Arena, BlockKey, Error, ErrorKind, Location, RecordId, Result, Store};

use crate::api::{LoadQuestion, LookupReply, LookupRequest, Places, SessionId};
use crate::arbiter::Choice;
use crate::fetch::FetchReason;
use crate::inner::Inner;
use crate::lease::{Hit, Pinned};
use crate::load_choice::{FoundBytes, LoadWatch};
use crate::look_aside::look;
use crate::registry::InstanceView;
use crate::scheduler::Asked;
use crate::tenants;

/// The most keys of one lookup.
const KEYS_MAX: usize = 65_536;
/// How often a lookup is repeated when a region is reclaimed under it.
const ATTEMPTS: usize = 3;
/// The most computations that one question tells of.
const COMPUTED_MAX: usize = 256;
/// The longest lease.
const LEASE_MAX: Duration = Duration::from_secs(600);

pub(crate) fn lookup(inner: &Inner, session: SessionId, request: &LookupRequest) -> Result<LookupReply> {
    let started = Instant::now();
    let found = find(inner, session, request);
    inner.counters.times.lookup.record(started.elapsed());
    found
}

fn find(inner: &Inner, session: SessionId, request: &LookupRequest) -> Result<LookupReply> {
    if request.keys.len() > KEYS_MAX {
        return Err(Error::new(
            ErrorKind::InvalidInput,
            format!("{} keys in one lookup; the limit is {KEYS_MAX}", request.keys.len()),
        ));
    }
    if let Some(lasts) = request.lease.filter(|lasts| *lasts > LEASE_MAX || lasts.is_zero()) {
        return Err(Error::new(
            ErrorKind::InvalidInput,
            format!("a lease of {lasts:?}; give more than 0 and at most {LEASE_MAX:?}"),
        ));
    }
    if !inner.registry.has_session(session) {
        return Err(Error::new(ErrorKind::NotFound, format!("session {} is not known; open one first", session.0)));
    }
    if let Some(question) = request.question.as_ref().filter(|question| question.computed.len() > COMPUTED_MAX) {
        let given = question.computed.len();
        let message = format!("{given} computations in one question; give at most {COMPUTED_MAX}");
        return Err(Error::new(ErrorKind::InvalidInput, message));
    }
    let view = inner.registry.view(&request.instance, request.group)?;
    inner.counters.lookup_blocks.add(request.keys.len() as u64);
    if !view.is_complete {
        return Ok(LookupReply::default());
    }
    if let Some(question) = &request.question {
        inner.load_choice.hear(&request.instance, view.namespace, question);
    }
    let namespace = match &request.tenant {
        None => Some(view.namespace),
        Some(tenant) => tenants::existing(&inner.drive, &view.identity.descriptor, &view.identity.groups, tenant),
    };
    let Some(namespace) = namespace else { return Ok(LookupReply::default()) };
    let place = RecordId { namespace, group: request.group, shard: 0, key: BlockKey::ROOT };
    let asked = inner.requests.push(Asked {
        session,
        tag: request.tag,
        place,
        shards: view.geometry.shards,
        slot_bytes: Arena::slot_bytes(view.geometry.block_bytes as usize),
        prefixes: request.keys.iter().map(BlockKey::prefix).collect(),
    });
    let mut found = Ok(LookupReply::default());
    for _ in 0..ATTEMPTS {
        match attempt(inner, session, request, (place, asked), &view) {
            // A region was reclaimed between being found and being pinned: what is left is looked up anew.
            Err(error) if error.kind() == ErrorKind::NotFound => continue,
            ended => {
                found = ended;
                break;
            }
        }
    }
    let hit_blocks = found.as_ref().map_or(0, |reply| reply.hit_blocks.into());
    inner.namespace_uses.note(namespace, request.keys.len() as u64, hit_blocks);
    found
}

fn attempt(
    inner: &Inner,
    session: SessionId,
    request: &LookupRequest,
    (place, asked): (RecordId, u64),
    view: &InstanceView,
) -> Result<LookupReply> {
    let geometry = &view.geometry;
    let shard_count = geometry.shards;
    let store = inner.drive.store();
    let mut shards = HashMap::new();
    let mut found = request.keys.len();
    for shard in 0..shard_count {
        let hits = lookup_shard(
            inner,
            store.as_deref(),
            RecordId { shard, ..place },
            request.keys.get(..found).unwrap_or_default(),
        );
        found = found.min(hits.len());
        shards.insert(shard, hits);
    }
    shards.values_mut().for_each(|hits: &mut Vec<Hit>| hits.truncate(found));
    let dram_blocks = blocks_in_dram(&shards, 0..found);
    let mut reply = LookupReply { hit_blocks: found as u32, dram_blocks, ..LookupReply::default() };
    if let Some(lasts) = request.lease.filter(|_| found > 0) {
        let on_drive: Vec<Location> = shards.values().flatten().filter_map(Hit::location).collect();
        let pinned = match &store {
            Some(store) if !on_drive.is_empty() => Some(Pinned::new(store, &on_drive)?),
            _ => None,
        };
        let places = request.with_places.then(|| places(inner, &shards, shard_count)).flatten();
        let mut watch = None;
        if let Some(question) = request.question.as_ref().filter(|question| (question.first_block as usize) < found) {
            let there = found_bytes(question, &shards, found, geometry.block_bytes, places.is_some());
            let speeds = || store.as_ref().map(|store| store.drive_speeds()).unwrap_or_default();
            let decision = inner.load_choice.decide(&request.instance, view.namespace, question, there, speeds);
            reply.decision = decision.id;
            if decision.choice == Choice::Recompute {
                count_found(inner, &reply);
                if decision.read_bytes > 0 {
                    let hits =
                        shards.into_values().flat_map(|hits| hits.into_iter().skip(question.first_block as usize));
                    let bytes = (decision.read_bytes, geometry.block_bytes);
                    look(inner, &request.instance, bytes, hits, store.as_ref());
                }
                return Ok(reply);
            }
            let blocks = there.blocks as usize;
            watch = Some(LoadWatch::new(&inner.load_choice, &request.instance, decision.id, blocks, shard_count));
        }
        let expires = Instant::now() + lasts;
        let reads = match &store {
            Some(store) if request.prefetch => Some((store, ahead::reads(request, &shards))),
            _ => None,
        };
        reply.places = places;
        let (instance, has_places) = (request.instance.clone(), reply.places.is_some());
        reply.lease =
            Some(inner.leases.grant(session, request.tag, instance, expires, shards, pinned, has_places, watch)?);
        if let Some((store, reads)) = reads {
            let reason = FetchReason::Request { session, tag: request.tag };
            reply.fetch_us =
                ahead::fetch(inner, &request.instance, store, reads, geometry.block_bytes, (reason, asked), expires);
        }
    }
    count_found(inner, &reply);
    Ok(reply)
}

fn count_found(inner: &Inner, reply: &LookupReply) {
    inner.counters.lookup_hit_blocks.add(reply.hit_blocks.into());
    inner.counters.lookup_hit_dram_blocks.add(reply.dram_blocks.into());
}

/// How many of the blocks with these indices are in DRAM in all shards.
fn blocks_in_dram(shards: &HashMap<u16, Vec<Hit>>, indices: Range<usize>) -> u32 {
    let in_dram = |index: usize| shards.values().all(|hits| matches!(hits.get(index), Some(Hit::Dram(_))));
    indices.filter(|index| in_dram(*index)).count() as u32
}

/// What there is to load behind the blocks that the asker has itself.
fn found_bytes(
    question: &LoadQuestion,
    shards: &HashMap<u16, Vec<Hit>>,
    found: usize,
    block_bytes: u64,
    is_placed: bool,
) -> FoundBytes {
    let first = question.first_block as usize;
    let on_drive = shards.values().flat_map(|hits| hits.iter().skip(first)).filter_map(Hit::location);
    FoundBytes {
        blocks: found.saturating_sub(first) as u32,
        dram_blocks: blocks_in_dram(shards, first..found),
        block_bytes,
        stored_bytes: on_drive.map(|location| location.bytes()).sum(),
        is_placed,
    }
}

/// Where all of the blocks lie, if all are in DRAM.
fn places(inner: &Inner, shards: &HashMap<u16, Vec<Hit>>, shard_count: u16) -> Option<Places> {
    let hits = (0..shard_count).filter_map(|shard| shards.get(&shard)).flatten();
    let place = |hit: &Hit| match hit {
        Hit::Dram(resident) => Some(resident.slot.place()),
        Hit::Nvme(..) => None,
    };
    Some(Places { arena: inner.arena.id(), places: hits.map(place).collect::<Option<_>>()? })
}

/// The longest prefix of one shard: each block in DRAM or, failing that, on the drive.
fn lookup_shard(inner: &Inner, store: Option<&Store>, place: RecordId, keys: &[BlockKey]) -> Vec<Hit> {
    let mut resident = Vec::with_capacity(keys.len());
    inner.residency.get_many(keys.iter().map(|key| place.with_key(*key)), &mut resident);
    let missing: Vec<RecordId> =
        resident.iter().zip(keys).filter(|(hit, _)| hit.is_none()).map(|(_, key)| place.with_key(*key)).collect();
    let mut located = Vec::new();
    if let Some(store) = store.filter(|_| !missing.is_empty()) {
        located.reserve(missing.len());
        store.locate_prefix(&missing, &mut located);
    }
    let mut located = located.into_iter();
    let hit = |(resident, key): (Option<Arc<_>>, &BlockKey)| match resident {
        Some(resident) => Some(Hit::Dram(resident)),
        None => located.next().map(|location| Hit::Nvme(place.with_key(*key), location)),
    };
    resident.into_iter().zip(keys).map_while(hit).collect()
}
