//! The vLLM that computes the prompts: a Python process, asked by lines of JSON. Every wait has a bound, and the process
//! ends with this one.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use pegaflow_engine::{Error, ErrorKind, Result};
use serde::Deserialize;
use serde_json::{Value, json};

/// What is shown of its log when it has failed.
const LOG_LINES: usize = 30;
/// How often it is looked whether somebody asked to stop.
const LOOK: Duration = Duration::from_millis(200);
/// How long it may take to end in order.
const END_TIMEOUT: Duration = Duration::from_secs(60);
/// A reply names every prompt of a batch.
const REPLY_BYTES_MAX: u64 = 64 << 20;

/// How it is started.
#[derive(Debug)]
pub(super) struct RunnerConfig<'a> {
    /// The interpreter of the environment with vLLM and PegaFlow.
    pub(super) python: &'a Path,
    /// The connector's own settings.
    pub(super) extra: &'a Value,
    /// The model and its options, as of `vllm serve`.
    pub(super) vllm: &'a [String],
    /// How long it may take to load the model.
    pub(super) start_timeout: Duration,
    /// How long it may take for one batch.
    pub(super) batch_timeout: Duration,
    /// Where its log goes; made anew.
    pub(super) log: &'a Path,
    /// Show what it logs.
    pub(super) is_verbose: bool,
}

/// What became of one prompt.
#[derive(Debug, Clone, Deserialize)]
pub(super) struct Done {
    /// Its place in the batch.
    pub(super) id: usize,
    #[serde(default)]
    pub(super) tokens: u64,
    #[serde(default)]
    pub(super) cached: u64,
    pub(super) error: Option<String>,
}

/// What became of a batch. Blocks are counted in all workers.
#[derive(Debug, Clone, Default, Deserialize)]
pub(super) struct BatchDone {
    pub(super) done: Vec<Done>,
    pub(super) saved: u64,
    pub(super) present: u64,
    pub(super) dropped: u64,
}

/// A running vLLM.
pub(super) struct Runner {
    child: Child,
    requests: Option<ChildStdin>,
    replies: Receiver<std::io::Result<String>>,
    log: Arc<Mutex<VecDeque<String>>>,
    log_path: PathBuf,
    batch_timeout: Duration,
    stop: Arc<AtomicBool>,
    /// What it said of itself when it was ready.
    pub(super) about: Value,
}

impl Runner {
    /// Starts it and waits until the model is loaded. `stop` ends every wait.
    ///
    /// # Errors
    /// `NotFound` without an interpreter, `Io` with the end of its log if it ends, `Timeout`, `Closed` when stopped.
    pub(super) fn start(config: &RunnerConfig<'_>, stop: Arc<AtomicBool>) -> Result<Self> {
        let mut command = Command::new(config.python);
        command.args(["-m", "pegaflow.prewarm", &config.extra.to_string()]).args(config.vllm);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0);
        let mut child = command.spawn().map_err(|error| {
            let what = format!("cannot start {}; give --python, the interpreter of vLLM", config.python.display());
            Error::from_io(what, error)
        })?;
        let log_error = |error| Error::from_io(format!("the log {}", config.log.display()), error);
        let mut log_file = File::create(config.log).map_err(log_error)?;
        let (sender, replies) = sync_channel(4);
        let log = Arc::new(Mutex::new(VecDeque::new()));
        if let Some(output) = child.stdout.take() {
            std::thread::spawn(move || {
                let mut output = BufReader::new(output);
                loop {
                    let mut line = String::new();
                    let read = (&mut output).take(REPLY_BYTES_MAX).read_line(&mut line);
                    let is_end = !matches!(read, Ok(bytes) if bytes > 0);
                    if sender.send(read.map(|_| line)).is_err() || is_end {
                        break;
                    }
                }
            });
        }
        if let Some(errors) = child.stderr.take() {
            let (log, is_verbose) = (Arc::clone(&log), config.is_verbose);
            std::thread::spawn(move || {
                for line in BufReader::new(errors).lines().map_while(std::io::Result::ok) {
                    if is_verbose {
                        eprintln!("{line}");
                    }
                    // A log that cannot be written is no reason to stop.
                    writeln!(log_file, "{line}").ok();
                    let mut log = log.lock();
                    log.push_back(line);
                    if log.len() > LOG_LINES {
                        log.pop_front();
                    }
                }
            });
        }
        let requests = child.stdin.take();
        let batch_timeout = config.batch_timeout;
        let mut runner = Self {
            child,
            requests,
            replies,
            log,
            log_path: config.log.to_owned(),
            batch_timeout,
            stop,
            about: Value::Null,
        };
        let first = runner.reply(config.start_timeout, "load the model")?;
        match first.get("ready") {
            Some(about) => runner.about = about.clone(),
            None => return Err(runner.failed("said nothing of being ready")),
        }
        Ok(runner)
    }

    /// Computes a batch; returns when its saves have ended.
    ///
    /// # Errors
    /// As of [`Runner::start`].
    pub(super) fn run(&mut self, prompts: &[Value]) -> Result<BatchDone> {
        let line = format!("{}\n", json!({ "run": prompts }));
        let written = self.requests.as_mut().map(|requests| requests.write_all(line.as_bytes()));
        if !matches!(written, Some(Ok(()))) {
            return Err(self.failed("takes no more prompts"));
        }
        let reply = self.reply(self.batch_timeout, "compute a batch")?;
        serde_json::from_value(reply).map_err(|error| self.failed(&format!("said what is not understood ({error})")))
    }

    fn reply(&mut self, timeout: Duration, what: &str) -> Result<Value> {
        let deadline = Instant::now() + timeout;
        let line = loop {
            if self.stop.load(Ordering::Relaxed) {
                return Err(Error::new(ErrorKind::Closed, "asked to stop"));
            }
            match self.replies.recv_timeout(LOOK) {
                Ok(Ok(line)) if !line.is_empty() => break line,
                Ok(_) | Err(RecvTimeoutError::Disconnected) => return Err(self.failed("ended")),
                Err(RecvTimeoutError::Timeout) if Instant::now() < deadline => {}
                Err(RecvTimeoutError::Timeout) => {
                    let message = format!("vLLM took more than {} s to {what}", timeout.as_secs());
                    return Err(Error::new(ErrorKind::Timeout, message));
                }
            }
        };
        let reply: Value = serde_json::from_str(&line).unwrap_or_default();
        match reply.get("failed").and_then(Value::as_str) {
            Some(problem) => Err(Error::new(ErrorKind::InvalidInput, format!("vLLM: {problem}"))),
            None => Ok(reply),
        }
    }

    fn failed(&mut self, what: &str) -> Error {
        // What it logged last may still be on its way.
        std::thread::sleep(LOOK);
        let log: Vec<String> = self.log.lock().iter().cloned().collect();
        let path = self.log_path.display();
        Error::new(ErrorKind::Io, format!("vLLM {what}; the end of its log {path}:\n{}", log.join("\n")))
    }

    /// Lets it end in order, within a bound.
    pub(super) fn end(mut self) {
        drop(self.requests.take());
        let deadline = Instant::now() + END_TIMEOUT;
        while Instant::now() < deadline && matches!(self.child.try_wait(), Ok(None)) {
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

impl Drop for Runner {
    /// It leads a group of processes, all of which go.
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(Some(_))) {
            return;
        }
        if let Some(group) = rustix::process::Pid::from_raw(self.child.id().cast_signed()) {
            rustix::process::kill_process_group(group, rustix::process::Signal::KILL).ok();
        }
        self.child.wait().ok();
    }
}

/// The interpreter that has vLLM: of the environment that is active, of the one that this program was installed in, or
/// the first on the path.
pub(super) fn python() -> PathBuf {
    let active = std::env::var_os("VIRTUAL_ENV").map(|home| PathBuf::from(home).join("bin/python"));
    let beside = std::env::current_exe().ok().and_then(|program| Some(program.parent()?.join("python")));
    active.into_iter().chain(beside).find(|python| python.exists()).unwrap_or_else(|| "python3".into())
}
