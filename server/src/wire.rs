//! Requests on the wire and their values: every limit is checked here, before anything is allocated, so that the engine
//! sees only what is well-formed.

use std::time::Duration;

use pegaflow_engine::{
    ArenaId, BlockChoice, BlockKey, BlockSave, ComputedTokens, Error, ErrorKind, GroupGeometry, HitTier, InstanceId,
    InstanceSpec, KeyPrefix, LeaseId, LoadBlock, LoadQuestion, LocateRequest, LookupReply, LookupRequest,
    NamespaceDescriptor, NamespaceId, NamespaceInfo, PinInfo, Place, Places, PrefixInfo, Result, SaveTarget, TenantId,
    Whose,
};
use prost::bytes::Bytes;

use crate::limits::{
    BLOCKS_MAX, COMPUTED_MAX, FLUSH_TIMEOUT_MAX, GROUPS_MAX, KEY_BYTES, LEASE_BYTES, LEASE_MAX, NAME_BYTES_MAX,
    NAMED_NAMESPACES_MAX, NAMESPACE_BYTES_MAX, SHARDS_MAX,
};
use crate::proto;

fn invalid(message: String) -> Error {
    Error::new(ErrorKind::InvalidInput, message)
}

/// Checks a client's name and the like.
pub(crate) fn check_name(what: &str, name: &str, bytes_max: usize) -> Result<()> {
    if name.len() > bytes_max {
        return Err(invalid(format!("{what} has {} bytes; give at most {bytes_max}", name.len())));
    }
    Ok(())
}

fn instance(name: &str) -> Result<InstanceId> {
    if name.is_empty() {
        return Err(invalid(format!("the instance is empty; give 1 to {NAME_BYTES_MAX} bytes")));
    }
    check_name("the instance", name, NAME_BYTES_MAX)?;
    Ok(InstanceId(name.into()))
}

fn group(value: u32) -> Result<u16> {
    u16::try_from(value).map_err(|_| invalid(format!("group {value}; give 0 to {}", u16::MAX)))
}

pub(crate) fn shard(value: u32) -> Result<u16> {
    match u16::try_from(value) {
        Ok(shard) if value < SHARDS_MAX => Ok(shard),
        _ => Err(invalid(format!("shard {value}; give 0 to {}", SHARDS_MAX - 1))),
    }
}

fn check_count(what: &str, count: usize) -> Result<()> {
    if count == 0 || count > BLOCKS_MAX {
        return Err(invalid(format!("{count} {what}; give 1 to {BLOCKS_MAX} in one request")));
    }
    Ok(())
}

fn check_equal(what: &str, count: usize, expected: usize) -> Result<()> {
    if count != expected {
        return Err(invalid(format!("{count} {what} for {expected} blocks; give as many as blocks")));
    }
    Ok(())
}

/// Cuts a field of keys into keys; 0 to 65,536 of them.
fn keys(what: &str, bytes: &[u8]) -> Result<Vec<BlockKey>> {
    let (keys, rest) = bytes.as_chunks::<KEY_BYTES>();
    if !rest.is_empty() {
        return Err(invalid(format!("{what} has {} bytes; give {KEY_BYTES} for each key", bytes.len())));
    }
    if keys.len() > BLOCKS_MAX {
        return Err(invalid(format!("{} {what}; give at most {BLOCKS_MAX} in one request", keys.len())));
    }
    Ok(keys.iter().copied().map(BlockKey::from_bytes).collect())
}

/// Joins keys to a field.
pub(crate) fn join_keys<'a>(keys: impl ExactSizeIterator<Item = &'a BlockKey>) -> Bytes {
    let mut bytes = Vec::with_capacity(keys.len() * KEY_BYTES);
    keys.for_each(|key| bytes.extend_from_slice(key.as_bytes()));
    bytes.into()
}

/// A lease from its 16 bytes.
pub(crate) fn lease(bytes: &[u8]) -> Result<LeaseId> {
    <[u8; LEASE_BYTES]>::try_from(bytes).map(|bytes| LeaseId(u128::from_le_bytes(bytes))).map_err(|_| {
        invalid(format!("a lease of {} bytes; give the {LEASE_BYTES} bytes of a lookup's reply", bytes.len()))
    })
}

/// The bytes of a lease.
pub(crate) fn lease_bytes(lease: LeaseId) -> [u8; LEASE_BYTES] {
    lease.0.to_le_bytes()
}

/// The leases of a release.
pub(crate) fn leases(bytes: &[u8]) -> Result<Vec<LeaseId>> {
    let (leases, rest) = bytes.as_chunks::<LEASE_BYTES>();
    if !rest.is_empty() || leases.len() > BLOCKS_MAX {
        return Err(invalid(format!(
            "leases have {} bytes; give a multiple of {LEASE_BYTES}, at most {BLOCKS_MAX} leases",
            bytes.len()
        )));
    }
    Ok(leases.iter().map(|bytes| LeaseId(u128::from_le_bytes(*bytes))).collect())
}

/// What a worker says of itself.
pub(crate) fn instance_spec(request: proto::RegisterRequest) -> Result<InstanceSpec> {
    let instance = instance(&request.instance)?;
    if request.groups.is_empty() || request.groups.len() > GROUPS_MAX {
        return Err(invalid(format!("{} groups; give 1 to {GROUPS_MAX}", request.groups.len())));
    }
    let bytes: usize = request.namespace.iter().map(|(name, value)| name.len() + value.len() + 6).sum();
    if request.namespace.is_empty() || bytes > NAMESPACE_BYTES_MAX {
        return Err(invalid(format!(
            "the namespace has {} fields of {bytes} bytes; give at least one field, at most {NAMESPACE_BYTES_MAX} bytes",
            request.namespace.len()
        )));
    }
    let namespace = request
        .namespace
        .into_iter()
        .fold(NamespaceDescriptor::new(), |namespace, (name, value)| namespace.with(name, value));
    let groups = request
        .groups
        .iter()
        .map(|wire| {
            let shards = u16::try_from(wire.shards).unwrap_or(u16::MAX);
            let geometry = GroupGeometry { group: group(wire.group)?, block_bytes: wire.block_bytes, shards };
            geometry.validate().map(|()| geometry)
        })
        .collect::<Result<Vec<_>>>()?;
    let shard = shard(request.shard)?;
    if let Some(geometry) = groups.iter().find(|geometry| shard >= geometry.shards) {
        return Err(invalid(format!(
            "shard {shard} of group {}, which has {} shards; shards are numbered from 0",
            geometry.group, geometry.shards
        )));
    }
    Ok(InstanceSpec { instance, namespace, groups, shard, keeps_all: request.keeps_all })
}

/// The wire form of [`instance_spec`].
pub(crate) fn register_request(session: u64, spec: &InstanceSpec, blocks: u32) -> proto::RegisterRequest {
    proto::RegisterRequest {
        session,
        instance: spec.instance.to_string(),
        namespace: spec.namespace.fields().clone().into_iter().collect(),
        groups: spec
            .groups
            .iter()
            .map(|geometry| proto::Group {
                group: geometry.group.into(),
                block_bytes: geometry.block_bytes,
                shards: geometry.shards.into(),
            })
            .collect(),
        shard: spec.shard.into(),
        blocks,
        keeps_all: spec.keeps_all,
    }
}

/// The bytes of an arena's name.
pub(crate) fn arena_bytes(arena: ArenaId) -> Bytes {
    Bytes::copy_from_slice(&arena.0.to_le_bytes())
}

/// An arena's name from its 16 bytes.
pub(crate) fn arena(bytes: &[u8]) -> Result<ArenaId> {
    <[u8; 16]>::try_from(bytes)
        .map(|bytes| ArenaId(u128::from_le_bytes(bytes)))
        .map_err(|_| invalid(format!("an arena named by {} bytes; 16 were expected", bytes.len())))
}

/// A tenant's name; an empty one is none.
fn tenant(name: &str) -> Result<Option<TenantId>> {
    (!name.is_empty()).then(|| TenantId::new(name)).transpose()
}

/// The wire form of a tenant.
pub(crate) fn tenant_to_wire(tenant: Option<&TenantId>) -> String {
    tenant.map(TenantId::to_string).unwrap_or_default()
}

/// A lookup.
pub(crate) fn lookup_request(request: &proto::LookupRequest) -> Result<LookupRequest> {
    let lease = Duration::from_millis(request.lease_ms.into());
    if lease > LEASE_MAX {
        return Err(invalid(format!("a lease of {} ms; give at most {}", request.lease_ms, LEASE_MAX.as_millis())));
    }
    Ok(LookupRequest {
        instance: instance(&request.instance)?,
        tenant: tenant(&request.tenant)?,
        group: group(request.group)?,
        keys: keys("keys", &request.keys)?,
        lease: (!lease.is_zero()).then_some(lease),
        tag: request.tag,
        with_places: request.with_places,
        question: request.question.as_ref().map(question).transpose()?,
        prefetch: request.prefetch,
    })
}

fn question(question: &proto::LoadQuestion) -> Result<LoadQuestion> {
    if question.request.len() > NAME_BYTES_MAX || question.computed.len() > COMPUTED_MAX {
        return Err(invalid(format!(
            "a question with a name of {} bytes and {} computations; give at most {NAME_BYTES_MAX} and {COMPUTED_MAX}",
            question.request.len(),
            question.computed.len()
        )));
    }
    let policy = (!question.policy.is_empty()).then(|| question.policy.parse()).transpose()?;
    let computed = question.computed.iter().map(|computed| ComputedTokens {
        decision: computed.decision,
        first_token: computed.first_token,
        end_token: computed.end_token,
        load_share: computed.load_share,
        took: Duration::from_micros(computed.took_us),
    });
    Ok(LoadQuestion {
        request: question.request.clone(),
        first_block: question.first_block,
        block_tokens: question.block_tokens,
        load_share: question.load_share,
        policy,
        computed: computed.collect(),
    })
}

fn question_to_wire(question: &LoadQuestion) -> proto::LoadQuestion {
    let computed = question.computed.iter().map(|computed| proto::ComputedTokens {
        decision: computed.decision,
        first_token: computed.first_token,
        end_token: computed.end_token,
        load_share: computed.load_share,
        took_us: u64::try_from(computed.took.as_micros()).unwrap_or(u64::MAX),
    });
    proto::LoadQuestion {
        request: question.request.clone(),
        first_block: question.first_block,
        block_tokens: question.block_tokens,
        load_share: question.load_share,
        policy: question.policy.map(|policy| policy.to_string()).unwrap_or_default(),
        computed: computed.collect(),
    }
}

/// A question where blocks are.
pub(crate) fn locate_request(request: &proto::LocateRequest) -> Result<LocateRequest> {
    let whose = match &*request.namespace {
        [] => Whose::Instance(instance(&request.instance)?),
        _ if !request.instance.is_empty() => return Err(invalid("instance and namespace are given; give one".into())),
        bytes => Whose::Namespace(namespace_id(bytes)?),
    };
    Ok(LocateRequest {
        whose,
        tenant: tenant(&request.tenant)?,
        group: group(request.group)?,
        keys: keys("keys", &request.keys)?,
    })
}

/// The wire form of [`locate_request`].
pub(crate) fn locate_to_wire(session: u64, request: &LocateRequest) -> proto::LocateRequest {
    let (instance, namespace) = match &request.whose {
        Whose::Instance(instance) => (instance.to_string(), Vec::new()),
        Whose::Namespace(id) => (String::new(), id.as_bytes().to_vec()),
    };
    proto::LocateRequest {
        session,
        instance,
        namespace: namespace.into(),
        tenant: tenant_to_wire(request.tenant.as_ref()),
        group: request.group.into(),
        keys: join_keys(request.keys.iter()),
    }
}

/// The wire form of a tier.
pub(crate) fn tier_byte(tier: &Option<HitTier>) -> u8 {
    match tier {
        None => 0,
        Some(HitTier::Dram) => 1,
        Some(HitTier::Nvme) => 2,
    }
}

/// A tier out of a reply.
pub(crate) fn tier(byte: u8) -> Result<Option<HitTier>> {
    match byte {
        0 => Ok(None),
        1 => Ok(Some(HitTier::Dram)),
        2 => Ok(Some(HitTier::Nvme)),
        _ => Err(invalid(format!("tier {byte} of a block; there are 0 to 2"))),
    }
}

/// The wire form of [`lookup_request`].
pub(crate) fn lookup_to_wire(session: u64, request: &LookupRequest) -> proto::LookupRequest {
    let lease_ms = request.lease.map_or(0, |lease| u32::try_from(lease.as_millis().max(1)).unwrap_or(u32::MAX));
    proto::LookupRequest {
        session,
        instance: request.instance.to_string(),
        tenant: tenant_to_wire(request.tenant.as_ref()),
        group: request.group.into(),
        keys: join_keys(request.keys.iter()),
        lease_ms,
        tag: request.tag,
        with_places: request.with_places,
        question: request.question.as_ref().map(question_to_wire),
        prefetch: request.prefetch,
    }
}

/// The wire form of a lookup's reply.
pub(crate) fn lookup_reply_to_wire(reply: &LookupReply) -> proto::LookupReply {
    proto::LookupReply {
        hit_blocks: reply.hit_blocks,
        dram_blocks: reply.dram_blocks,
        lease: reply.lease.map(|lease| Bytes::copy_from_slice(&lease_bytes(lease))).unwrap_or_default(),
        places: reply.places.iter().flat_map(|places| &places.places).map(|place| place.0).collect(),
        arena: reply.places.as_ref().map(|places| arena_bytes(places.arena)).unwrap_or_default(),
        decision: reply.decision,
        fetch_us: reply.fetch_us,
    }
}

/// A lookup's reply.
pub(crate) fn lookup_reply(reply: &proto::LookupReply) -> Result<LookupReply> {
    let lease = if reply.lease.is_empty() { None } else { Some(lease(&reply.lease)?) };
    let places = if reply.arena.is_empty() {
        None
    } else {
        let places = reply.places.iter().copied().map(Place).collect();
        Some(Places { arena: arena(&reply.arena)?, places })
    };
    Ok(LookupReply {
        hit_blocks: reply.hit_blocks,
        dram_blocks: reply.dram_blocks,
        lease,
        places,
        decision: reply.decision,
        fetch_us: reply.fetch_us,
    })
}

/// A load's lease, shard and blocks.
pub(crate) fn load_blocks(request: &proto::LoadRequest) -> Result<(LeaseId, u16, Vec<LoadBlock>)> {
    check_count("indexes", request.indexes.len())?;
    check_equal("blocks", request.blocks.len(), request.indexes.len())?;
    let blocks =
        request.indexes.iter().zip(&request.blocks).map(|(&index, &block)| LoadBlock { index, block }).collect();
    Ok((lease(&request.lease)?, shard(request.shard)?, blocks))
}

/// A save's target and blocks.
pub(crate) fn save_blocks(request: &proto::SaveRequest) -> Result<(SaveTarget, Vec<BlockSave>)> {
    let keys = keys("keys", &request.keys)?;
    check_count("keys", keys.len())?;
    let parents = self::keys("parents", &request.parents)?;
    check_equal("parents", parents.len(), keys.len())?;
    check_equal("depths", request.depths.len(), keys.len())?;
    check_equal("blocks", request.blocks.len(), keys.len())?;
    let blocks = keys
        .into_iter()
        .zip(parents)
        .zip(request.depths.iter().zip(&request.blocks))
        .map(|((key, parent), (&depth, &block))| BlockSave { key, parent, depth, block })
        .collect();
    let target = SaveTarget {
        instance: instance(&request.instance)?,
        tenant: tenant(&request.tenant)?,
        group: group(request.group)?,
        shard: shard(request.shard)?,
    };
    Ok((target, blocks))
}

/// How long a flush may wait.
/// A namespace.
///
/// # Errors
/// `InvalidInput` for anything but 32 bytes.
pub(crate) fn namespace_id(bytes: &[u8]) -> Result<NamespaceId> {
    let id = <[u8; 32]>::try_from(bytes).map(NamespaceId::from_bytes);
    id.map_err(|_| invalid(format!("a namespace of {} bytes; give 32", bytes.len())))
}

/// One of the namespaces, as it is told.
pub(crate) fn namespace_json(info: &NamespaceInfo) -> serde_json::Value {
    let drive = info.drive.map(
        |drive| serde_json::json!({ "blocks": drive.records, "bytes": drive.bytes, "is_complete": drive.is_complete }),
    );
    serde_json::json!({
        "id": info.id.to_string(),
        "fields": info.descriptor.fields(),
        "instances": info.instances,
        "dram_blocks": info.dram_blocks,
        "dram_bytes": info.dram_bytes,
        "pinned_blocks": info.pinned_blocks,
        "pinned_bytes": info.pinned_bytes,
        "drive": drive,
        "idle_ms": info.idle.map(|idle| u64::try_from(idle.as_millis()).unwrap_or(u64::MAX)),
        "lookup_blocks": info.lookup_blocks,
        "hit_blocks": info.hit_blocks,
    })
}

/// A pin, as it is told.
pub(crate) fn pin_json(pin: &PinInfo) -> serde_json::Value {
    serde_json::json!({
        "number": pin.number,
        "namespaces": pin.choice.namespaces.iter().map(NamespaceId::to_string).collect::<Vec<_>>(),
        "prefix": pin.choice.prefix.as_ref().map(KeyPrefix::to_string),
        "blocks": pin.blocks,
        "bytes": pin.bytes,
        "left_ms": pin.left.map(|left| u64::try_from(left.as_millis()).unwrap_or(u64::MAX)),
    })
}

/// A prefix, as it is told.
pub(crate) fn prefix_json(prefix: &PrefixInfo) -> serde_json::Value {
    serde_json::json!({
        "namespace": prefix.namespace.to_string(),
        "group": prefix.group,
        "key": prefix.key.to_string(),
        "depth": prefix.depth,
        "common_blocks": prefix.common_blocks,
        "branches": prefix.branches,
        "blocks": prefix.blocks,
        "bytes": prefix.bytes,
        "pinned_bytes": prefix.pinned_bytes,
        "idle_ms": u64::try_from(prefix.idle.as_millis()).unwrap_or(u64::MAX),
        "uses": prefix.uses,
    })
}

/// Blocks that are meant: an empty prefix and no time mean nothing.
///
/// # Errors
/// `InvalidInput`.
pub(crate) fn block_choice(namespaces: &[Bytes], prefix: &str, unused_for_ms: u64) -> Result<BlockChoice> {
    Ok(BlockChoice {
        namespaces: named_namespaces(namespaces)?,
        prefix: (!prefix.is_empty()).then(|| prefix.parse()).transpose()?,
        unused_for: duration(unused_for_ms),
    })
}

/// So many milliseconds; `None` for 0.
pub(crate) fn duration(ms: u64) -> Option<Duration> {
    (ms > 0).then(|| Duration::from_millis(ms))
}

pub(crate) fn named_namespaces(namespaces: &[Bytes]) -> Result<Vec<NamespaceId>> {
    if namespaces.len() > NAMED_NAMESPACES_MAX {
        let message = format!("{} namespaces; give at most {NAMED_NAMESPACES_MAX}, or none for all", namespaces.len());
        return Err(invalid(message));
    }
    namespaces.iter().map(|bytes| namespace_id(bytes)).collect()
}

pub(crate) fn flush_timeout(timeout_ms: u32) -> Result<Duration> {
    let timeout = Duration::from_millis(timeout_ms.into());
    if timeout.is_zero() || timeout > FLUSH_TIMEOUT_MAX {
        return Err(invalid(format!(
            "a flush timeout of {timeout_ms} ms; give 1 to {}",
            FLUSH_TIMEOUT_MAX.as_millis()
        )));
    }
    Ok(timeout)
}

#[cfg(test)]
mod tests;
