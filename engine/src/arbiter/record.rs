//! What is asked of the arbiter, what it answers, and what it says of an answer afterwards.

use std::fmt;
use std::time::Duration;

/// Whether found prefixes are loaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum LoadPolicy {
    /// Where loading is expected to take less time than computing.
    #[default]
    Auto,
    /// Always.
    Always,
    /// Never.
    Never,
}

/// A prefix that was found, as seen by the request that could use it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct FoundPrefix {
    /// The asker's name for the request, to find its decision again.
    pub request: u64,
    /// The first token that the engine does not have itself.
    pub first_token: u32,
    /// One after the last token that was found. Above `first_token`, or nothing is decided.
    pub end_token: u32,
    /// Up to which token (one after the last) all is in DRAM. Blocks from the drive come after those in DRAM.
    pub dram_end_token: u32,
    /// Tokens of a block. 0 counts as 1.
    pub block_tokens: u32,
    /// Bytes of a token, over the slowest worker's link: its share of the KV cache.
    pub link_bytes_per_token: u64,
    /// Bytes of a token on the drive, of all workers that share it, as stored.
    pub stored_bytes_per_token: u64,
    /// Bytes that loads accepted before this one still have to read from the drive.
    pub queued_bytes: u64,
    /// All bytes that the drives have read for loads since any fixed time. 0 if not known.
    pub drive_read_bytes: u64,
    /// The share of the GPU's time that other requests want, 0 to 1.
    pub load_share: f32,
}

/// How fast tiers are by somebody else's measurement, in bytes per second. 0: not known.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct TierSpeeds {
    /// DRAM to GPU, of one worker.
    pub link_bytes_per_second: u64,
    /// All drives together, in bytes as stored.
    pub drive_bytes_per_second: u64,
    /// What is decoded per second, in bytes as stored.
    pub decode_bytes_per_second: u64,
}

/// How a prefix is had.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Choice {
    /// It is loaded.
    Load,
    /// The engine computes it.
    Recompute,
}

/// Why.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reason {
    /// It is expected to be faster.
    Faster,
    /// Loading is expected to be a little slower, and frees a GPU that others want.
    FreesGpu,
    /// No load has been seen yet, and nobody has said how fast the tiers are.
    NotMeasured,
    /// The other way was not seen for a while: a part of the prefix is had that way, or all of it if it is short.
    Probe,
    /// `load_policy` says so.
    Policy,
    /// Shadow mode: nothing is loaded.
    Shadow,
    /// Nothing to load.
    Nothing,
}

/// A decision, and what came of it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Decision {
    /// Its number, from 1 up.
    pub id: u64,
    /// When it was made, since the owner's fixed time.
    pub at: Duration,
    /// What was asked.
    pub found: FoundPrefix,
    /// What it would take to load all that was found.
    pub predicted_load: Duration,
    /// What it would take to compute it beside what the engine has to do for others.
    pub predicted_recompute: Duration,
    /// What to do; for a probe, what is probed.
    pub choice: Choice,
    /// What `auto` would do without probes, also where the policy or shadow mode decide.
    pub preferred: Choice,
    /// How many tokens to load, from `first_token` on: none or all, but for probes.
    pub load_tokens: u32,
    /// Why.
    pub reason: Reason,
    /// How long the load took, once it is known.
    pub observed_load: Option<Duration>,
    /// How long it took to compute what was not loaded, once it is known.
    pub observed_compute: Option<Duration>,
}

impl Decision {
    /// Tokens that are computed although they were found.
    pub fn computed_tokens(&self) -> u32 {
        self.found.end_token.saturating_sub(self.found.first_token).saturating_sub(self.load_tokens)
    }
}

impl fmt::Display for Decision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let tokens = self.found.end_token.saturating_sub(self.found.first_token);
        let what = match self.choice {
            Choice::Load => "load",
            Choice::Recompute => "recompute",
        };
        let why = match self.reason {
            Reason::Faster => "it is faster",
            Reason::FreesGpu => "it is hardly slower and frees the GPU",
            Reason::NotMeasured => "no load was measured yet",
            Reason::Probe => "to see whether it has changed",
            Reason::Policy => "load_policy says so",
            Reason::Shadow => "shadow mode loads nothing",
            Reason::Nothing => "nothing was found",
        };
        write!(f, "{what}: {why}; {tokens} tokens found, {} loaded; ", self.load_tokens)?;
        write!(f, "predicted {:.1} ms to load, ", millis(self.predicted_load))?;
        write!(
            f,
            "{:.1} ms to compute at {:.0} % load",
            millis(self.predicted_recompute),
            self.found.load_share * 100.0
        )?;
        if let Some(observed) = self.observed_load {
            write!(f, "; the load took {:.1} ms", millis(observed))?;
        }
        if let Some(observed) = self.observed_compute {
            write!(f, "; computing {} tokens took {:.1} ms", self.computed_tokens(), millis(observed))?;
        }
        Ok(())
    }
}

fn millis(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}
