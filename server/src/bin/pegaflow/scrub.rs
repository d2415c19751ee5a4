//! `pegaflow scrub`: has a running server read and check every record of its store now, and says what it finds.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use clap::Args;
use pegaflow_engine::{ByteSize, Error, ErrorKind, Result, ScrubProgress, ScrubState};
use pegaflow_server::ExitStatus;
use pegaflow_server::client::Client;
use serde_json::Value;

use crate::job::{self, Job};

/// What is to be done.
#[derive(Debug, Args)]
pub(crate) struct ScrubOptions {
    /// The most that it reads in a second, 64KiB to 16GiB. Readers and writers share the drives with it.
    #[arg(long, value_name = "SIZE", default_value = "256MiB", conflicts_with_all = ["look", "stop"])]
    rate: ByteSize,
    /// Start nothing: tell how far the one is that runs, or what the last one has found.
    #[arg(long, conflicts_with_all = ["stop", "no_wait"])]
    look: bool,
    /// Stop the one that runs.
    #[arg(long, conflicts_with = "no_wait")]
    stop: bool,
    /// Do not wait for its end.
    #[arg(long)]
    no_wait: bool,
}

impl Job for ScrubProgress {
    fn number(&self) -> u64 {
        self.number
    }

    fn is_running(&self) -> bool {
        self.state == ScrubState::Running
    }

    fn share(&self) -> (u64, u64) {
        (self.regions.into(), self.regions_total.into())
    }

    fn text(&self) -> String {
        let seconds = self.took_ms as f64 / 1000.0;
        format!(
            "{} of {} regions, {} records, {} in {seconds:.1} s, {} damaged records",
            self.regions,
            self.regions_total,
            self.records,
            ByteSize(self.bytes),
            self.bad_records
        )
    }
}

/// Starts, stops or looks; what there is to tell, as JSON, and as text if that is wanted.
pub(crate) fn scrub(client: &Client, options: &ScrubOptions, is_json: bool) -> Result<(Value, ExitStatus)> {
    let progress = if options.look {
        client.scrub_progress()?
    } else if options.stop {
        // That it has ended, and not only that it is about to.
        job::wait(client.stop_scrub()?, || client.scrub_progress())?
    } else {
        let started = client.start_scrub(options.rate)?;
        if options.no_wait { started } else { job::wait(started, || client.scrub_progress())? }
    };
    if !is_json {
        print(&progress);
    }
    let is_cut = matches!(progress.state, ScrubState::Failed | ScrubState::Stopped) && !options.stop;
    let status = if progress.bad_records > 0 || is_cut { ExitStatus::Failed } else { ExitStatus::Ok };
    let told = serde_json::to_value(&progress)
        .map_err(|error| Error::new(ErrorKind::Io, format!("cannot write the progress as JSON: {error}")))?;
    Ok((told, status))
}

fn print(progress: &ScrubProgress) {
    let number = progress.number;
    let text = progress.text();
    match progress.state {
        ScrubState::None => println!("no scrub was asked for since the server was started"),
        ScrubState::Running => println!("scrub {number} is running: {text}"),
        ScrubState::Done => println!("scrub {number} has seen every record: {text}"),
        ScrubState::Stopped => println!("scrub {number} was stopped: {text}"),
        ScrubState::Failed => {
            println!("scrub {number} failed: {text}; {}", progress.error.as_deref().unwrap_or("no reason is known"));
        }
    }
    if progress.bad_records > 0 {
        println!("damaged records are found no more; their blocks are computed and saved again when they are wanted");
    }
    let last_pass = UNIX_EPOCH + Duration::from_millis(progress.last_pass_unix_ms);
    match SystemTime::now().duration_since(last_pass) {
        Ok(ago) if progress.last_pass_unix_ms > 0 => {
            println!("every record was last seen {:.1} hours ago", ago.as_secs_f64() / 3600.0);
        }
        _ => println!("no scrub has seen every record of this store yet"),
    }
}
