//! Lookup: the longest prefix that is there, in memory only. On the critical path of vLLM's scheduler.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use pegaflow_tiers::{Arena, BlockKey, Error, ErrorKind, Location, RecordId, Result, Store};

use crate::api::{LookupReply, LookupRequest, Places, SessionId};
use crate::inner::Inner;
use crate::lease::{Hit, Pinned};
use crate::scheduler::Asked;

/// The most keys of one lookup.
const KEYS_MAX: usize = 65_536;
/// How often a lookup is repeated when a region is reclaimed under it.
const ATTEMPTS: usize = 3;
/// The longest lease.
const LEASE_MAX: Duration = Duration::from_secs(600);

pub(crate) fn lookup(inner: &Inner, session: SessionId, request: &LookupRequest) -> Result<LookupReply> {
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
    let view = inner.registry.view(&request.instance, request.group)?;
    inner.counters.lookup_blocks.add(request.keys.len() as u64);
    if !view.is_complete {
        return Ok(LookupReply::default());
    }
    let place = RecordId { namespace: view.namespace, group: request.group, shard: 0, key: BlockKey::ROOT };
    inner.requests.push(Asked {
        session,
        tag: request.tag,
        place,
        shards: view.geometry.shards,
        slot_bytes: Arena::slot_bytes(view.geometry.block_bytes as usize),
        prefixes: request.keys.iter().map(BlockKey::prefix).collect(),
    });
    for _ in 0..ATTEMPTS {
        match attempt(inner, session, request, place, view.geometry.shards) {
            // A region was reclaimed between being found and being pinned: what is left is looked up anew.
            Err(error) if error.kind() == ErrorKind::NotFound => continue,
            ended => return ended,
        }
    }
    Ok(LookupReply::default())
}

fn attempt(
    inner: &Inner,
    session: SessionId,
    request: &LookupRequest,
    place: RecordId,
    shard_count: u16,
) -> Result<LookupReply> {
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
    let in_dram = |index: usize| shards.values().all(|hits| matches!(hits.get(index), Some(Hit::Dram(_))));
    let dram_blocks = (0..found).filter(|index| in_dram(*index)).count() as u32;
    let mut reply = LookupReply { hit_blocks: found as u32, dram_blocks, ..LookupReply::default() };
    if let Some(lasts) = request.lease.filter(|_| found > 0) {
        let on_drive: Vec<Location> = shards.values().flatten().filter_map(Hit::location).collect();
        let pinned = match &store {
            Some(store) if !on_drive.is_empty() => Some(Pinned::new(store, &on_drive)?),
            _ => None,
        };
        let expires = Instant::now() + lasts;
        reply.places = request.with_places.then(|| places(inner, &shards, shard_count)).flatten();
        let (instance, has_places) = (request.instance.clone(), reply.places.is_some());
        reply.lease = Some(inner.leases.grant(session, request.tag, instance, expires, shards, pinned, has_places)?);
    }
    inner.counters.lookup_hit_blocks.add(found as u64);
    Ok(reply)
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
