//! The server and an engine, each in a container of its own: PID and IPC namespaces, a /dev/shm of 64 MiB, little lockable
//! memory, no io_uring, a root that cannot be written, no rights. Each is supported without a word, costs one line, or is
//! refused with the remedy. Where namespaces cannot be made the tests are skipped, and say so.
#![expect(clippy::expect_used, reason = "a test that cannot go on has failed")]

mod support;

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use pegaflow_engine::{LoadOutcome, SaveOutcome};
use pegaflow_server::client::{ClientConfig, CompletionResult, Endpoint};
use support::host::{Server, command, limited};
use support::{BLOCKS, PATIENCE, Worker, until};

/// More than a container's /dev/shm has.
const DRAM: &str = "96MiB";
const COUNT: u32 = BLOCKS / 2;
/// Users of the containers when the test is root: nobody, and somebody else.
const NOBODY: u32 = 65_534;
const SOMEBODY: u32 = 65_533;
/// The one line on little lockable memory.
const MEMLOCK: &str = "the arena is not registered as a whole";
/// What the engine in a container is told.
const SOCKET: &str = "PEGAFLOW_TEST_SOCKET";
const ERRAND: &str = "PEGAFLOW_TEST_ERRAND";

/// Namespaces of its own for PIDs, IPC and mounts, a /dev/shm of 64 MiB, and what else is asked for.
#[derive(Clone, Copy, Default)]
struct Container {
    /// Its root can only be read, and it runs as this user if the test is root; otherwise as the user of the test.
    user: Option<u32>,
    /// Options of `limited.py`.
    limits: &'static [&'static str],
}

const HARDENED: Container = Container { user: Some(NOBODY), limits: &[] };

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

impl Container {
    /// The words before a command that runs in it; `writable` are its volumes.
    fn words(&self, writable: &[&Path]) -> Vec<String> {
        let mut script = "set -e; mount -t tmpfs -o size=64m none /dev/shm; ".to_owned();
        if self.user.is_some() {
            for path in writable.iter().map(|path| path.display()) {
                script += &format!("mount --bind {path} {path}; ");
            }
            script += "mount -o remount,bind,ro /; ! touch /probe 2>/dev/null; ";
        }
        let mut words = vec!["unshare", "--mount", "--pid", "--ipc", "--fork", "--kill-child", "--mount-proc"];
        if !is_root() {
            words.extend(["--user", "--map-root-user"]);
        }
        script += "exec \"$@\"";
        words.extend(["sh", "-c", &script, "sh"]);
        let mut words: Vec<String> = words.into_iter().map(str::to_owned).collect();
        words.extend(limited(self.limits).into_iter().map(str::to_owned));
        if let Some(user) = self.user.filter(|_| is_root()) {
            writable.iter().for_each(|path| std::os::unix::fs::chown(path, Some(user), Some(user)).expect("ours"));
            let [user, group] = [format!("--reuid={user}"), format!("--regid={user}")];
            words.extend(["setpriv".into(), user, group, "--clear-groups".into()]);
        }
        words
    }

    /// Whether there can be such a container.
    fn is_possible(&self) -> bool {
        let place = directory();
        let words = self.words(&[place.path()]);
        let probe = Command::new(&words[0]).args(&words[1..]).args(["touch"]).arg(place.path().join("probe")).output();
        let is_possible = probe.as_ref().is_ok_and(|probe| probe.status.success());
        if !is_possible {
            println!("skipped: no such container can be made here: {probe:?}");
        }
        is_possible
    }

    fn start(self, store: &Path) -> Contained {
        let directory = directory();
        let volume = store.parent().expect("a volume");
        let words = self.words(&[directory.path(), volume]);
        let server = Server::start_in(directory, &words, store, DRAM);
        assert_eq!(server.ready["pid"], 1, "the server is the first process of its container");
        let launcher = server.process.child.id();
        let children = std::fs::read_to_string(format!("/proc/{launcher}/task/{launcher}/children")).expect("reads");
        Contained { server, pid: children.trim().to_owned() }
    }

    /// An engine in a container like this runs the errand at the server's socket.
    fn engine(self, server: &Server, errand: &str) -> Output {
        let words = self.words(&[]);
        let mut command = Command::new(&words[0]);
        command.args(&words[1..]).arg(std::env::current_exe().expect("this program"));
        command.args(["--ignored", "--exact", "an_engine_in_a_container", "--nocapture"]);
        command.env(SOCKET, server.socket()).env(ERRAND, errand).stdin(Stdio::null());
        command.output().expect("runs")
    }

    fn assert_engine(self, server: &Server, errand: &str) {
        let told = self.engine(server, errand);
        assert!(told.status.success(), "{errand}: {told:?}\n{}", server.log());
    }
}

/// A server in a container.
struct Contained {
    server: Server,
    /// Its process, as seen from here.
    pid: String,
}

impl Contained {
    fn signal(&self, name: &str) -> bool {
        Command::new("kill").args([name, &self.pid]).stderr(Stdio::null()).status().expect("kill").success()
    }

    /// As a container runtime stops it.
    fn stop(mut self) {
        assert!(self.signal("-TERM"));
        assert_eq!(self.server.process.wait_exit(), Some(0), "{}", self.server.log());
    }
}

impl Drop for Contained {
    fn drop(&mut self) {
        // Else it would outlive its launcher. If that has been waited for, there is no such process any more.
        if matches!(self.server.process.child.try_wait(), Ok(None)) {
            self.signal("-KILL");
        }
    }
}

/// On a real file system, in a place that every user can reach.
fn directory() -> tempfile::TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a directory")
}

#[test]
#[ignore = "the other tests run it, as an engine"]
fn an_engine_in_a_container() {
    let (Some(socket), Ok(errand)) = (std::env::var_os(SOCKET), std::env::var(ERRAND)) else { return };
    assert_eq!(std::process::id(), 1, "a PID namespace of its own");
    let mut config = ClientConfig::new(Endpoint::Unix(PathBuf::from(socket)), "contained");
    (config.lookup_timeout, config.rpc_timeout) = (PATIENCE, PATIENCE);
    let mut worker = Worker::with(config);
    worker.register();
    let patience = if errand == "be refused" { Duration::from_secs(3) } else { PATIENCE };
    worker.client.wait_connected(patience).expect("connects and registers");
    (0..COUNT).for_each(|block| worker.fill(block, block as u8));
    if errand == "save" {
        let operation = worker.start_save(COUNT).expect("accepted");
        let saved = SaveOutcome { saved: COUNT, present: 0, dropped: 0 };
        assert_eq!(worker.wait(operation), CompletionResult::Save(saved));
    }
    assert_eq!(worker.lookup(COUNT).expect("answers").hit_blocks, COUNT);
    let operation = worker.start_load(COUNT);
    let CompletionResult::Load(LoadOutcome { loaded_dram, loaded_nvme, failed }) = worker.wait(operation) else {
        panic!("a load")
    };
    assert_eq!((loaded_dram + loaded_nvme, failed), (COUNT, vec![]));
    for block in 0..COUNT {
        assert!(worker.read(block) == worker.read(BLOCKS - COUNT + block), "block {block}");
    }
}

/// An engine in a container saves and loads, and one that comes after a restart of the server loads what that saved.
fn serves_and_restarts(container: Container, complaints: &[&str]) {
    if !container.is_possible() {
        return;
    }
    let volume = directory();
    let store = volume.path().join("store");
    for errand in ["save", "find"] {
        let server = container.start(&store);
        container.assert_engine(&server.server, errand);
        server.server.assert_ready();
        for complaint in complaints {
            assert_eq!(server.server.complaints(complaint), 1, "{complaint}: {}", server.server.log());
        }
        // How much may be locked is the host's affair where the container does not say it.
        let others = server.server.complaints("") - server.server.complaints(MEMLOCK);
        assert_eq!(others, complaints.len(), "no other: {}", server.server.log());
        server.stop();
    }
}

#[test]
fn pid_and_ipc_namespaces_and_a_small_dev_shm_are_supported() {
    serves_and_restarts(Container::default(), &[]);
}

#[test]
fn a_read_only_root_and_a_user_without_rights_are_supported() {
    serves_and_restarts(HARDENED, &[]);
}

#[test]
fn with_little_lockable_memory_and_no_io_uring_it_costs_one_line() {
    let limits = &["--memlock", "65536", "--no-io-uring"];
    serves_and_restarts(Container { limits, ..HARDENED }, &["io_uring is not used"]);
}

#[test]
fn with_little_lockable_memory_it_costs_at_most_one_line() {
    let container = Container { limits: &["--memlock", "65536"], ..HARDENED };
    if !container.is_possible() {
        return;
    }
    let volume = directory();
    let server = container.start(&volume.path().join("store"));
    container.assert_engine(&server.server, "save");
    server.server.assert_ready();
    // Which one depends on the kernel: whether rings themselves count as locked memory.
    let lines = [MEMLOCK, "io_uring is not used"];
    assert_eq!(lines.map(|line| server.server.complaints(line)).iter().sum::<usize>(), 1, "{}", server.server.log());
    assert_eq!(server.server.complaints(""), 1, "no other: {}", server.server.log());
    server.stop();
}

#[test]
fn an_engine_of_another_user_is_refused_with_the_remedy() {
    if !is_root() {
        return println!("skipped: only root can run processes as two users");
    }
    if !HARDENED.is_possible() {
        return;
    }
    let volume = directory();
    let server = HARDENED.start(&volume.path().join("store"));
    // The socket itself keeps others out; here somebody has opened it to all.
    open_to_all(&server.server);
    let told = Container { user: Some(SOMEBODY), ..HARDENED }.engine(&server.server, "be refused");
    let text = String::from_utf8_lossy(&told.stderr).into_owned();
    assert!(!told.status.success() && text.contains("start it as the same user"), "{text}");
    HARDENED.assert_engine(&server.server, "save");
    server.stop();
}

fn open_to_all(server: &Server) {
    use std::os::unix::fs::PermissionsExt;
    for path in [server.directory.path().to_owned(), server.socket()] {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o777)).expect("ours");
    }
}

/// As before Linux 6.5: the server could not learn when the engine's process ends, and may not lend it memory.
#[test]
fn an_engine_that_the_server_cannot_watch_is_refused_with_the_remedy() {
    let container = Container { limits: &["--no-peer-pidfd"], ..Container::default() };
    if !container.is_possible() {
        return;
    }
    let volume = directory();
    let server = container.start(&volume.path().join("store"));
    let told = container.engine(&server.server, "be refused");
    let text = String::from_utf8_lossy(&told.stderr).into_owned();
    for part in ["another PID namespace", "Linux 6.5", "give both the same PID namespace"] {
        assert!(!told.status.success() && text.contains(part), "{part} is not in {text}");
    }
    let line = "the arena was not handed over";
    until("the server says so", || server.server.complaints(line) > 0);
    assert_eq!(server.server.complaints(line), 1, "and is not asked again: {}", server.server.log());
    server.stop();
}

#[test]
fn a_store_or_socket_where_nothing_can_be_written_is_refused_with_the_remedy() {
    if !HARDENED.is_possible() {
        return;
    }
    let (volume, outside) = (directory(), directory());
    let [inside, outside] = [volume.path(), outside.path()];
    for (sockets, store, remedy) in [(inside, outside, "give a directory that user"), (outside, inside, "--socket")] {
        let words = HARDENED.words(&[inside]);
        let mut command = command(&words, &sockets.join("run"), &store.join("store"), DRAM);
        let output = command.stderr(Stdio::piped()).output().expect("runs");
        let text = String::from_utf8(output.stderr).expect("UTF-8");
        assert_eq!(output.status.code(), Some(4), "{text}");
        let last = text.lines().last().unwrap_or_default();
        assert!(last.contains(remedy), "{remedy} is not in {last}");
    }
}
