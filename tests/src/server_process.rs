//! A `pegaflow-server` process of its own, which can be killed at any moment.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// How the server is started.
#[derive(Debug, Clone)]
pub struct ServerOptions {
    /// The binary.
    pub binary: PathBuf,
    /// Directory of store, socket and log.
    pub directory: PathBuf,
    /// Bytes of DRAM, as the command line takes them.
    pub dram: String,
    /// Bytes of the store.
    pub capacity: String,
    /// Bytes of a region.
    pub region: String,
    /// Further arguments.
    pub more: Vec<String>,
}

impl ServerOptions {
    /// A small server in `directory`, from the binary that lies beside the running one.
    ///
    /// # Errors
    /// If there is no such binary.
    pub fn small(directory: &Path) -> Result<Self> {
        Ok(Self {
            binary: find_binary("pegaflow-server")?,
            directory: directory.to_owned(),
            dram: "64MiB".into(),
            capacity: "1GiB".into(),
            region: "16MiB".into(),
            more: Vec::new(),
        })
    }

    /// Where the socket is.
    pub fn socket(&self) -> PathBuf {
        self.directory.join("pega.sock")
    }

    /// Where the store is.
    pub fn store(&self) -> PathBuf {
        self.directory.join("store")
    }

    /// Starts the process without waiting for it to be ready.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn spawn(&self) -> Result<ServerProcess> {
        std::fs::create_dir_all(&self.directory)?;
        let log = std::fs::OpenOptions::new().create(true).append(true).open(self.directory.join("server.log"))?;
        let mut command = Command::new(&self.binary);
        command
            .arg("--path")
            .arg(self.store())
            .arg("--socket")
            .arg(self.socket())
            .args(["--capacity", &self.capacity, "--region", &self.region, "--dram", &self.dram, "--http", "off"])
            .args(&self.more)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(log);
        let child = command.spawn().with_context(|| format!("starting {}", self.binary.display()))?;
        Ok(ServerProcess { child, log: self.directory.join("server.log") })
    }

    /// Starts it and waits until it says that it is ready.
    ///
    /// # Errors
    /// If it ends or says nothing for `timeout`.
    pub fn start(&self, timeout: Duration) -> Result<ServerProcess> {
        let mut server = self.spawn()?;
        server.wait_ready(timeout)?;
        Ok(server)
    }
}

/// The running process; killed when dropped.
#[derive(Debug)]
pub struct ServerProcess {
    child: Child,
    log: PathBuf,
}

impl ServerProcess {
    /// Waits for the line that says it is ready.
    ///
    /// # Errors
    /// If it ends or says nothing for `timeout`; with the end of its log.
    pub fn wait_ready(&mut self, timeout: Duration) -> Result<()> {
        let stdout = self.child.stdout.take().context("waited for before")?;
        let (sender, receiver) = channel();
        std::thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(std::result::Result::ok) {
                if sender.send(line).is_err() {
                    break;
                }
            }
        });
        let deadline = Instant::now() + timeout;
        loop {
            match receiver.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(line) if line.contains("\"ready\":true") => return Ok(()),
                Ok(_) => {}
                Err(RecvTimeoutError::Timeout) => {
                    bail!("the server was not ready after {timeout:?}: {}", self.log_tail())
                }
                Err(RecvTimeoutError::Disconnected) => {
                    bail!("the server ended before it was ready: {}", self.log_tail())
                }
            }
        }
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// SIGKILL, and waits for the process to be gone.
    ///
    /// # Errors
    /// If it cannot be waited for.
    pub fn kill(&mut self) -> Result<()> {
        let _ = self.child.kill();
        self.child.wait()?;
        Ok(())
    }

    /// SIGTERM, and waits for the exit code.
    ///
    /// # Errors
    /// If it has not ended after `timeout`.
    pub fn terminate(&mut self, timeout: Duration) -> Result<Option<i32>> {
        Command::new("kill").args(["-TERM", &self.pid().to_string()]).status()?;
        let deadline = Instant::now() + timeout;
        loop {
            if let Some(status) = self.child.try_wait()? {
                return Ok(status.code());
            }
            if Instant::now() >= deadline {
                bail!("the server had not ended {timeout:?} after SIGTERM: {}", self.log_tail());
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Whether it still runs.
    pub fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// How many panics its log tells of.
    pub fn panics(log: &Path) -> usize {
        std::fs::read_to_string(log).map_or(0, |text| text.matches("panicked at").count())
    }

    /// Its open file descriptors.
    pub fn open_files(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/fd", self.pid())).map_or(0, Iterator::count)
    }

    /// Its open sockets and process descriptors: what clients cost it.
    pub fn open_sockets(&self) -> usize {
        let links = std::fs::read_dir(format!("/proc/{}/fd", self.pid())).into_iter().flatten().flatten();
        let target = |entry: std::fs::DirEntry| std::fs::read_link(entry.path()).unwrap_or_default();
        links.map(target).filter(|link| link.starts_with("socket:") || link.ends_with("[pidfd]")).count()
    }

    /// The CPU time that it has used so far, in clock ticks of 10 ms.
    pub fn cpu_ticks(&self) -> u64 {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.pid())).unwrap_or_default();
        let after_name = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
        // Fields 14 and 15 of proc(5), counted from the state, which is field 3.
        after_name.split_whitespace().skip(11).take(2).filter_map(|field| field.parse::<u64>().ok()).sum()
    }

    fn log_tail(&self) -> String {
        let text = std::fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<&str> = text.lines().rev().take(5).collect();
        lines.into_iter().rev().collect::<Vec<_>>().join(" | ")
    }
}

impl Drop for ServerProcess {
    fn drop(&mut self) {
        let _ = self.kill();
    }
}

/// A binary of this workspace, beside the running one or one folder up (tests run in `deps/`).
fn find_binary(name: &str) -> Result<PathBuf> {
    if let Some(path) = std::env::var_os("PEGAFLOW_SERVER_BINARY") {
        return Ok(path.into());
    }
    let own = std::env::current_exe()?;
    let found = own.ancestors().skip(1).take(2).map(|folder| folder.join(name)).find(|path| path.is_file());
    found.with_context(|| format!("{name} is not built; run `cargo build -p pegaflow-server` with the same profile"))
}
