//! Jobs that an operator has a running server do: started, watched, left alone, stopped, refused; over a real store.
#![expect(clippy::expect_used, reason = "a test that cannot go on has failed")]

mod support;

use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use pegaflow_engine::ErrorKind;
use pegaflow_server::client::Endpoint;
use serde_json::Value;
use support::{BLOCKS, PATIENCE, Process, Worker, until};

/// Blocks that are saved: more than one piece of a scrub.
const SAVED: u32 = BLOCKS;

struct Desk {
    folder: tempfile::TempDir,
    socket: PathBuf,
}

impl Desk {
    fn new() -> Self {
        let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a directory");
        let socket = folder.path().join("p.sock");
        Self { folder, socket }
    }

    fn store(&self) -> PathBuf {
        self.folder.path().join("store")
    }

    fn server(&self, more: &[&str]) -> (Process, Worker) {
        let mut command = Process::command(&self.socket);
        command.args(["--capacity", "64MiB", "--region", "4MiB", "--codec", "none", "--path"]).arg(self.store());
        command.args(more);
        let (server, _) = Process::start(command);
        let worker = Worker::new(Endpoint::Unix(self.socket.clone()));
        worker.register();
        worker.client.wait_connected(PATIENCE).expect("connects");
        (server, worker)
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_pegaflow"));
        command.arg("--socket").arg(&self.socket).arg("--json").args(arguments);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    fn start(&self, arguments: &[&str]) -> Child {
        self.command(arguments).spawn().expect("starts")
    }

    fn run(&self, arguments: &[&str]) -> (Option<i32>, Value) {
        let output = self.command(arguments).output().expect("runs");
        let told = serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {output:?}"));
        (output.status.code(), told)
    }

    /// It ends well; a field of what it tells.
    fn field(&self, arguments: &[&str], name: &str) -> Value {
        let (code, told) = self.run(arguments);
        assert_eq!(code, Some(0), "{arguments:?}: {told:#}");
        told[name].clone()
    }
}

fn save(worker: &mut Worker) {
    (0..SAVED).for_each(|block| worker.fill(block, block as u8));
    let operation = worker.start_save(SAVED).expect("accepted");
    worker.wait(operation);
    worker.client.flush(PATIENCE).expect("durable");
}

/// As `pegaflow ls` tells of the one namespace there is.
fn in_dram(desk: &Desk) -> Value {
    desk.field(&["ls"], "namespaces")[0]["dram_blocks"].clone()
}

fn stop(mut server: Process, worker: &Worker) {
    worker.client.close(PATIENCE);
    server.signal("-TERM");
    assert_eq!(server.wait_exit(), Some(0));
}

fn interrupt(child: &mut Child) {
    let pid = child.id().to_string();
    assert!(Command::new("kill").args(["-INT", &pid]).status().expect("kill").success());
    assert!(!child.wait().expect("ends").success(), "an interrupted command has not done its work");
}

#[test]
fn a_scrub_finds_damage_and_says_so() {
    let desk = Desk::new();
    let (server, mut worker) = desk.server(&["--scrub", "0"]);
    save(&mut worker);
    assert_eq!(desk.field(&["scrub"], "records"), SAVED);
    // Behind the two pages of the region's header and the first record's own: its payload.
    let file = std::fs::File::options().write(true).open(desk.store().join("regions.0")).expect("there");
    file.write_all_at(&[0xee; 64], (2 + 3 + 1) * 4096).expect("written");
    let (code, told) = desk.run(&["scrub"]);
    assert_eq!((code, &told["state"], &told["bad_records"]), (Some(1), &"done".into(), &1.into()), "{told:#}");
    let (code, told) = desk.run(&["scrub", "--look"]);
    assert_eq!((code, &told["number"], &told["bad_records"]), (Some(1), &2.into(), &1.into()), "{told:#}");
    assert_eq!(desk.field(&["scrub"], "records"), SAVED - 1, "it is found no more");
    stop(server, &worker);
}

#[test]
fn an_interrupted_scrub_goes_on_until_it_is_stopped_and_a_second_one_is_told() {
    let desk = Desk::new();
    let (server, mut worker) = desk.server(&["--scrub", "0"]);
    save(&mut worker);
    let mut waiting = desk.start(&["scrub", "--rate", "64KiB"]);
    until("it reads", || desk.field(&["scrub", "--look"], "state") == "running");
    let (code, told) = desk.run(&["scrub"]);
    assert_eq!((code, &told["error"]["kind"]), (Some(5), &"Busy".into()), "{told:#}");
    interrupt(&mut waiting);
    assert_eq!(desk.field(&["scrub", "--look"], "state"), "running");
    assert_eq!(desk.field(&["scrub", "--stop"], "state"), "stopped");
    assert_eq!(desk.field(&["scrub"], "state"), "done");
    stop(server, &worker);
}

#[test]
fn what_the_drive_has_of_a_namespace_comes_to_dram_and_is_read_from_there() {
    let desk = Desk::new();
    let (server, mut worker) = desk.server(&[]);
    save(&mut worker);
    stop(server, &worker);
    let (server, mut worker) = desk.server(&["--warm-start", "false"]);
    assert_eq!((in_dram(&desk), worker.lookup(SAVED).expect("answers").dram_blocks), (0.into(), 0));
    let id = desk.field(&["ls"], "namespaces")[0]["id"].as_str().expect("a name").to_owned();
    let (code, told) = desk.run(&["warm", "--namespace", &id[..12]]);
    assert_eq!((code, &told["state"], &told["namespaces"]), (Some(0), &"done".into(), &1.into()), "{told:#}");
    assert_eq!((&told["read_blocks"], in_dram(&desk)), (&SAVED.into(), SAVED.into()), "{told:#}");
    assert_eq!(worker.lookup(SAVED).expect("answers").dram_blocks, SAVED);
    (0..BLOCKS).for_each(|block| worker.fill(block, 0xff));
    let load = worker.start_load(SAVED);
    worker.wait(load);
    let loaded: Vec<_> = (0..SAVED).map(|block| worker.read(block)).collect();
    for (block, loaded) in loaded.iter().enumerate() {
        worker.fill(block as u32, block as u8);
        assert!(worker.read(block as u32) == *loaded, "block {block}");
    }
    assert_eq!(desk.field(&["warm", "--look"], "number"), 1);
    // Out again, but for what a request holds; and back.
    assert_eq!(worker.lookup(SAVED).expect("answers").dram_blocks, SAVED);
    assert_eq!(desk.field(&["evict", "--all"], "kept_blocks"), SAVED);
    worker.client.close(PATIENCE);
    until("its leases are over", || desk.field(&["evict", "--namespace", &id[..12]], "kept_blocks") == 0);
    assert_eq!(in_dram(&desk), 0);
    assert_eq!(desk.field(&["warm"], "read_blocks"), SAVED);
    let (code, told) = desk.run(&["warm", "--namespace", &"0".repeat(64)]);
    assert_eq!((code, &told["error"]["kind"]), (Some(3), &"NotFound".into()), "{told:#}");
    stop(server, &worker);
}

#[test]
fn pinned_blocks_stay_in_dram_until_the_pin_ends_and_are_seen() {
    let desk = Desk::new();
    let (server, mut worker) = desk.server(&[]);
    save(&mut worker);
    let (code, told) = desk.run(&["pin", "--all", "--ttl", "1h"]);
    assert_eq!((code, &told["blocks"]), (Some(0), &SAVED.into()), "{told:#}");
    let evict = || desk.field(&["evict", "--all"], "kept_blocks");
    assert_eq!((evict(), in_dram(&desk)), (SAVED.into(), SAVED.into()), "a pinned block has left");
    let pins = desk.field(&["ls"], "pins");
    assert!(pins[0]["left_ms"].as_u64().is_some_and(|ms| ms > 3_000_000 && ms <= 3_600_000), "{pins:#}");
    let engine = desk.field(&["status"], "engine");
    assert_eq!((&engine["dram_pins"], &engine["dram_pinned_blocks"]), (&1.into(), &SAVED.into()), "{engine:#}");
    assert_eq!(desk.field(&["unpin", "1"], "blocks"), SAVED);
    assert_eq!((evict(), in_dram(&desk)), (0.into(), 0.into()));
    // Those that the drive has come back for a pin, and leave it at its time.
    let pin = desk.field(&["warm", "--all", "--pin", "--ttl", "2s"], "pin");
    assert_eq!((&pin["number"], &pin["blocks"]), (&2.into(), &SAVED.into()), "{pin:#}");
    assert_eq!(evict(), SAVED);
    until("its time is up", || desk.field(&["ls"], "pins") == Value::Array(Vec::new()));
    assert_eq!(evict(), 0);
    stop(server, &worker);
}

#[test]
fn a_namespace_that_nobody_uses_is_purged_by_its_age() {
    let desk = Desk::new();
    let (server, mut worker) = desk.server(&[]);
    save(&mut worker);
    let purge = |time| desk.run(&["purge", "--all", "--yes", "--older-than", time]);
    let (code, told) = purge("1h");
    assert_eq!((code, &told["error"]["kind"]), (Some(3), &"NotFound".into()), "the server runs for less: {told:#}");
    assert_eq!(worker.lookup(SAVED).expect("answers").hit_blocks, SAVED);
    let (code, told) = purge("1h");
    assert_eq!((code, &told["error"]["kind"]), (Some(3), &"NotFound".into()), "{told:#}");
    // The server looks once more itself.
    let id = Worker::spec().namespace.id();
    let refused = worker.client.purge(&id, Some(PATIENCE), PATIENCE).expect_err("used just now");
    assert_eq!(refused.kind(), ErrorKind::Busy, "{refused}");
    until("nobody uses it", || purge("2s").0 == Some(0));
    assert_eq!(worker.lookup(SAVED).expect("answers").hit_blocks, 0);
    stop(server, &worker);
}

#[test]
fn a_bench_leaves_nothing_behind_and_what_was_cached_stays() {
    let desk = Desk::new();
    let (server, mut worker) = desk.server(&[]);
    save(&mut worker);
    let (code, told) = desk.run(&["bench", "--bytes", "2MiB", "--block", "256KiB"]);
    assert_eq!((code, &told["wrong_bytes"], &told["lookup_keys"]), (Some(0), &0.into(), &8.into()), "{told:#}");
    let namespaces = desk.field(&["ls"], "namespaces");
    assert_eq!(namespaces.as_array().map(Vec::len), Some(1), "{namespaces:#}");
    assert_eq!(worker.lookup(SAVED).expect("answers").hit_blocks, SAVED);
    stop(server, &worker);
}
