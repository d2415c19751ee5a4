//! A server process behind other words (a shell that mounts, a launcher that takes rights away), whose log and metrics are
//! looked at.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use pegaflow_engine::SaveOutcome;
use pegaflow_server::client::{CompletionResult, Endpoint};

use super::{PATIENCE, Process, Worker, until};

/// A server whose log can be read.
pub(crate) struct Server {
    pub(crate) process: Process,
    pub(crate) directory: tempfile::TempDir,
    /// What it said when it was ready.
    pub(crate) ready: serde_json::Value,
    pub(crate) http: String,
    /// What is mounted for it lies here.
    pub(crate) mounts: Option<tempfile::TempDir>,
}

/// `pegaflow-server` with a store of 64 MiB, behind other words if there are any.
pub(crate) fn command(before: &[impl AsRef<str>], directory: &Path, store: &Path, dram: &str) -> Command {
    let mut words: Vec<String> = before.iter().map(|word| word.as_ref().to_owned()).collect();
    words.push(env!("CARGO_BIN_EXE_pegaflow-server").into());
    let mut command = Command::new(words.remove(0));
    command.args(words).args(["--capacity", "64MiB", "--region", "4MiB", "--dram", dram, "--http", "127.0.0.1:0"]);
    command.arg("--socket").arg(directory.join("p.sock")).arg("--path").arg(store);
    command.stdin(Stdio::null()).stdout(Stdio::piped());
    command
}

impl Server {
    pub(crate) fn start(before: &[&str], store: Option<&Path>) -> Self {
        let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a directory");
        let store = store.map_or_else(|| directory.path().join("store"), PathBuf::from);
        Self::start_in(directory, before, &store, "32MiB")
    }

    /// Its socket and its log are in `directory`.
    pub(crate) fn start_in(directory: tempfile::TempDir, before: &[impl AsRef<str>], store: &Path, dram: &str) -> Self {
        let log = std::fs::File::create(directory.path().join("log")).expect("a log");
        let mut command = command(before, directory.path(), store, dram);
        let mut child = command.stderr(log).spawn().expect("starts");
        let mut line = String::new();
        let stdout = child.stdout.take().expect("piped");
        std::io::BufRead::read_line(&mut std::io::BufReader::new(stdout), &mut line).expect("reads");
        let (process, http, ready) = (Process { child }, String::new(), serde_json::Value::Null);
        let server = Self { process, directory, ready, http, mounts: None };
        let ready: serde_json::Value =
            serde_json::from_str(&line).unwrap_or_else(|error| panic!("{error}: {line}{}", server.log()));
        Self { http: ready["http"].as_str().expect("an address").to_owned(), ready, ..server }
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.directory.path().join("p.sock")
    }

    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(self.directory.path().join("log")).expect("a log")
    }

    /// Warnings and errors that have these words.
    pub(crate) fn complaints(&self, words: &str) -> usize {
        let is_complaint = |line: &&str| line.contains("WARN") || line.contains("ERROR");
        self.log().lines().filter(is_complaint).filter(|line| line.contains(words)).count()
    }

    pub(crate) fn get(&self, path: &str) -> String {
        let mut stream = TcpStream::connect(&self.http).expect("connects");
        stream.set_read_timeout(Some(PATIENCE)).expect("set");
        write!(stream, "GET {path} HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n").expect("writes");
        let mut text = String::new();
        stream.read_to_string(&mut text).expect("reads");
        text
    }

    pub(crate) fn has_metric(&self, line: &str) -> bool {
        self.get("/metrics").lines().any(|found| found == line)
    }

    pub(crate) fn worker(&self) -> Worker {
        let worker = Worker::new(Endpoint::Unix(self.socket()));
        worker.register();
        worker.client.wait_connected(PATIENCE).expect("connects");
        worker
    }

    /// Saves, and reads back what was saved.
    pub(crate) fn assert_serves(&self, worker: &mut Worker, seed: u8) {
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

    pub(crate) fn assert_ready(&self) {
        let ready = self.get("/ready");
        assert!(ready.starts_with("HTTP/1.1 200"), "{ready}{}", self.log());
    }

    /// Waits until it is in DRAM only for this reason, and sees that everything says so and that it serves.
    pub(crate) fn assert_degraded(&self, worker: &mut Worker, reason: &str) {
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

/// The words before a command that has less than it would like.
pub(crate) fn limited(options: &[&'static str]) -> Vec<&'static str> {
    let launcher = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/support/limited.py");
    ["python3", launcher].iter().chain(options).chain(&["--"]).copied().collect()
}
