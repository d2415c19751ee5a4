//! `pegaflow warm` has a running server bring to DRAM what its drives have of namespaces; `pegaflow evict` has them leave it.

use std::time::Duration;

use clap::{ArgGroup, Args};
use pegaflow_engine::{BlockChoice, ByteSize, Error, ErrorKind, KeyPrefix, Result, WarmRun, WarmRunState};
use pegaflow_server::ExitStatus;
use pegaflow_server::client::Client;
use serde_json::{Value, json};

use crate::job::{self, Job};
use crate::namespaces::{Which, meant};
use crate::{duration, pins};

/// How long the server may take to go through its DRAM.
pub(crate) const PATIENCE: Duration = Duration::from_secs(300);

/// Which blocks are to leave.
#[derive(Debug, Args)]
#[command(group(
    ArgGroup::new("whose").required(true).multiple(true).args(["namespace", "tenant", "cache_salt", "all", "prefix"])
))]
pub(crate) struct EvictOptions {
    #[command(flatten)]
    which: Which,
    /// Of these only the block with this key and all that continue it. 8 to 64 hexadecimal digits.
    #[arg(long, value_name = "KEY")]
    prefix: Option<KeyPrefix>,
    /// Of these only what was neither saved, loaded nor brought to DRAM for so long: 90s, 30min, 12h, 7d. To the second, and
    /// since the server was started.
    #[arg(long, value_name = "TIME", value_parser = duration::parse)]
    older_than: Option<Duration>,
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
    /// Pin what is in DRAM of these namespaces then, as `pegaflow pin` does; not if the run was stopped or failed.
    #[arg(long, conflicts_with_all = ["look", "stop", "no_wait"])]
    pin: bool,
    /// With --pin: end the pin after so long: 90s, 30min, 12h, 7d.
    #[arg(long, value_name = "TIME", value_parser = duration::parse, requires = "pin")]
    ttl: Option<Duration>,
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
    let mut namespaces = Vec::new();
    let run = if options.look {
        client.warming()?
    } else if options.stop {
        job::wait(client.stop_warming()?, || client.warming())?
    } else {
        namespaces = meant(client, &options.which)?;
        let started = client.start_warming(&namespaces)?;
        if options.no_wait { started } else { job::wait(started, || client.warming())? }
    };
    if !is_json {
        print(&run);
    }
    let is_cut = matches!(run.state, WarmRunState::Failed | WarmRunState::Stopped) && !options.stop;
    let mut told = serde_json::to_value(&run)
        .map_err(|error| Error::new(ErrorKind::Io, format!("cannot write the progress as JSON: {error}")))?;
    if options.pin && !is_cut {
        let pin = client.pin(&BlockChoice::of(&namespaces), options.ttl, PATIENCE)?;
        if !is_json {
            println!("{}", pins::line(&pin));
        }
        told["pin"] = pin;
    }
    Ok((told, if is_cut { ExitStatus::Failed } else { ExitStatus::Ok }))
}

/// Has namespaces leave DRAM; what was done, as JSON, and as text if that is wanted.
pub(crate) fn evict(client: &Client, options: &EvictOptions, is_json: bool) -> Result<Value> {
    let choice = BlockChoice {
        namespaces: meant(client, &options.which)?,
        prefix: options.prefix.clone(),
        unused_for: options.older_than,
    };
    let evicted = client.evict(&choice, PATIENCE)?;
    if !is_json {
        println!(
            "{} namespaces: {} blocks ({}) have left DRAM, {} stay, which the drive does not have yet or somebody uses or has pinned",
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
