//! The router asks real PegaFlow servers what they hold: an engine that has forgotten a prompt is chosen for what its server
//! has, what has gone attracts nobody, and a server that hangs costs one bounded wait.
#![expect(clippy::expect_used, reason = "a test that cannot go on has failed")]

mod support;

use std::time::{Duration, Instant};

use pegaflow_engine::BlockChoice;
use pegaflow_server::client::{ClientConfig, Endpoint};
use serde_json::{Value, json};
use support::router::{FakeEngine, Mood, Router};
use support::{Layout, PATIENCE, Process, Worker, until};

const BLOCKS: u32 = 8;
/// Pieces of a prompt that the router tells apart, of 1,024 bytes each; as many as blocks.
const PIECE: usize = 1024;

/// A server process, an engine that is played, and its worker, whose blocks are real.
struct Host {
    engine: FakeEngine,
    server: Process,
    worker: Worker,
    address: String,
    _directory: tempfile::TempDir,
}

impl Host {
    fn start(instance: &'static str) -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let socket = directory.path().join("p.sock");
        let (server, _) = Process::start(Process::command(&socket));
        let mut config = ClientConfig::new(Endpoint::Unix(socket.clone()), "test");
        config.rpc_timeout = PATIENCE;
        let worker = Worker::with_layout(config, Layout { instance, ..Layout::USUAL });
        worker.register();
        worker.client.wait_connected(PATIENCE).expect("connects");
        let engine = FakeEngine::start();
        engine.tells(keys_of(instance));
        let address = format!("{}={}", engine.url(), socket.display());
        Self { engine, server, worker, address, _directory: directory }
    }

    /// What an engine does that has computed the prompt.
    fn save(&self) {
        let save = self.worker.start_save(BLOCKS).expect("accepted");
        self.worker.wait(save);
    }

    /// The engine goes and comes back, at the same address and with nothing; its server stays.
    fn restart_engine(mut self, router: &Router) -> Self {
        let up = format!("pegaflow_router_engine_up{{engine=\"{}\"}}", self.engine.address);
        let address = self.engine.stop();
        self.worker.client.close(PATIENCE);
        until("it is known to be down", || router.metric(&up) == 0.0);
        self.engine = FakeEngine::start_at(address);
        until("it is known to be up", || router.metric(&up) == 1.0);
        self
    }
}

/// What an engine tells of a prompt of which every block has the text of a piece.
fn keys_of(instance: &str) -> Value {
    let hex = |index| Worker::key(index).as_bytes().iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    let tokens: Vec<u32> = (1..=BLOCKS).map(|block| block * 16).collect();
    let keys: Vec<String> = (0..BLOCKS).map(hex).collect();
    json!({"instance": instance, "tenant": null, "prompt_tokens": BLOCKS * 16, "tokens": tokens, "keys": keys})
}

fn between(hosts: &[Host], more: &[&str]) -> Router {
    let mut arguments: Vec<&str> = hosts.iter().flat_map(|host| ["--engine", &host.address]).collect();
    arguments.extend(more);
    Router::start(&arguments)
}

fn prompt(pieces: usize) -> Value {
    json!({"model": "m", "prompt": "a".repeat(pieces * PIECE)})
}

/// Has one engine answer, because the other one fails, and waits until the router has learned what it tells.
fn answered_by(router: &Router, engine: &FakeEngine, other: &FakeEngine, body: &Value) -> Value {
    let learned = router.metric("pegaflow_router_learned_total");
    let answers = engine.bodies().len();
    other.is(Mood::Fails);
    let (status, text) = router.complete(body);
    other.is(Mood::Good);
    assert_eq!((status, engine.bodies().len()), (200, answers + 1));
    until("it has learned", || router.metric("pegaflow_router_learned_total") > learned);
    serde_json::from_str(&text).expect("JSON")
}

/// Waits until the router has a session with each server.
fn until_connected(hosts: &[Host]) {
    for host in hosts {
        let sessions = || host.worker.client.stats().expect("answers")["sessions"].as_u64();
        until("the router is connected", || sessions() == Some(2));
    }
}

#[test]
fn an_engine_that_has_forgotten_is_chosen_for_what_its_server_holds_until_that_has_gone() {
    let hosts = [Host::start("one"), Host::start("two")];
    let router = between(&hosts, &["--ask-timeout", "1000"]);
    until_connected(&hosts);
    hosts[1].save();
    let [one, two] = hosts;
    let answer = answered_by(&router, &two.engine, &one.engine, &prompt(8));
    assert_eq!(answer["kv_transfer_params"], Value::Null, "the client has not asked for keys");
    assert_eq!(two.engine.bodies()[0]["kv_transfer_params"], json!({"pegaflow_keys": true}));
    // The first engine has seen the first quarter, the second one forgets that it has seen all.
    one.engine.tells(json!({"instance": "no such"}));
    two.engine.is(Mood::Fails);
    assert_eq!(router.complete(&prompt(2)).0, 200);
    let two = two.restart_engine(&router);
    let (first, second) = (one.engine.bodies().len(), two.engine.bodies().len());
    let streamed = json!({"model": "m", "prompt": "a".repeat(8 * PIECE), "stream": true});
    assert_eq!(router.complete(&streamed).0, 200);
    assert_eq!((one.engine.bodies().len(), two.engine.bodies().len()), (first, second + 1));
    let last = two.engine.bodies().pop().expect("a request");
    assert_eq!(last.get("kv_transfer_params"), None, "a stream could not tell keys");
    assert_eq!(router.metric(r#"pegaflow_router_choices_total{stage="decode",reason="dram"}"#), 1.0);
    // Another one's prompt is nobody's.
    let mut salted = streamed.clone();
    salted["cache_salt"] = "somebody".into();
    assert_eq!(router.complete(&salted).0, 200);
    assert_eq!(router.metric(r#"pegaflow_router_choices_total{stage="decode",reason="dram"}"#), 1.0);
    // The server gives the blocks up; what the engine has seen since it has lost as well.
    let direct = Worker::new(Endpoint::Unix(two.address.split_once('=').expect("a server").1.into()));
    direct.client.wait_connected(PATIENCE).expect("connects");
    direct.client.evict(&BlockChoice::default(), PATIENCE).expect("evicts");
    std::thread::sleep(Duration::from_millis(1100));
    let (first, second) = (one.engine.bodies().len(), two.engine.bodies().len());
    assert_eq!(router.complete(&streamed).0, 200);
    assert_eq!((one.engine.bodies().len(), two.engine.bodies().len()), (first + 1, second));
}

#[test]
fn a_server_that_hangs_costs_one_wait_and_is_asked_again_when_it_is_back() {
    let hosts = [Host::start("one"), Host::start("two")];
    let router = between(&hosts, &["--ask-timeout", "200"]);
    until_connected(&hosts);
    hosts[1].save();
    answered_by(&router, &hosts[1].engine, &hosts[0].engine, &prompt(8));
    let questions = |result: &str| {
        let server = hosts[1].address.split_once('=').expect("a server").1;
        router.metric(&format!("pegaflow_router_questions_total{{server=\"{server}\",result=\"{result}\"}}"))
    };
    assert_eq!((questions("answered"), questions("failed")), (1.0, 0.0));
    hosts[1].server.signal("-STOP");
    // All of its threads have stopped, and what was asked before is answered.
    std::thread::sleep(Duration::from_millis(200));
    let began = Instant::now();
    for _ in 0..20 {
        assert_eq!(router.complete(&prompt(8)).0, 200);
    }
    let took = began.elapsed();
    let (failed, skipped) = (questions("failed"), questions("skipped"));
    assert!(failed >= 1.0 && failed <= 1.0 + took.as_secs_f64(), "{failed} waits in {took:?}");
    assert!(skipped >= 20.0 - failed, "{skipped} skipped, {failed} failed");
    hosts[1].server.signal("-CONT");
    until("it is asked again", || {
        assert_eq!(router.complete(&prompt(8)).0, 200);
        questions("answered") > 1.0
    });
}

#[test]
fn a_server_that_is_not_there_costs_nothing_and_a_wrong_address_is_named() {
    let engines = [FakeEngine::start(), FakeEngine::start()];
    let urls: Vec<String> = engines.iter().map(|engine| format!("{}=/nowhere/p.sock", engine.url())).collect();
    let router = Router::start(&["--engine", &urls[0], "--engine", &urls[1]]);
    engines.iter().for_each(|engine| engine.tells(keys_of("one")));
    for _ in 0..10 {
        assert_eq!(router.complete(&prompt(8)).0, 200);
    }
    assert_eq!(router.metric("pegaflow_router_learned_total"), 0.0);
    let wrong = format!("{}=ftp://x", engines[0].url());
    let output = std::process::Command::new(env!("CARGO_BIN_EXE_pegaflow-router"))
        .args(["--engine", &wrong])
        .output()
        .expect("runs");
    let told = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.code() == Some(2) && told.contains("'ftp://x' is no server"), "{told}");
}
