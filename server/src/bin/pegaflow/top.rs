//! `pegaflow top`: what a server does, every second. A screen on a terminal, a line for each moment elsewhere, a JSON object
//! for each with `--json`. Asks for nothing but the server's counters.

mod frame;
mod screen;
mod terminal;

use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

use pegaflow_engine::{Error, Result};
use pegaflow_server::client::Client;
use serde_json::Value;

use frame::Frame;
use terminal::{Terminal, Wake};

/// How the view is made.
#[derive(Debug, clap::Args)]
pub(crate) struct TopOptions {
    /// How often it is made anew, in seconds, 0.2 to 60.
    #[arg(long, value_name = "SECONDS", default_value_t = 1.0, value_parser = interval)]
    interval: f64,
    /// Looks twice, an interval apart, tells what is seen and ends.
    #[arg(long)]
    once: bool,
}

fn interval(text: &str) -> std::result::Result<f64, String> {
    text.parse().ok().filter(|seconds| (0.2..=60.0).contains(seconds)).ok_or_else(|| "give 0.2 to 60".to_owned())
}

/// One look at the counters.
struct Look {
    at: Instant,
    stats: Value,
}

impl Look {
    fn take(client: &Client) -> Result<Self> {
        let stats = client.stats()?;
        Ok(Self { at: Instant::now(), stats })
    }
}

/// Shows what the server does until it is told to end.
///
/// # Errors
/// With `--once`, and at the first look, what the server's answer gives. `Io` if standard output is closed.
pub(crate) fn top(client: &Client, options: &TopOptions, is_json: bool) -> Result<()> {
    let interval = Duration::from_secs_f64(options.interval);
    let mut before = Look::take(client)?;
    if options.once {
        std::thread::sleep(interval);
        return print(&frame_since(&before, &Look::take(client)?), is_json).map(drop);
    }
    if is_json || !std::io::stdout().is_terminal() {
        loop {
            std::thread::sleep(interval);
            let now = Look::take(client)?;
            if !print(&frame_since(&before, &now), is_json)? {
                return Ok(());
            }
            before = now;
        }
    }
    let mut terminal = Terminal::take()?;
    let mut frame = Frame::new(&before.stats, &before.stats, Duration::ZERO);
    let mut trouble = None;
    loop {
        terminal.draw(|size, style| screen::lines(&frame, trouble.as_deref(), size, style))?;
        match terminal.wait(interval)? {
            Wake::End => return Ok(()),
            Wake::Resized => continue,
            Wake::Time => {}
        }
        match Look::take(client) {
            Ok(now) => {
                (frame, trouble) = (frame_since(&before, &now), None);
                before = now;
            }
            // The client connects again by itself.
            Err(error) => trouble = Some(format!("no answer: {error}")),
        }
    }
}

fn frame_since(before: &Look, now: &Look) -> Frame {
    Frame::new(&before.stats, &now.stats, now.at - before.at)
}

/// False if nobody reads any more.
fn print(frame: &Frame, is_json: bool) -> Result<bool> {
    let line = if is_json { frame.to_json().to_string() } else { screen::line(frame) };
    let mut out = std::io::stdout().lock();
    match writeln!(out, "{line}").and_then(|()| out.flush()) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(false),
        Err(error) => Err(Error::from_io("standard output", error)),
    }
}
