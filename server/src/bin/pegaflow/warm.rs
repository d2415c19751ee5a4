//! `pegaflow warm` has a running server bring to DRAM what its drives have of namespaces; `pegaflow evict` has them leave it.

use std::time::Duration;

use clap::{ArgGroup, Args};
use pegaflow_engine::{ByteSize, Error, ErrorKind, NamespaceId, Result, WarmRun, WarmRunState};
use pegaflow_server::ExitStatus;
use pegaflow_server::client::Client;
use serde_json::{Value, json};

use crate::job::{self, Job};
use crate::namespaces::{Which, ids};

/// How long the server may take to go through its DRAM.
const EVICT_PATIENCE: Duration = Duration::from_secs(300);

/// Which namespaces are to leave.
#[derive(Debug, Args)]
#[command(group(ArgGroup::new("whose").required(true).args(["namespace", "tenant", "cache_salt", "all"])))]
pub(crate) struct EvictOptions {
    #[command(flatten)]
    which: Which,
}

/// What is to be done.
#[derive(Debug, Args)]
pub(crate) struct WarmOptions {
    #[command(flatten)]
    which: Which,
    /// Start nothing: tell how far the run is that goes on, or what came of the last one.
    #[arg(long, conflicts_with_all = ["Which", "stop", "no_wait"])]
    look: bool,
    /// Stop the run that goes on; what is in DRAM stays.
    #[arg(long, conflicts_with_all = ["Which", "no_wait"])]
    stop: bool,
    /// Do not wait for its end.
    #[arg(long)]
    no_wait: bool,
}

impl Job for WarmRun {
    fn number(&self) -> u64 {
        self.number
    }

    fn is_running(&self) -> bool {
        self.state == WarmRunState::Running
    }

    fn share(&self) -> (u64, u64) {
        (self.seen_blocks, self.listed_blocks)
    }

    fn text(&self) -> String {
        let seconds = self.took_ms as f64 / 1000.0;
        let rate = ByteSize((self.read_bytes as f64 / seconds.max(0.001)) as u64);
        format!(
            "{} of {} blocks looked for, {} read, {} in {seconds:.1} s ({rate}/s)",
            self.seen_blocks,
            self.listed_blocks,
            self.read_blocks,
            ByteSize(self.read_bytes),
        )
    }
}

/// Starts, stops or looks; what there is to tell, as JSON, and as text if that is wanted.
pub(crate) fn warm(client: &Client, options: &WarmOptions, is_json: bool) -> Result<(Value, ExitStatus)> {
    let run = if options.look {
        client.warming()?
    } else if options.stop {
        job::wait(client.stop_warming()?, || client.warming())?
    } else {
        let started = client.start_warming(&meant(client, &options.which)?)?;
        if options.no_wait { started } else { job::wait(started, || client.warming())? }
    };
    if !is_json {
        print(&run);
    }
    let is_cut = matches!(run.state, WarmRunState::Failed | WarmRunState::Stopped) && !options.stop;
    let told = serde_json::to_value(&run)
        .map_err(|error| Error::new(ErrorKind::Io, format!("cannot write the progress as JSON: {error}")))?;
    Ok((told, if is_cut { ExitStatus::Failed } else { ExitStatus::Ok }))
}

/// The namespaces that are meant; none for all.
fn meant(client: &Client, which: &Which) -> Result<Vec<NamespaceId>> {
    if which.is_all() { Ok(Vec::new()) } else { ids(client, which) }
}

/// Has namespaces leave DRAM; what was done, as JSON, and as text if that is wanted.
pub(crate) fn evict(client: &Client, options: &EvictOptions, is_json: bool) -> Result<Value> {
    let evicted = client.evict(&meant(client, &options.which)?, EVICT_PATIENCE)?;
    if !is_json {
        println!(
            "{} namespaces: {} blocks ({}) have left DRAM, {} stay, which the drive does not have yet or somebody uses",
            evicted.namespaces,
            evicted.dram_blocks,
            ByteSize(evicted.dram_bytes),
            evicted.kept_blocks
        );
    }
    Ok(json!({
        "namespaces": evicted.namespaces,
        "dram_blocks": evicted.dram_blocks,
        "dram_bytes": evicted.dram_bytes,
        "kept_blocks": evicted.kept_blocks,
    }))
}

fn print(run: &WarmRun) {
    let text = run.text();
    match run.state {
        WarmRunState::None => println!("nothing was to be brought to DRAM since the server was started"),
        WarmRunState::Running => println!("going on: {text}"),
        WarmRunState::Done => println!("all is in DRAM: {text}"),
        WarmRunState::Full => {
            println!("DRAM has no free room for the rest: {text}; pegaflow evict makes some");
        }
        WarmRunState::Stopped => println!("stopped: {text}"),
        WarmRunState::Failed => println!("failed: {text}; {}", run.error.as_deref().unwrap_or("no reason is known")),
    }
}
