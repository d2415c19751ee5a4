//! Servers come, go and are killed under their clients: clients find them by themselves, register again, and no operation
//! is left hanging. And how the programs start, refuse to start and stop.
#![expect(clippy::expect_used, reason = "a test that cannot go on has failed")]

mod support;

use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use pegaflow_engine::{ErrorKind, LoadBlock, LoadOutcome, SaveOutcome};
use pegaflow_server::client::{ClientConfig, CompletionResult, Endpoint};
use support::{BLOCKS, Layout, Local, PATIENCE, Process, Worker, until};

fn run(command: &mut Command) -> (Option<i32>, String, String) {
    let output = command.output().expect("runs");
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("UTF-8");
    (output.status.code(), text(output.stdout), text(output.stderr))
}

#[test]
fn a_client_waits_for_its_server_and_follows_it_through_kill_9() {
    let directory = tempfile::tempdir().expect("a directory");
    let socket = directory.path().join("p.sock");
    let mut worker = Worker::new(Endpoint::Unix(socket.clone()));
    worker.register();
    let mut epoch = 0;
    for round in 0..3 {
        let (mut server, ready) = Process::start(Process::command(&socket));
        assert_eq!(ready["ready"], true);
        worker.client.wait_connected(PATIENCE).expect("finds the server by itself");
        assert!(worker.client.epoch() > epoch, "a new session");
        epoch = worker.client.epoch();
        worker.fill(0, round);
        let operation = worker.start_save(4).expect("accepted");
        let saved = SaveOutcome { saved: 4, present: 0, dropped: 0 };
        assert_eq!(worker.wait(operation), CompletionResult::Save(saved), "registered with the new server");
        assert_eq!(worker.lookup(4).expect("answers").hit_blocks, 4);
        server.child.kill().expect("kill -9");
        until("the client notices", || !worker.client.is_connected());
        assert_eq!(worker.lookup(4).map_err(|error| error.kind()), Err(ErrorKind::Closed));
    }
}

#[test]
fn operations_in_flight_end_when_the_server_is_killed() {
    let directory = tempfile::tempdir().expect("a directory");
    let socket = directory.path().join("p.sock");
    for delay_us in [0, 100, 1_000, 5_000] {
        let (mut server, _) = Process::start(Process::command(&socket));
        // Two slots: operations wait for each other in every stage.
        let worker = Worker::new(Endpoint::Unix(socket.clone()));
        worker.register();
        worker.client.wait_connected(PATIENCE).expect("connects");
        let operation = worker.start_save(BLOCKS / 2).expect("accepted");
        worker.wait(operation);
        let mut open = std::collections::HashSet::new();
        open.insert(worker.start_load(BLOCKS / 2));
        for _ in 0..8 {
            open.insert(worker.start_save(BLOCKS / 2).expect("accepted"));
        }
        std::thread::sleep(Duration::from_micros(delay_us));
        server.child.kill().expect("kill -9");
        while !open.is_empty() {
            assert!(worker.client.wait_completion(PATIENCE), "{} operations hang", open.len());
            for ended in worker.client.poll() {
                assert!(open.remove(&ended.operation), "operation {} ended twice", ended.operation.0);
            }
        }
        worker.client.close(PATIENCE);
        assert!(worker.client.poll().is_empty());
    }
}

#[test]
fn a_stopped_server_process_of_a_worker_is_told_by_the_stream() {
    let mut local = Local::start();
    let worker = local.worker();
    let operation = worker.start_save(3).expect("accepted");
    worker.wait(operation);
    assert_eq!(local.stop().map_err(|error| error.kind()), Ok(()));
    until("the client notices", || !worker.client.is_connected());
    assert!(!local.socket.exists(), "the socket is gone");
    assert_eq!(local.engine.ready().map_err(|error| error.kind()), Err(ErrorKind::Closed));
}

#[test]
fn sigterm_and_sigint_end_the_server_in_order() {
    let directory = tempfile::tempdir().expect("a directory");
    let socket = directory.path().join("p.sock");
    for signal in ["-TERM", "-INT"] {
        let (mut server, _) = Process::start(Process::command(&socket));
        let worker = Worker::new(Endpoint::Unix(socket.clone()));
        worker.register();
        worker.client.wait_connected(PATIENCE).expect("connects");
        let operation = worker.start_save(BLOCKS).expect("accepted");
        server.signal(signal);
        assert_eq!(server.wait_exit(), Some(0), "{signal}");
        worker.wait(operation);
        assert!(!socket.exists());
    }
}

#[test]
fn a_second_server_on_the_socket_is_refused_in_one_line_and_the_first_is_unharmed() {
    let directory = tempfile::tempdir().expect("a directory");
    let socket = directory.path().join("p.sock");
    let (_server, _) = Process::start(Process::command(&socket));
    let (code, stdout, stderr) = run(Process::command(&socket).args(["--log", "error"]));
    assert_eq!((code, stdout.as_str()), (Some(5), ""));
    assert_eq!(stderr.lines().count(), 1, "{stderr}");
    assert!(stderr.contains("already") && stderr.contains("p.sock"), "{stderr}");
    let (code, stdout, _) = run(cli(&socket).arg("ping"));
    assert_eq!(code, Some(0));
    assert!(stdout.contains("answered"));
}

fn cli(socket: &std::path::Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_pegaflow"));
    command.arg("--socket").arg(socket);
    command
}

#[test]
fn the_command_line_asks_the_server() {
    let directory = tempfile::tempdir().expect("a directory");
    let socket = directory.path().join("p.sock");
    let (code, _, stderr) = run(cli(&socket).arg("status"));
    assert_eq!(code, Some(5));
    assert!(stderr.contains("no server") && stderr.lines().count() == 1, "{stderr}");
    let (_server, _) = Process::start(Process::command(&socket));
    let (code, stdout, _) = run(cli(&socket).args(["--json", "status"]));
    assert_eq!(code, Some(0));
    let stats: serde_json::Value = serde_json::from_str(&stdout).expect("JSON");
    assert_eq!(stats["engine"]["dram_capacity_bytes"], 32 << 20);
    let (code, stdout, _) = run(cli(&socket).arg("status"));
    assert!(code == Some(0) && stdout.contains("dram_capacity_bytes"), "{stdout}");
    let (code, stdout, stderr) = run(cli(&socket).arg("flush"));
    assert_eq!((code, stdout.as_str()), (Some(0), "flushed\n"), "{stderr}");
    let json = |arguments: &[&str]| -> (Option<i32>, serde_json::Value) {
        let (code, stdout, stderr) = run(cli(&socket).arg("--json").args(arguments));
        (code, serde_json::from_str(&stdout).unwrap_or_else(|error| panic!("{stdout}{stderr}: {error}")))
    };
    assert_eq!(json(&["flush"]), (Some(0), serde_json::json!({ "flushed": true })));
    assert_eq!(json(&["load-policy", "shadow"]), (Some(0), serde_json::json!({ "load_policy": "shadow" })));
    assert_eq!(json(&["explain"]), (Some(0), serde_json::json!({ "decisions": [] })));
    assert!(json(&["ping"]).1["answered_ms"].as_f64().is_some_and(|ms| ms > 0.0));
    let (code, failed) = json(&["reopen"]);
    assert!(code == Some(3) && failed["error"]["kind"] == "NotFound", "{code:?} {failed}");
    let nowhere = directory.path().join("nowhere.sock");
    let (code, failed, _) = run(cli(&nowhere).args(["--json", "ping"]));
    let failed: serde_json::Value = serde_json::from_str(&failed).expect("JSON");
    assert!(code == Some(5) && failed["error"]["kind"] == "Closed", "{code:?} {failed}");
    let (code, ..) = run(cli(&socket).arg("dance"));
    assert_eq!(code, Some(2));
}

#[test]
fn every_problem_of_the_configuration_is_named_at_once() {
    let directory = tempfile::tempdir().expect("a directory");
    let mut command = Process::command(&directory.path().join("p.sock"));
    command.args(["--validate", "--path", "/nowhere", "--capacity", "7", "--region", "5", "--log", "=="]);
    let (code, _, stderr) = run(&mut command);
    assert_eq!(code, Some(2));
    for part in ["capacity is 7 B", "region is 5 B", "log '=='"] {
        assert!(stderr.contains(part), "{part} not in {stderr}");
    }
    let mut command = Process::command(&directory.path().join("p.sock"));
    let (code, stdout, _) = run(command.arg("--validate"));
    assert!(code == Some(0) && stdout.contains("valid"), "{stdout}");
    let mut command = Process::command(&directory.path().join("p.sock"));
    let (code, _, stderr) = run(command.args(["--tcp", "127.0.0.1:0"]));
    assert!(code == Some(2) && stderr.contains("insecure_loopback"), "{stderr}");
    let mut command = Process::command(&directory.path().join("p.sock"));
    let (code, _, stderr) = run(command.args(["--tcp", "0.0.0.0:0", "--insecure-loopback"]));
    assert!(code == Some(2) && stderr.contains("loopback"), "{stderr}");
}

/// A directory for a store: O_DIRECT needs a real file system.
fn store_directory() -> tempfile::TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a directory")
}

fn with_store(socket: &std::path::Path, store: &std::path::Path) -> Command {
    let mut command = Process::command(socket);
    command.args(["--capacity", "64MiB", "--region", "16MiB", "--log", "error", "--path"]).arg(store);
    command
}

#[test]
fn what_was_saved_is_there_after_sigterm_and_a_new_start() {
    saved_and_started_again(false);
}

/// As the option has it by default: in DRAM, without a load, and the counters say so.
#[test]
fn what_was_in_dram_is_there_after_sigterm_and_a_new_start() {
    saved_and_started_again(true);
}

fn saved_and_started_again(is_warm: bool) {
    let with_store = |socket: &std::path::Path, store: &std::path::Path| {
        let mut command = with_store(socket, store);
        if !is_warm {
            command.args(["--warm-start", "off"]);
        }
        command
    };
    let directory = store_directory();
    let (sockets, store) = (tempfile::tempdir().expect("a directory"), directory.path().join("store"));
    let socket = sockets.path().join("p.sock");
    let mut worker = Worker::new(Endpoint::Unix(socket.clone()));
    worker.register();
    let count = BLOCKS / 2;
    (0..count).for_each(|block| worker.fill(block, block as u8));
    let (mut server, _) = Process::start(with_store(&socket, &store));
    worker.client.wait_connected(PATIENCE).expect("connects");
    let operation = worker.start_save(count).expect("accepted");
    worker.wait(operation);
    server.signal("-TERM");
    assert_eq!(server.wait_exit(), Some(0));
    until("the client notices", || !worker.client.is_connected());
    let (_server, ready) = Process::start(with_store(&socket, &store));
    assert_eq!(ready["records"], count);
    worker.client.wait_connected(PATIENCE).expect("registers by itself");
    let warm = || worker.client.stats().expect("answers")["engine"].clone();
    until("the warm start", || warm()["warm_state"] != "running");
    let expected = if is_warm { ("done", u64::from(count)) } else { ("off", 0) };
    assert_eq!(
        (warm()["warm_state"].as_str(), warm()["warm_read_blocks"].as_u64()),
        (Some(expected.0), Some(expected.1))
    );
    let operation = worker.start_load(count);
    let (loaded_dram, loaded_nvme) = if is_warm { (count, 0) } else { (0, count) };
    let loaded = LoadOutcome { loaded_dram, loaded_nvme, failed: vec![] };
    assert_eq!(worker.wait(operation), CompletionResult::Load(loaded));
    for block in 0..count {
        assert!(worker.read(block) == worker.read(BLOCKS - count + block), "block {block}");
    }
}

/// Engines of different models and layouts, as one host has them during a rolling upgrade of the engines.
const LAYOUTS: [Layout; 3] = [
    Layout::USUAL,
    Layout { instance: "old", model: "v1", fragments: [65_536, 1024] },
    Layout { instance: "new", model: "v2", fragments: [12_288, 96] },
];

/// An engine that asks for the same blocks again and again, whatever becomes of the server.
struct BusyEngine {
    worker: Worker,
    /// Blocks that it has.
    count: u32,
    /// What the first lookup of the latest session was in, and how many there have been.
    epoch: u64,
    sessions: u32,
    /// Requests that came to nothing because the server was away, or went away meanwhile.
    cut_off: u32,
}

impl BusyEngine {
    fn new(socket: &Path, layout: Layout, seed: u8) -> Self {
        let mut config = ClientConfig::new(Endpoint::Unix(socket.to_owned()), layout.instance);
        (config.lookup_timeout, config.rpc_timeout) = (PATIENCE, PATIENCE);
        let mut worker = Worker::with_layout(config, layout);
        let count = BLOCKS / 2;
        (0..count).for_each(|block| worker.fill(block, seed + block as u8));
        worker.register();
        Self { worker, count, epoch: 0, sessions: 0, cut_off: 0 }
    }

    /// Looks its blocks up, loads what is found and compares it, and saves. The error says why the server did not serve.
    fn ask(&mut self) -> pegaflow_engine::Result<()> {
        let (epoch, count) = (self.worker.client.epoch(), self.count);
        let reply = self.worker.lookup(count)?;
        if epoch != self.epoch {
            let saved_before = if self.sessions == 0 { 0 } else { count };
            assert_eq!(reply.hit_blocks, saved_before, "the first lookup of session {}", self.sessions);
            (self.epoch, self.sessions) = (epoch, self.sessions + 1);
        }
        if let Some(lease) = reply.lease {
            let hits = reply.hit_blocks;
            (0..hits).for_each(|index| self.worker.fill(BLOCKS - count + index, 0xee));
            let operation = self.worker.operation();
            let blocks = (0..hits).map(|index| LoadBlock { index, block: BLOCKS - count + index }).collect();
            self.worker.client.load(operation, lease, 0, blocks, 0)?;
            let CompletionResult::Load(LoadOutcome { loaded_dram, loaded_nvme, failed }) = self.worker.wait(operation)
            else {
                panic!("a load")
            };
            assert_eq!(loaded_dram + loaded_nvme + failed.len() as u32, hits, "each block is right or failed");
            for (index, block) in (0..hits).zip(BLOCKS - count..).filter(|(_, block)| !failed.contains(block)) {
                let is_right = self.worker.read(index) == self.worker.read(block);
                assert!(is_right, "block {index} of session {}: wrong bytes", self.sessions);
            }
            self.cut_off += u32::from(!failed.is_empty());
        }
        let operation = self.worker.start_save(count)?;
        self.worker.wait(operation);
        Ok(())
    }

    /// Asks until it is told to stop, and counts what was served.
    fn run(&mut self, is_over: &AtomicBool, served: &AtomicU64) {
        while !is_over.load(Ordering::Relaxed) {
            match self.ask() {
                Ok(()) => drop(served.fetch_add(1, Ordering::Relaxed)),
                Err(_) => {
                    self.cut_off += 1;
                    std::thread::sleep(Duration::from_millis(2));
                }
            }
        }
    }
}

/// Nothing is read wrong or hangs, no engine has to be restarted, and the first lookup at each new server finds everything.
#[test]
fn a_server_is_replaced_under_busy_engines_of_different_layouts() {
    let directory = store_directory();
    let (sockets, store) = (tempfile::tempdir().expect("a directory"), directory.path().join("store"));
    let socket = sockets.path().join("p.sock");
    let (mut server, _) = Process::start(with_store(&socket, &store));
    let mut engines: Vec<BusyEngine> =
        LAYOUTS.iter().zip(1..).map(|(layout, seed)| BusyEngine::new(&socket, *layout, 40 * seed)).collect();
    let (is_over, served) = (AtomicBool::new(false), [const { AtomicU64::new(0) }; LAYOUTS.len()]);
    let served_by_all = |what: &str| {
        let before = served.each_ref().map(|served| served.load(Ordering::Relaxed));
        // The second one began after this call.
        until(what, || served.iter().zip(before).all(|(now, before)| now.load(Ordering::Relaxed) >= before + 2));
    };
    std::thread::scope(|scope| {
        let _told = OnDrop(|| is_over.store(true, Ordering::Relaxed));
        for (engine, served) in engines.iter_mut().zip(&served) {
            let is_over = &is_over;
            scope.spawn(move || engine.run(is_over, served));
        }
        served_by_all("all are served by the first server");
        for _upgrade in 0..2 {
            server.signal("-TERM");
            assert_eq!(server.wait_exit(), Some(0), "stopped in order, under load");
            (server, _) = Process::start(with_store(&socket, &store));
            served_by_all("all are served by the next server");
        }
    });
    for engine in &engines {
        assert_eq!(engine.sessions, 3, "one session with each server, all found at once");
        println!("{} requests were cut off", engine.cut_off);
    }
}

/// Does it also when a test fails.
struct OnDrop<F: Fn()>(F);

impl<F: Fn()> Drop for OnDrop<F> {
    fn drop(&mut self) {
        (self.0)();
    }
}

#[test]
fn a_store_that_a_newer_version_wrote_is_refused_in_one_line_and_left_as_it_is() {
    let directory = store_directory();
    let (sockets, store) = (tempfile::tempdir().expect("a directory"), directory.path().join("store"));
    let socket = sockets.path().join("p.sock");
    let (mut server, _) = Process::start(with_store(&socket, &store));
    let mut engine = BusyEngine::new(&socket, Layout::USUAL, 1);
    until("the blocks are saved", || engine.ask().is_ok());
    server.signal("-TERM");
    assert_eq!(server.wait_exit(), Some(0));
    let version = store.join("VERSION");
    let ours = std::fs::read(&version).expect("reads");
    std::fs::write(&version, "pegaflow-store 2\n").expect("writes");
    let (code, stdout, stderr) = run(&mut with_store(&socket, &store));
    assert_eq!((code, stdout.as_str(), stderr.lines().count()), (Some(4), "", 1), "{stderr}");
    for part in ["format version 2", "reads version 1", "use the build that wrote it"] {
        assert!(stderr.contains(part), "{part} is not in {stderr}");
    }
    assert!(!socket.exists(), "no engine connects to it");
    std::fs::write(&version, ours).expect("writes");
    let (_server, _) = Process::start(with_store(&socket, &store));
    // Its first lookup finds everything, or it panics.
    until("the engine is served again", || engine.ask().is_ok());
}

#[test]
fn a_directory_in_use_or_of_something_else_is_refused_in_one_line() {
    let directory = store_directory();
    let (sockets, store) = (tempfile::tempdir().expect("a directory"), directory.path().join("store"));
    let (_server, _) = Process::start(with_store(&sockets.path().join("1.sock"), &store));
    let second = sockets.path().join("2.sock");
    let (code, stdout, stderr) = run(&mut with_store(&second, &store));
    assert_eq!((code, stdout.as_str(), stderr.lines().count()), (Some(5), "", 1), "{stderr}");
    assert!(!second.exists());
    let foreign = directory.path().join("foreign");
    std::fs::create_dir(&foreign).expect("makes");
    std::fs::write(foreign.join("VERSION"), "somebody else's\n").expect("writes");
    let (code, _, stderr) = run(&mut with_store(&second, &foreign));
    assert_eq!((code, stderr.lines().count()), (Some(4), 1), "{stderr}");
    assert_eq!(std::fs::read(foreign.join("VERSION")).expect("reads"), b"somebody else's\n", "left as it was");
}

#[test]
fn a_store_larger_than_a_file_may_be_is_refused_in_one_line() {
    let directory = store_directory();
    let (sockets, store) = (tempfile::tempdir().expect("a directory"), directory.path().join("store"));
    let limited = with_store(&sockets.path().join("p.sock"), &store);
    let mut command = Command::new("sh");
    command.args(["-c", "ulimit -f 80000; exec \"$@\"", "sh"]).arg(limited.get_program()).args(limited.get_args());
    let (code, stdout, stderr) = run(&mut command);
    assert_eq!((code, stdout.as_str(), stderr.lines().count()), (Some(1), "", 1), "{stderr}");
    assert!(stderr.contains("ulimit") && stderr.contains("capacity"), "{stderr}");
    assert!(!store.join("regions.0").exists(), "nothing is left of it");
    let (_server, ready) = Process::start(with_store(&sockets.path().join("p.sock"), &store));
    assert_eq!(ready["ready"], true, "without the limit it starts");
}
