//! What a host can do to a server: full, broken and odd file systems, limits, forbidden system calls. All of it is real, in
//! child processes; what needs rights that this process lacks is skipped, and says so.
#![expect(clippy::expect_used, reason = "a test that cannot go on has failed")]

mod support;

use std::path::PathBuf;
use std::process::{Command, Stdio};

use pegaflow_server::client::Endpoint;
use support::host::{Server, command, limited};
use support::{PATIENCE, Worker, until};

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
    let output = command(&limited, place.path(), &store, "32MiB").stderr(Stdio::piped()).output().expect("runs");
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
    Some((Server { mounts: Some(place), ..server }, seen))
}

const EXT4: &str = "truncate -s 256M image; mkfs.ext4 -q -F -m 0 image; mount -o loop,errors=remount-ro image m";

#[test]
fn a_full_file_system_is_an_error_at_the_start() {
    let place = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a directory");
    let script = format!("mount -t tmpfs -o size=16m none {}; exec \"$@\"", place.path().display());
    let store = place.path().join("store");
    let mut command = command(&["unshare", "-m", "sh", "-c", &script, "sh"], place.path(), &store, "32MiB");
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
    let other = Worker::new(Endpoint::Unix(server.socket()));
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
