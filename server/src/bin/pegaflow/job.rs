//! A job of the server that somebody waits for: a bar on a terminal, a line every ten seconds elsewhere, both on standard
//! error. The job does not need whoever looks: it goes on when that one is gone.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use pegaflow_engine::{Error, ErrorKind, Result};

/// How often it is looked.
const LOOK_INTERVAL: Duration = Duration::from_millis(200);
const LINE_INTERVAL: Duration = Duration::from_secs(10);

/// What a look at a job says.
pub(crate) trait Job {
    /// Which one it is.
    fn number(&self) -> u64;
    fn is_running(&self) -> bool;
    /// (What is done, what there is in all).
    fn share(&self) -> (u64, u64);
    /// How far it is, for people.
    fn text(&self) -> String;
}

/// Looks at a job until it ends, and returns how it ended.
///
/// # Errors
/// What a look reports; `Closed` if the server was started anew. The job goes on where there is one.
pub(crate) fn wait<J: Job>(mut job: J, look: impl Fn() -> Result<J>) -> Result<J> {
    let number = job.number();
    let bar = ProgressBar::new(0);
    if let Ok(style) = ProgressStyle::with_template("{bar:30} {percent} %, {msg}, {eta} left") {
        bar.set_style(style);
    }
    let has_terminal = std::io::stderr().is_terminal();
    let mut told = Instant::now();
    while job.is_running() {
        let (done, total) = job.share();
        if has_terminal {
            bar.set_length(total);
            bar.set_position(done.min(total));
            bar.set_message(job.text());
        } else if told.elapsed() >= LINE_INTERVAL {
            told = Instant::now();
            eprintln!("pegaflow: {}", job.text());
        }
        std::thread::sleep(LOOK_INTERVAL);
        job = look()?;
        if job.number() != number {
            return Err(Error::new(ErrorKind::Closed, "the server was started anew, or somebody began another one"));
        }
    }
    bar.finish_and_clear();
    Ok(job)
}
