//! Clients that break the protocol, go over a limit, vanish or send garbage: each gets a clear error or is cut off,
//! nothing is held for it, and others are served as before.
#![expect(clippy::expect_used, reason = "a test that cannot go on has failed")]

mod support;

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use hyper_util::rt::TokioIo;
use pegaflow_engine::{ErrorKind, LoadOutcome};
use pegaflow_server::client::CompletionResult;
use pegaflow_server::limits::{BLOCKS_MAX, MESSAGE_BYTES_MAX, OPERATIONS_MAX, SESSIONS_MAX};
use pegaflow_server::proto::pega_flow_client::PegaFlowClient;
use pegaflow_server::proto::session_event::Event;
use pegaflow_server::proto::{
    ConsumeRequest, CopyEndedRequest, Group, LoadRequest, LocateRequest, LookupReply, LookupRequest,
    OpenSessionRequest, RegisterRequest, SaveRequest, SessionEvent, ShareArenaRequest,
};
use pegaflow_server::{ERROR_KIND, ServerConfig, memory_socket_path};
use support::{BLOCK_BYTES, BLOCKS, Local, PATIENCE, until};
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status, Streaming};

type Rpc = PegaFlowClient<Channel>;

async fn connect(local: &Local) -> Rpc {
    Rpc::new(connect_channel(local).await).max_encoding_message_size(4 * MESSAGE_BYTES_MAX)
}

async fn connect_channel(local: &Local) -> Channel {
    let path = local.socket.clone();
    let connector = tower::service_fn(move |_| {
        let path = path.clone();
        async move { tokio::net::UnixStream::connect(path).await.map(TokioIo::new) }
    });
    // A small window of the stream: a client that does not read is noticed after some ten thousand events. A large one of
    // the connection: h2 ends a connection with too many small frames unread for its window, before the server's bound.
    Endpoint::from_static("http://test")
        .initial_stream_window_size(65_535)
        .initial_connection_window_size(64 << 20)
        .connect_with_connector(connector)
        .await
        .expect("connects")
}

async fn open(rpc: &mut Rpc) -> (u64, Streaming<SessionEvent>) {
    let mut events = rpc.open_session(OpenSessionRequest::default()).await.expect("opens").into_inner();
    match events.message().await {
        Ok(Some(SessionEvent { event: Some(Event::Opened(opened)) })) => (opened.session, events),
        other => panic!("no session: {other:?}"),
    }
}

fn register(session: u64) -> RegisterRequest {
    RegisterRequest {
        session,
        instance: "engine".into(),
        namespace: [("model".to_owned(), "m".to_owned())].into(),
        groups: vec![Group { group: 0, block_bytes: BLOCK_BYTES, shards: 1 }],
        shard: 0,
        blocks: 2,
        keeps_all: false,
    }
}

fn lookup(session: u64, keys: usize) -> LookupRequest {
    LookupRequest { session, instance: "engine".into(), keys: vec![1; keys * 32].into(), ..Default::default() }
}

fn locate(session: u64, keys: usize) -> LocateRequest {
    LocateRequest { session, instance: "engine".into(), keys: vec![1; keys * 32].into(), ..Default::default() }
}

fn save(session: u64, count: usize) -> SaveRequest {
    SaveRequest {
        session,
        instance: "engine".into(),
        keys: vec![1; count * 32].into(),
        parents: vec![0; count * 32].into(),
        depths: vec![0; count],
        blocks: vec![0; count],
        ..Default::default()
    }
}

/// The code and the machine-readable reason.
fn reason<T>(result: Result<T, Status>) -> Result<(), (Code, Option<String>)> {
    result.map(drop).map_err(|status| {
        let kind = status.metadata().get(ERROR_KIND).and_then(|kind| kind.to_str().ok()).map(str::to_owned);
        (status.code(), kind)
    })
}

fn refusal(code: Code, kind: &str) -> Result<(), (Code, Option<String>)> {
    Err((code, Some(kind.to_owned())))
}

#[test]
fn requests_over_a_limit_are_refused_and_those_at_it_are_not() {
    let local = Local::start();
    local.runtime.block_on(async {
        let mut rpc = connect(&local).await;
        let (session, _events) = open(&mut rpc).await;
        rpc.register(register(session)).await.expect("registers");
        let invalid = refusal(Code::InvalidArgument, "invalid_input");
        for (keys, expected) in [(BLOCKS_MAX - 1, Ok(())), (BLOCKS_MAX, Ok(())), (BLOCKS_MAX + 1, invalid.clone())] {
            assert_eq!(reason(rpc.lookup(lookup(session, keys)).await), expected, "{keys} keys");
            assert_eq!(reason(rpc.locate(locate(session, keys)).await), expected, "{keys} keys");
        }
        assert_eq!(reason(rpc.lookup(LookupRequest { keys: vec![1; 33].into(), ..lookup(session, 1) }).await), invalid);
        let by_namespace = |bytes: usize, instance: &str| {
            let namespace = vec![7; bytes].into();
            LocateRequest { namespace, instance: instance.into(), ..locate(session, 1) }
        };
        assert_eq!(reason(rpc.locate(by_namespace(32, "")).await), Ok(()), "nothing is there");
        for wrong in [by_namespace(31, ""), by_namespace(32, "engine"), by_namespace(0, "")] {
            assert_eq!(reason(rpc.locate(wrong).await), invalid);
        }
        let (no_worker, _events) = open(&mut rpc).await;
        assert_eq!(reason(rpc.save(save(no_worker, 1)).await), invalid, "no worker");
        assert_eq!(reason(rpc.share_arena(ShareArenaRequest { session: no_worker }).await), invalid, "no worker");
        rpc.share_arena(ShareArenaRequest { session }).await.expect("shares");
        assert_eq!(
            reason(rpc.save(SaveRequest { blocks: vec![2], ..save(session, 1) }).await),
            invalid,
            "block 2 of 2"
        );
        rpc.copy_ended(CopyEndedRequest { session, order: 7, is_complete: true })
            .await
            .expect("no such order, no harm");
        rpc.consume(ConsumeRequest { session, leases: vec![0; 16].into(), shard: 0 }).await.expect("nor lease");
        let consume = ConsumeRequest { session, leases: vec![0; 15].into(), shard: 0 };
        assert_eq!(reason(rpc.consume(consume).await), invalid, "half a lease");
        assert_eq!(reason(rpc.save(SaveRequest { depths: vec![], ..save(session, 1) }).await), invalid);
        assert_eq!(reason(rpc.save(save(session, BLOCKS_MAX + 1)).await), invalid);
        let load =
            LoadRequest { session, lease: vec![0; 16].into(), indexes: vec![0], blocks: vec![0], ..Default::default() };
        assert_eq!(reason(rpc.load(load).await), refusal(Code::NotFound, "not_found"), "an unknown lease");
        let no_blocks = RegisterRequest { blocks: 0, ..register(session) };
        assert_eq!(reason(rpc.register(no_blocks).await), invalid, "a KV cache of no blocks");
        let (second, _events) = open(&mut rpc).await;
        let other = RegisterRequest {
            groups: vec![Group { group: 0, block_bytes: BLOCK_BYTES + 16, shards: 1 }],
            ..register(second)
        };
        assert_eq!(reason(rpc.register(other).await), refusal(Code::FailedPrecondition, "geometry_mismatch"));
    });
}

#[test]
fn a_message_over_8_mib_is_refused_before_it_is_read() {
    let local = Local::start();
    local.runtime.block_on(async {
        let mut rpc = connect(&local).await;
        let (session, _events) = open(&mut rpc).await;
        // The field's tag and length, the session and the instance take a few bytes.
        let frame = |bytes: usize| LookupRequest { session, keys: vec![1; bytes].into(), ..Default::default() };
        let overhead = prost::Message::encoded_len(&frame(MESSAGE_BYTES_MAX)) - MESSAGE_BYTES_MAX;
        for bytes in [MESSAGE_BYTES_MAX - 1, MESSAGE_BYTES_MAX] {
            let result = reason(rpc.lookup(frame(bytes - overhead)).await);
            assert_eq!(result, refusal(Code::InvalidArgument, "invalid_input"), "{bytes} bytes are read, then checked");
        }
        let result = rpc.lookup(frame(MESSAGE_BYTES_MAX + 1 - overhead)).await;
        let message = result.as_ref().err().map_or("", |status| status.message());
        assert!(
            [MESSAGE_BYTES_MAX, MESSAGE_BYTES_MAX + 1].iter().all(|n| message.contains(&n.to_string())),
            "{message}"
        );
        let result = reason(result);
        assert_eq!(result, Err((Code::OutOfRange, None)), "refused by its length");
    });
}

#[test]
fn a_message_that_is_no_request_is_refused_and_the_connection_goes_on() {
    let local = Local::start();
    local.runtime.block_on(async {
        let mut rpc = connect(&local).await;
        let (session, _events) = open(&mut rpc).await;
        rpc.register(register(session)).await.expect("registers");
        // Field 1 of a lookup is a number; this sends text in it.
        let mut raw = tonic::client::Grpc::new(connect_channel(&local).await);
        for _ in 0..3 {
            raw.ready().await.expect("connected");
            let path = tonic::codegen::http::uri::PathAndQuery::from_static("/pegaflow.v1.PegaFlow/Lookup");
            let codec = tonic_prost::ProstCodec::<String, LookupReply>::default();
            let status =
                raw.unary(tonic::Request::new("no number".to_owned()), path, codec).await.expect_err("refused");
            assert_eq!(status.code(), Code::Internal, "{status}");
            assert!(status.message().contains("session"), "names the field: {status}");
        }
        rpc.lookup(lookup(session, 1)).await.expect("served as before");
    });
}

#[test]
fn an_unknown_session_gets_the_remedy() {
    let local = Local::start();
    local.runtime.block_on(async {
        let mut rpc = connect(&local).await;
        let status = rpc.lookup(lookup(42, 1)).await.expect_err("unknown");
        assert!(status.message().contains("OpenSession"), "{}", status.message());
        assert_eq!(reason::<()>(Err(status)), refusal(Code::NotFound, "not_found"));
    });
}

#[test]
fn a_dropped_stream_ends_the_session_and_frees_what_it_held() {
    let local = Local::start();
    local.runtime.block_on(async {
        let mut rpc = connect(&local).await;
        let (session, events) = open(&mut rpc).await;
        rpc.register(register(session)).await.expect("registers");
        rpc.share_arena(ShareArenaRequest { session }).await.expect("shares");
        assert_eq!((local.server().sessions(), local.engine.stats().instances), (1, 1));
        drop(events);
        let freed = || {
            let stats = local.engine.stats();
            (local.server().sessions(), stats.instances, stats.sessions) == (0, 0, 0)
        };
        tokio::task::block_in_place(|| until("the session is freed", freed));
        assert_eq!(reason(rpc.lookup(lookup(session, 1)).await), refusal(Code::NotFound, "not_found"));
    });
}

#[test]
fn a_client_that_disappears_mid_save_leaves_nothing_held_and_harms_nobody() {
    let local = Local::start();
    let mut other = local.worker();
    (0..BLOCKS / 2).for_each(|block| other.fill(block, block as u8));
    other.wait(other.start_save(BLOCKS / 2).expect("accepted"));
    local.runtime.block_on(async {
        for _ in 0..8 {
            let mut rpc = connect(&local).await;
            let (session, events) = open(&mut rpc).await;
            rpc.register(register(session)).await.expect("registers");
            rpc.share_arena(ShareArenaRequest { session }).await.expect("shares");
            for operation in 0..200 {
                rpc.save(SaveRequest { operation, ..save(session, 1000) }).await.expect("accepted");
            }
            drop((events, rpc));
        }
    });
    until("its sessions are freed", || local.server().sessions() == 1 && local.engine.stats().sessions == 1);
    until("its operations have ended", || local.engine.stats().operations == 0);
    let operation = other.start_load(BLOCKS / 2);
    let loaded = LoadOutcome { loaded_dram: BLOCKS / 2, loaded_nvme: 0, failed: vec![] };
    assert_eq!(other.wait(operation), CompletionResult::Load(loaded));
    for block in 0..BLOCKS / 2 {
        assert!(other.read(block) == other.read(BLOCKS - BLOCKS / 2 + block), "block {block}");
    }
}

/// A worker that was told to copy a block of a save and does not say that it has ended, and its session. It counts as being
/// able to touch the arena until the connection that is returned says otherwise.
async fn silent_copy(local: &Local) -> (UnixStream, Streaming<SessionEvent>) {
    let mut rpc = connect(local).await;
    let (session, mut events) = open(&mut rpc).await;
    rpc.register(register(session)).await.expect("registers");
    let shared = rpc.share_arena(ShareArenaRequest { session }).await.expect("shares").into_inner();
    let mut connection = UnixStream::connect(memory_socket_path(&local.socket)).expect("connects");
    connection.write_all(&shared.token).expect("sends");
    connection.read_exact(&mut [0]).expect("granted");
    rpc.save(SaveRequest { operation: 1, ..save(session, 1) }).await.expect("accepted");
    loop {
        match events.message().await.expect("an event").expect("an event").event {
            Some(Event::Copy(order)) => break assert_eq!((order.operation, order.is_load), (1, false)),
            _ => continue,
        }
    }
    (connection, events)
}

#[test]
fn what_a_worker_was_told_to_copy_is_not_reused_before_it_can_touch_the_arena_no_more() {
    let local = Local::start();
    let (mut connection, events) = local.runtime.block_on(silent_copy(&local));
    drop(events);
    // The session is over, but this process still lives and has not said that it can touch the arena no more.
    until("its session is gone", || local.server().sessions() == 0);
    assert_eq!(local.engine.stats().operations, 1);
    connection.write_all(&[1]).expect("says goodbye");
    until("the save has ended", || local.engine.stats().operations == 0);
    assert_eq!(local.engine.stats().dram_used_bytes, 0, "and its slot is free");
}

#[test]
fn a_worker_that_never_ends_its_copy_does_not_hold_up_a_stop() {
    let mut local = Local::start();
    let other = local.worker();
    let _silent = local.runtime.block_on(silent_copy(&local));
    let server = local.server.take().expect("runs");
    let stopped = async { tokio::time::timeout(PATIENCE, server.stop(Duration::from_millis(400))).await };
    let stopped = local.runtime.block_on(stopped).expect("it does not wait for that worker");
    assert_eq!(stopped.map_err(|error| error.kind()), Err(ErrorKind::Timeout), "and says that not all has ended");
    until("others see the end", || !other.client.is_connected());
    assert!(!local.socket.exists(), "there is room for the next server");
}

#[test]
fn the_number_of_sessions_is_bounded() {
    let local = Local::start();
    local.runtime.block_on(async {
        let mut events = Vec::new();
        let mut rpcs = Vec::new();
        // A connection takes a few hundred requests at once, and a session is one.
        while events.len() < SESSIONS_MAX {
            let mut rpc = connect(&local).await;
            for _ in 0..128.min(SESSIONS_MAX - events.len()) {
                events.push(open(&mut rpc).await.1);
            }
            rpcs.push(rpc);
        }
        let mut rpc = connect(&local).await;
        let refused = reason(rpc.open_session(OpenSessionRequest::default()).await);
        assert_eq!(refused, refusal(Code::ResourceExhausted, "busy"));
        events.pop();
        let again = || async { connect(&local).await.open_session(OpenSessionRequest::default()).await.is_ok() };
        let mut is_open = false;
        for _ in 0..1000 {
            is_open = again().await;
            if is_open {
                break;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        assert!(is_open, "its place is free again");
    });
}

#[test]
fn a_client_that_does_not_read_its_completions_is_held_up_itself() {
    let local = Local::start();
    local.runtime.block_on(async {
        let mut rpc = connect(&local).await;
        let (session, events) = open(&mut rpc).await;
        rpc.register(register(session)).await.expect("registers");
        rpc.share_arena(ShareArenaRequest { session }).await.expect("shares");
        let mut refused = None;
        // The kernel's and HTTP/2's buffers take some events; the queue behind them is bounded.
        for operation in 0..200_000u64 {
            if let Err(status) = rpc.save(SaveRequest { operation, ..save(session, 1) }).await {
                refused = Some((operation, reason::<()>(Err(status))));
                break;
            }
        }
        let (accepted, why) = refused.expect("bounded");
        assert!(accepted as usize >= OPERATIONS_MAX, "{accepted}");
        assert_eq!(why, refusal(Code::ResourceExhausted, "busy"));
        let (other, _events) = open(&mut connect(&local).await).await;
        assert_ne!(other, session, "others are served");
        drop(events);
    });
}

#[test]
fn garbage_on_either_socket_ends_that_connection_only() {
    let config = ServerConfig { memory_socket_timeout: Duration::from_millis(200) };
    let local = Local::with(&config, None);
    let mut garbage = Vec::new();
    let mut state = 0x9e37_79b9_u32;
    for _ in 0..70_000 {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        garbage.push((state >> 24) as u8);
    }
    for path in [local.socket.clone(), memory_socket_path(&local.socket)] {
        for length in [1, 15, 16, 24, 4096, garbage.len()] {
            let mut stream = UnixStream::connect(&path).expect("connects");
            // The server may close while we write.
            let _closed = stream.write_all(&garbage[..length]);
            let _closed = stream.shutdown(std::net::Shutdown::Write);
            stream.set_read_timeout(Some(PATIENCE)).expect("set");
            let mut answer = Vec::new();
            match stream.read_to_end(&mut answer) {
                Ok(_) => {}
                Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset, "{length} bytes"),
            }
        }
    }
    let worker = local.worker();
    assert_eq!(worker.lookup(1).expect("served").hit_blocks, 0);
}

#[test]
fn one_byte_a_second_does_not_hold_the_memory_socket() {
    let config = ServerConfig { memory_socket_timeout: Duration::from_millis(200) };
    let local = Local::with(&config, None);
    let mut slow = UnixStream::connect(memory_socket_path(&local.socket)).expect("connects");
    slow.write_all(&[1]).expect("writes");
    slow.set_read_timeout(Some(PATIENCE)).expect("set");
    let worker = local.worker();
    assert!(worker.client.is_connected(), "another is served meanwhile");
    assert!(!matches!(slow.read(&mut [0]), Ok(1..)), "cut off");
}
