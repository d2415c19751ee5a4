use pegaflow_engine::LoadPolicy;

use super::*;

fn kind<T>(result: Result<T>) -> Result<T, ErrorKind> {
    result.map_err(|error| error.kind())
}

fn register() -> proto::RegisterRequest {
    proto::RegisterRequest {
        session: 1,
        instance: "i".into(),
        namespace: [("model".to_owned(), "m".to_owned())].into(),
        groups: vec![proto::Group { group: 0, block_bytes: 64, shards: 2 }],
        shard: 1,
        blocks: 9,
        keeps_all: false,
    }
}

fn lookup(count: usize) -> proto::LookupRequest {
    proto::LookupRequest { instance: "i".into(), keys: vec![7; count * KEY_BYTES].into(), ..Default::default() }
}

fn save(count: usize) -> proto::SaveRequest {
    proto::SaveRequest {
        instance: "i".into(),
        keys: vec![1; count * KEY_BYTES].into(),
        parents: vec![2; count * KEY_BYTES].into(),
        depths: vec![3; count],
        blocks: vec![4; count],
        ..Default::default()
    }
}

#[test]
fn lists_are_taken_up_to_their_limit_and_not_beyond() {
    for (count, ok) in [(BLOCKS_MAX - 1, true), (BLOCKS_MAX, true), (BLOCKS_MAX + 1, false)] {
        assert_eq!(lookup_request(&lookup(count)).is_ok(), ok, "{count} keys of a lookup");
        assert_eq!(save_blocks(&save(count)).is_ok(), ok, "{count} blocks of a save");
        let load = proto::LoadRequest {
            lease: vec![0; 16].into(),
            indexes: vec![0; count],
            blocks: vec![0; count],
            ..Default::default()
        };
        assert_eq!(load_blocks(&load).is_ok(), ok, "{count} blocks of a load");
        assert_eq!(leases(&vec![0; count * LEASE_BYTES]).is_ok(), ok, "{count} leases");
    }
    assert!(lookup_request(&lookup(0)).is_ok());
    assert!(save_blocks(&save(0)).is_err());
}

#[test]
fn names_shards_groups_and_times_have_limits() {
    let with = |change: &dyn Fn(&mut proto::RegisterRequest)| {
        let mut request = register();
        change(&mut request);
        kind(instance_spec(request)).map(|_| ())
    };
    let bad = Err(ErrorKind::InvalidInput);
    assert_eq!(with(&|_| ()), Ok(()));
    assert_eq!(with(&|r| r.instance = "x".repeat(NAME_BYTES_MAX)), Ok(()));
    assert_eq!(with(&|r| r.instance = "x".repeat(NAME_BYTES_MAX + 1)), bad);
    assert_eq!(with(&|r| r.instance.clear()), bad);
    assert_eq!(with(&|r| r.shard = 2), bad);
    assert_eq!(with(&|r| r.shard = u32::MAX), bad);
    assert_eq!(with(&|r| r.groups.clear()), bad);
    assert_eq!(with(&|r| r.groups = vec![r.groups[0]; GROUPS_MAX + 1]), bad);
    assert_eq!(with(&|r| r.groups[0].group = 65_536), bad);
    assert_eq!(with(&|r| r.groups[0].shards = 65_536 + 2), bad);
    assert_eq!(with(&|r| r.groups[0].block_bytes = 0), bad);
    assert_eq!(with(&|r| r.groups[0].block_bytes = 65), bad);
    assert_eq!(with(&|r| r.namespace.clear()), bad);
    assert_eq!(with(&|r| drop(r.namespace.insert("big".into(), "x".repeat(NAMESPACE_BYTES_MAX)))), bad);
    for (ms, ok) in [(599_999, true), (600_000, true), (600_001, false), (u32::MAX, false)] {
        assert_eq!(lookup_request(&proto::LookupRequest { lease_ms: ms, ..lookup(1) }).is_ok(), ok);
        assert_eq!(flush_timeout(ms).is_ok(), ok);
    }
    assert!(flush_timeout(0).is_err());
}

#[test]
fn malformed_lengths_are_refused() {
    for length in [1, 31, 33, 63] {
        let request = proto::LookupRequest { keys: vec![0; length].into(), ..lookup(1) };
        assert_eq!(kind(lookup_request(&request)).err(), Some(ErrorKind::InvalidInput), "{length} bytes of keys");
    }
    for tenant in ["~1", "a b", &"x".repeat(65)] {
        let tenant = tenant.to_owned();
        assert!(lookup_request(&proto::LookupRequest { tenant: tenant.clone(), ..lookup(1) }).is_err());
        assert!(save_blocks(&proto::SaveRequest { tenant, ..save(1) }).is_err());
    }
    assert!(lease(&[0; 15]).is_err() && lease(&[]).is_err() && lease(&[0; 16]).is_ok());
    assert!(save_blocks(&proto::SaveRequest { depths: vec![0], ..save(2) }).is_err());
    assert!(save_blocks(&proto::SaveRequest { blocks: vec![0; 3], ..save(2) }).is_err());
    assert!(save_blocks(&proto::SaveRequest { parents: vec![0; 32].into(), ..save(2) }).is_err());
}

#[test]
fn values_come_back_as_they_were() {
    let spec = instance_spec(register()).expect("well-formed");
    let back = instance_spec(register_request(1, &spec, 9)).expect("well-formed");
    assert_eq!((back.instance, back.namespace, back.groups, back.shard), {
        let spec = spec.clone();
        (spec.instance, spec.namespace, spec.groups, spec.shard)
    });
    let request = LookupRequest {
        instance: spec.instance,
        tenant: TenantId::new("salt-1").ok(),
        group: 3,
        keys: (0..5).map(|i| BlockKey::from_bytes([i; 32])).collect(),
        lease: Some(Duration::from_micros(10)),
        tag: 9,
        with_places: true,
        question: None,
        prefetch: true,
    };
    let back = lookup_request(&lookup_to_wire(1, &request)).expect("well-formed");
    assert_eq!((&back.keys, back.group, back.tag, back.with_places, back.prefetch), (&request.keys, 3, 9, true, true));
    assert_eq!(back.lease, Some(Duration::from_millis(1)), "a short lease is no lease only if none was asked for");
    let places = Places { arena: ArenaId(77), places: vec![Place(1), Place(u32::MAX)] };
    for places in [None, Some(places)] {
        let reply = LookupReply {
            hit_blocks: 4,
            dram_blocks: 2,
            lease: Some(LeaseId(0x0102_0304)),
            places,
            decision: 7,
            fetch_us: 8,
        };
        assert_eq!(kind(lookup_reply(&lookup_reply_to_wire(&reply))), Ok(reply));
    }
    assert!(arena(&[0; 15]).is_err());
}

#[test]
fn questions_come_back_from_the_wire_and_are_bounded() {
    let computed = ComputedTokens {
        decision: 3,
        first_token: 16,
        end_token: 4096,
        load_share: 0.5,
        took: Duration::from_micros(1_234_567),
    };
    let asked = LoadQuestion {
        request: "r".into(),
        first_block: 1,
        block_tokens: 16,
        load_share: 0.25,
        policy: Some(LoadPolicy::Shadow),
        computed: vec![computed],
    };
    let back = question(&question_to_wire(&asked)).expect("good");
    assert_eq!((back.request.as_str(), back.first_block, back.block_tokens), ("r", 1, 16));
    assert_eq!((back.load_share, back.policy, back.computed), (0.25, Some(LoadPolicy::Shadow), vec![computed]));
    assert!(question(&proto::LoadQuestion::default()).is_ok_and(|question| question.policy.is_none()));
    for (bytes, count, policy, ok) in
        [(256, 256, "auto", true), (257, 1, "auto", false), (1, 257, "auto", false), (1, 1, "sometimes", false)]
    {
        let wire = proto::LoadQuestion {
            request: "x".repeat(bytes),
            policy: policy.into(),
            computed: vec![proto::ComputedTokens::default(); count],
            ..proto::LoadQuestion::default()
        };
        assert_eq!(question(&wire).is_ok(), ok, "{bytes} {count} {policy}");
    }
}
