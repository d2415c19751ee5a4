//! What a host can do to a server: full, broken and odd file systems, limits, forbidden system calls. All of it is real, in
//! child processes; what needs rights that this process lacks is skipped, and says so.
#![expect(clippy::expect_used, reason = "a test that cannot go on has failed")]

mod support;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use pegaflow_engine::SaveOutcome;
use pegaflow_server::client::{CompletionResult, Endpoint};
use support::{PATIENCE, Process, Worker, until};

/// A server whose log can be read.
struct Server {
    process: Process,
    directory: tempfile::TempDir,
    http: String,
    /// What is mounted for it lies here.
    _mounts: Option<tempfile::TempDir>,
}

/// `pegaflow-server` with a store of 64 MiB, behind other words if there are any.
fn command(before: &[&str], directory: &Path, store: &Path) -> Command {
    let mut words: Vec<String> = before.iter().map(|word| (*word).to_owned()).collect();
    words.push(env!("CARGO_BIN_EXE_pegaflow-server").into());
    let mut command = Command::new(words.remove(0));
    command.args(words).args(["--capacity", "64MiB", "--region", "4MiB", "--dram", "32MiB", "--http", "127.0.0.1:0"]);
    command.arg("--socket").arg(directory.join("p.sock")).arg("--path").arg(store);
    command.stdin(Stdio::null()).stdout(Stdio::piped());
    command
}

impl Server {
    fn start(before: &[&str], store: Option<&Path>) -> Self {
        let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a directory");
        let store = store.map_or_else(|| directory.path().join("store"), PathBuf::from);
        let log = std::fs::File::create(directory.path().join("log")).expect("a log");
        let mut command = command(before, directory.path(), &store);
        let mut child = command.stderr(log).spawn().expect("starts");
        let mut line = String::new();
        let stdout = child.stdout.take().expect("piped");
        std::io::BufRead::read_line(&mut std::io::BufReader::new(stdout), &mut line).expect("reads");
        let server = Self { process: Process { child }, directory, http: String::new(), _mounts: None };
        let ready: serde_json::Value =
            serde_json::from_str(&line).unwrap_or_else(|error| panic!("{error}: {line}{}", server.log()));
        Self { http: ready["http"].as_str().expect("an address").to_owned(), ..server }
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.directory.path().join("log")).expect("a log")
    }

    /// Warnings and errors that have these words.
    fn complaints(&self, words: &str) -> usize {
        let is_complaint = |line: &&str| line.contains("WARN") || line.contains("ERROR");
        self.log().lines().filter(is_complaint).filter(|line| line.contains(words)).count()
    }

    fn get(&self, path: &str) -> String {
        let mut stream = TcpStream::connect(&self.http).expect("connects");
        stream.set_read_timeout(Some(PATIENCE)).expect("set");
        write!(stream, "GET {path} HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n").expect("writes");
        let mut text = String::new();
        stream.read_to_string(&mut text).expect("reads");
        text
    }

    fn has_metric(&self, line: &str) -> bool {
        self.get("/metrics").lines().any(|found| found == line)
    }

    fn worker(&self) -> Worker {
        let worker = Worker::new(Endpoint::Unix(self.directory.path().join("p.sock")));
        worker.register();
        worker.client.wait_connected(PATIENCE).expect("connects");
        worker
    }

    /// Saves, and reads back what was saved.
    fn assert_serves(&self, worker: &mut Worker, seed: u8) {
        worker.fill(0, seed);
        let operation = worker.start_save(8).expect("accepted");
        let CompletionResult::Save(SaveOutcome { saved, present, .. }) = worker.wait(operation) else {
            panic!("a save")
        };
        assert_eq!(saved + present, 8);
        let operation = worker.start_load(8);
        let CompletionResult::Load(loaded) = worker.wait(operation) else { panic!("a load") };
        assert!(loaded.failed.is_empty(), "{loaded:?}");
    }

    fn assert_ready(&self) {
        let ready = self.get("/ready");
        assert!(ready.starts_with("HTTP/1.1 200"), "{ready}{}", self.log());
    }

    /// Waits until it is in DRAM only for this reason, and sees that everything says so and that it serves.
    fn assert_degraded(&self, worker: &mut Worker, reason: &str) {
        let metric = format!("pegaflow_nvme_degraded{{reason=\"{reason}\"}} 1");
        until(&metric, || self.has_metric(&metric));
        let ready = self.get("/ready");
        assert!(ready.starts_with("HTTP/1.1 503") && ready.contains(reason) && ready.contains("DRAM only"), "{ready}");
        until("its line", || self.complaints("degraded: blocks live in DRAM only") > 0);
        assert_eq!(self.complaints("degraded: blocks live in DRAM only"), 1, "{}", self.log());
        self.assert_serves(worker, 99);
        assert!(self.get("/health").starts_with("HTTP/1.1 200"));
    }
}

fn limited(options: &[&'static str]) -> Vec<&'static str> {
    let launcher = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/support/limited.py");
    ["python3", launcher].iter().chain(options).chain(&["--"]).copied().collect()
}

#[test]
fn io_uring_forbidden_by_seccomp_is_replaced_with_one_warning() {
    let server = Server::start(&limited(&["--no-io-uring"]), None);
    let mut worker = server.worker();
    server.assert_serves(&mut worker, 1);
    server.assert_ready();
    assert_eq!(server.complaints("io_uring is not used"), 1, "{}", server.log());
    assert!(server.get("/metrics").contains("io_engine=\"psync\""));
    worker.client.flush(PATIENCE).expect("durable");
}

#[test]
fn a_low_limit_on_locked_memory_costs_one_warning() {
    let server = Server::start(&limited(&["--memlock", "65536"]), None);
    let mut worker = server.worker();
    server.assert_serves(&mut worker, 1);
    worker.client.flush(PATIENCE).expect("durable");
    server.assert_ready();
    let metrics = server.get("/metrics");
    if metrics.contains("io_engine=\"io_uring\"") {
        let complaints = server.complaints("the arena is not registered as a whole");
        assert!(complaints <= 1, "{}", server.log());
        println!("io_uring with {complaints} complaints");
    } else {
        assert_eq!(server.complaints("io_uring is not used"), 1, "{}", server.log());
    }
}

#[test]
fn a_limit_on_file_sizes_that_is_met_while_running_does_not_kill() {
    let server = Server::start(&[], None);
    let mut worker = server.worker();
    server.assert_serves(&mut worker, 1);
    worker.client.flush(PATIENCE).expect("durable");
    let limit = |bytes: &str| {
        let pid = server.process.child.id().to_string();
        let limit = format!("--fsize={bytes}:unlimited");
        Command::new("prlimit").args(["--pid", &pid, &limit]).status()
    };
    match limit("4096") {
        Ok(status) if status.success() => {}
        other => return println!("skipped: prlimit does not work here: {other:?}"),
    }
    let operation = worker.start_save(16).expect("accepted");
    worker.wait(operation);
    server.assert_degraded(&mut worker, "no_space");
    assert_eq!(server.complaints("the drive takes no writes: the store"), 1, "{}", server.log());
    assert!(limit("unlimited").expect("prlimit").success());
    until("the store comes back", || server.has_metric("pegaflow_nvme_reopens_total 1"));
    server.assert_ready();
    worker.client.flush(PATIENCE).expect("durable");
}

#[test]
fn a_limit_on_file_sizes_is_an_error_at_the_start() {
    let place = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a directory");
    let store = place.path().join("store");
    let limited = limited(&["--fsize", "41943040"]);
    let output = command(&limited, place.path(), &store).stderr(Stdio::piped()).output().expect("runs");
    let error = String::from_utf8(output.stderr).expect("UTF-8");
    assert_eq!(output.status.code(), Some(1), "{error}");
    let last = error.lines().last().unwrap_or_default();
    assert!(last.contains("larger than a file may be here") && last.contains("ulimit -f"), "{error}");
    assert!(!store.join("VERSION").exists() && !store.join("regions.0").exists(), "nothing is left behind");
}

/// A shell of its own mounts, where that is allowed; the server sees the mount, and so do we through `/proc`.
fn mounted(script: &str) -> Option<(Server, PathBuf)> {
    let place = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a directory");
    let script = format!("set -e; cd {}; mkdir -p m; {script}; exec \"$@\"", place.path().display());
    let probe = Command::new("unshare").args(["-m", "sh", "-c", &script, "sh", "true"]).output();
    if !probe.as_ref().is_ok_and(|output| output.status.success()) {
        println!("skipped: mounts are not allowed here: {probe:?}");
        return None;
    }
    let server = Server::start(&["unshare", "-m", "sh", "-c", &script, "sh"], Some(&place.path().join("m/store")));
    let seen = PathBuf::from(format!("/proc/{}/root{}", server.process.child.id(), place.path().join("m").display()));
    Some((Server { _mounts: Some(place), ..server }, seen))
}

const EXT4: &str = "truncate -s 256M image; mkfs.ext4 -q -F -m 0 image; mount -o loop,errors=remount-ro image m";

#[test]
fn a_full_file_system_is_an_error_at_the_start() {
    let place = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a directory");
    let script = format!("mount -t tmpfs -o size=16m none {}; exec \"$@\"", place.path().display());
    let store = place.path().join("store");
    let mut command = command(&["unshare", "-m", "sh", "-c", &script, "sh"], place.path(), &store);
    let output = command.stderr(Stdio::piped()).output().expect("runs");
    let error = String::from_utf8(output.stderr).expect("UTF-8");
    if error.contains("Operation not permitted") || error.contains("permission denied") {
        return println!("skipped: mounts are not allowed here: {error}");
    }
    assert_eq!(output.status.code(), Some(1), "{error}");
    assert!(error.lines().last().is_some_and(|line| line.contains("free") && line.contains("capacity")), "{error}");
}

#[test]
fn a_file_system_that_fills_up_ends_in_dram_only_until_there_is_room() {
    let Some((server, mount)) = mounted(EXT4) else { return };
    let mut worker = server.worker();
    server.assert_serves(&mut worker, 1);
    let filler = mount.join("filler");
    let full = std::fs::File::create(&filler).and_then(|mut file| std::io::copy(&mut std::io::repeat(1), &mut file));
    assert!(full.is_err(), "the file system is full");
    // A namespace of its own has to be written down.
    let other = Worker::new(Endpoint::Unix(server.directory.path().join("p.sock")));
    let mut spec = Worker::spec();
    (spec.instance, spec.namespace) =
        (pegaflow_engine::InstanceId("other".into()), spec.namespace.with("filler", "x".repeat(60_000)));
    other.client.register(spec, other.memory()).expect("taken");
    server.assert_degraded(&mut worker, "no_space");
    let first = ["a namespace could not be written: the store", "the index took no commit: the store"];
    assert_eq!(first.map(|line| server.complaints(line)).iter().sum::<usize>(), 1, "{}", server.log());
    until("it is tried again", || !server.has_metric("pegaflow_nvme_failed_reopens_total 0"));
    assert!(!server.has_metric("pegaflow_nvme_capacity_bytes 0"), "what is on the drive can still be read");
    std::fs::remove_file(&filler).expect("room again");
    until("the store comes back", || server.has_metric("pegaflow_nvme_reopens_total 1"));
    server.assert_ready();
    worker.client.flush(PATIENCE).expect("durable");
}

#[test]
fn a_file_system_that_turns_read_only_ends_in_dram_only() {
    let Some((server, mount)) = mounted(EXT4) else { return };
    let mut worker = server.worker();
    server.assert_serves(&mut worker, 1);
    worker.client.flush(PATIENCE).expect("durable");
    let device = rustix::fs::stat(&mount).expect("there").st_dev;
    let link =
        std::fs::read_link(format!("/sys/dev/block/{}:{}", device >> 8 & 0xfff, device & 0xff)).expect("a device");
    let name = link.file_name().expect("a name").to_string_lossy().into_owned();
    // What the kernel does by itself when it finds a damaged file system.
    let trigger = std::fs::write(format!("/sys/fs/ext4/{name}/trigger_fs_error"), "a test of this");
    if let Err(error) = trigger {
        return println!("skipped: no error can be triggered: {error}");
    }
    let operation = worker.start_save(32).expect("accepted");
    worker.wait(operation);
    until("the store fails", || server.get("/ready").starts_with("HTTP/1.1 503"));
    let reason = server.get("/ready");
    println!("{reason}");
    assert!(reason.contains("read_only") || reason.contains("io_error"), "{reason}");
    server.assert_serves(&mut worker, 2);
    until("it is tried again", || !server.has_metric("pegaflow_nvme_failed_reopens_total 0"));
}

#[test]
fn on_tmpfs_it_works_and_says_whether_the_page_cache_is_used() {
    let Some((server, _)) = mounted("mount -t tmpfs -o size=256m none m") else { return };
    let mut worker = server.worker();
    server.assert_serves(&mut worker, 1);
    worker.client.flush(PATIENCE).expect("durable");
    server.assert_ready();
    let is_direct = server.has_metric("pegaflow_nvme_direct_io 1");
    assert_eq!(server.complaints("no direct I/O") == 0, is_direct, "{}", server.log());
    println!("direct I/O: {is_direct}");
}
