//! How far it is: a bar on a terminal, a line every ten seconds elsewhere. By bytes of the prompts' lines, because nobody
//! knows their tokens before vLLM does.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

const LINE_INTERVAL: Duration = Duration::from_secs(10);

pub(super) struct Progress {
    bar: ProgressBar,
    has_terminal: bool,
    started: Instant,
    told: Instant,
    bytes: u64,
    bytes_done: u64,
    prompts: u64,
    prompts_done: u64,
}

impl Progress {
    pub(super) fn new(bytes: u64, prompts: u64) -> Self {
        let bar = ProgressBar::new(bytes);
        if let Ok(style) = ProgressStyle::with_template("{bar:30} {percent} %, {msg}, {eta} left") {
            bar.set_style(style);
        }
        bar.enable_steady_tick(Duration::from_secs(1));
        let has_terminal = std::io::stderr().is_terminal();
        let now = Instant::now();
        Self { bar, has_terminal, started: now, told: now, bytes, bytes_done: 0, prompts, prompts_done: 0 }
    }

    /// So much more is done; the tokens are those of all.
    pub(super) fn advance(&mut self, bytes: u64, prompts: u64, tokens: u64, cached: u64) {
        self.bytes_done += bytes;
        self.prompts_done += prompts;
        let rate = tokens as f64 / self.seconds().max(0.001);
        let text = format!(
            "{} of {} prompts, {tokens} tokens ({cached} cached), {rate:.0} tokens/s",
            self.prompts_done, self.prompts
        );
        if self.has_terminal {
            self.bar.set_position(self.bytes_done);
            self.bar.set_message(text);
        } else if self.told.elapsed() >= LINE_INTERVAL || self.bytes_done == self.bytes {
            self.told = Instant::now();
            let left = self.seconds() * (self.bytes - self.bytes_done) as f64 / self.bytes_done.max(1) as f64;
            eprintln!("pegaflow: {text}, {left:.0} s left");
        }
    }

    /// Since it began.
    pub(super) fn seconds(&self) -> f64 {
        self.started.elapsed().as_secs_f64()
    }

    pub(super) fn end(&self) {
        self.bar.finish_and_clear();
    }
}
