//! What is asked of the arbiter, what it answers, and what it says of an answer afterwards.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use pegaflow_tiers::{Error, ErrorKind};
use serde::{Deserialize, Serialize};

/// By how much what was taken may be slower than what was predicted of the other way before it counts as a mistake.
const MISTAKE: f64 = 1.05;

/// Whether found prefixes are loaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LoadPolicy {
    /// Where loading is expected to take less time than computing.
    #[default]
    Auto,
    /// Always.
    Always,
    /// Never: the kill switch.
    Never,
    /// Always, but what `auto` would do is decided and recorded.
    Shadow,
}

impl LoadPolicy {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Auto, Self::Always, Self::Never, Self::Shadow];

    /// Its name in settings.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Always => "always",
            Self::Never => "never",
            Self::Shadow => "shadow",
        }
    }
}

impl fmt::Display for LoadPolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for LoadPolicy {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        Self::ALL.into_iter().find(|policy| policy.as_str() == text).ok_or_else(|| {
            let message = format!("load policy '{text}'; give auto, always, never or shadow");
            Error::new(ErrorKind::InvalidInput, message)
        })
    }
}

/// A prefix that was found, as seen by the request that could use it.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct FoundPrefix {
    /// The asker's name for the request, to find its decision again.
    pub request: u64,
    /// The first token that the engine does not have itself.
    pub first_token: u32,
    /// One after the last token that was found. Above `first_token`, or nothing is decided.
    pub end_token: u32,
    /// Up to which token (one after the last) all is in DRAM. Blocks from the drive come after those in DRAM.
    pub dram_end_token: u32,
    /// Whether the workers copy it themselves, out of DRAM: then it is loaded, whatever other loads take.
    pub is_placed: bool,
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
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Choice {
    /// It is loaded.
    Load,
    /// The engine computes it.
    Recompute,
}

/// Why.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Reason {
    /// It is expected to be faster.
    Faster,
    /// Loading is expected to be a little slower, and frees a GPU that others want.
    FreesGpu,
    /// Not both ways were seen yet: it is loaded.
    NotMeasured,
    /// The other way was not seen for a while.
    Probe,
    /// It lies in DRAM, and the workers copy it themselves.
    Placed,
    /// The load policy says so.
    Policy,
    /// The load policy is `shadow`: it is loaded in any case.
    Shadow,
    /// Nothing to load.
    Nothing,
}

/// A decision, and what came of it.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
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
    /// What to do with all of it.
    pub choice: Choice,
    /// What `auto` would do without probes, also where the policy decides.
    pub preferred: Choice,
    /// Why.
    pub reason: Reason,
    /// Bytes of what was found, as stored, that are to be read from the drive beside the request, to see how fast that is;
    /// 0: none. To be reported by [`super::Arbiter::was_read`].
    pub read_bytes: u64,
    /// How long the load took, once it is known.
    pub observed_load: Option<Duration>,
    /// How long it took to compute what was found, once it is known: its share of what was computed.
    pub observed_recompute: Option<Duration>,
}

impl Decision {
    /// Tokens that were found.
    pub fn tokens(&self) -> u32 {
        self.found.end_token.saturating_sub(self.found.first_token)
    }

    /// Whether the other way would have been faster, by its prediction. False until it is known how long it took.
    pub fn is_mistake(&self) -> bool {
        let (observed, other) = match self.choice {
            Choice::Load => (self.observed_load, self.predicted_recompute),
            Choice::Recompute => (self.observed_recompute, self.predicted_load),
        };
        self.reason != Reason::NotMeasured
            && observed.is_some_and(|observed| observed.as_secs_f64() > other.as_secs_f64() * MISTAKE)
    }
}

impl fmt::Display for Decision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let what = match self.choice {
            Choice::Load => "load",
            Choice::Recompute => "recompute",
        };
        let why = match self.reason {
            Reason::Faster => "it is faster",
            Reason::FreesGpu => "it is hardly slower and frees the GPU",
            Reason::NotMeasured => "loading or computing was not measured yet",
            Reason::Probe => "to see whether it has changed",
            Reason::Placed => "workers copy it out of DRAM",
            Reason::Policy => "the load policy says so",
            Reason::Shadow => "in shadow mode everything is loaded",
            Reason::Nothing => "nothing was found",
        };
        let in_dram = self.found.dram_end_token.saturating_sub(self.found.first_token).min(self.tokens());
        write!(f, "{what}: {why}; {} tokens found, {in_dram} in DRAM; ", self.tokens())?;
        write!(f, "predicted {:.1} ms to load, ", millis(self.predicted_load))?;
        let load_percent = self.found.load_share * 100.0;
        write!(f, "{:.1} ms to compute at {load_percent:.0} % load", millis(self.predicted_recompute))?;
        if let Some(observed) = self.observed_load {
            write!(f, "; the load took {:.1} ms", millis(observed))?;
        }
        if let Some(observed) = self.observed_recompute {
            write!(f, "; computing it took {:.1} ms", millis(observed))?;
        }
        Ok(())
    }
}

fn millis(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}
