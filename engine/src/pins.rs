//! Pins as an operator sees them: what is to stay in DRAM, for how long, and its end.

use std::time::{Duration, Instant};

use pegaflow_tiers::{Error, ErrorKind, NamespaceId, Result};

use crate::choice::BlockChoice;
use crate::engine::Engine;
use crate::purge::numbers;

/// Namespaces that a pin names at most; or it names none, for all.
const NAMESPACES_MAX: usize = 64;
/// The longest time of a pin that has one.
const TTL_MAX: Duration = Duration::from_secs(366 * 24 * 3600);

/// A pin, and what it holds by now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PinInfo {
    /// Its name, from 1 on; none is used again before a restart.
    pub number: u64,
    /// What was asked for.
    pub choice: BlockChoice,
    /// Blocks that it holds; each shard of a block counts. Some of them may be held by other pins as well.
    pub blocks: u64,
    /// What these take in DRAM.
    pub bytes: u64,
    /// How long it goes on; `None`: until it is ended.
    pub left: Option<Duration>,
}

/// What the end of pins has done.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Unpinned {
    /// Pins that are over.
    pub pins: u64,
    /// Blocks that no pin holds any more; each shard of a block counts.
    pub blocks: u64,
    /// What these take in DRAM.
    pub bytes: u64,
}

impl Engine {
    /// Keeps those blocks in DRAM that are meant and are there now; with a prefix those before it in its chain, too. They give
    /// way to nobody, whatever else needs room, until the pin is over: after `ttl`, by [`Engine::unpin`], when they are purged, or
    /// with the engine. What comes later is not pinned.
    ///
    /// # Errors
    /// `NotFound` for a namespace that is not known, a prefix that is not in DRAM, and if there is nothing; `InvalidInput` if
    /// more than half of DRAM would be pinned, for a prefix that is not clear, for a time below a second or above 366 days, and
    /// for blocks chosen by age; `Busy` with 64 pins; `Closed`.
    pub fn pin(&self, choice: &BlockChoice, ttl: Option<Duration>) -> Result<PinInfo> {
        let inner = self.inner()?;
        let bad = |message: String| Err(Error::new(ErrorKind::InvalidInput, message));
        if let Some(ttl) = ttl.filter(|ttl| *ttl < Duration::from_secs(1) || *ttl > TTL_MAX) {
            return bad(format!("a pin for {ttl:?}; give 1 s to {} days, or no time", TTL_MAX.as_secs() / 86_400));
        }
        if choice.namespaces.len() > NAMESPACES_MAX {
            let count = choice.namespaces.len();
            return bad(format!("a pin of {count} namespaces; give at most {NAMESPACES_MAX}, or none for all"));
        }
        if choice.unused_for.is_some() {
            return bad("blocks are not pinned by age; give a namespace or a prefix".into());
        }
        let handles = numbers(inner, &choice.namespaces)?.into_keys().collect();
        let meant = inner.residency.meant(handles, (choice.prefix.as_ref(), true), None)?;
        let pin = inner.residency.pin(&meant, choice.clone(), ttl.map(|ttl| Instant::now() + ttl))?;
        tracing::info!(?pin, "blocks are pinned in DRAM");
        Ok(pin)
    }

    /// Ends the pin of this number.
    ///
    /// # Errors
    /// `NotFound` if there is none, `Closed`.
    pub fn unpin(&self, number: u64) -> Result<Unpinned> {
        let unpinned = self.inner()?.residency.unpin(|of, _| of == number);
        if unpinned.pins == 0 {
            let message = format!("there is no pin {number}; pegaflow ls shows what there is");
            return Err(Error::new(ErrorKind::NotFound, message));
        }
        tracing::info!(number, ?unpinned, "a pin was ended");
        Ok(unpinned)
    }

    /// Lets go of all pinned blocks of these namespaces, or of all if none is given; pins that hold no other ones are over.
    ///
    /// # Errors
    /// `NotFound` for a namespace that is not known, `Closed`.
    pub fn unpin_namespaces(&self, namespaces: &[NamespaceId]) -> Result<Unpinned> {
        let inner = self.inner()?;
        let numbers = numbers(inner, namespaces)?;
        let unpinned = inner.residency.unpin(|_, block| numbers.contains_key(&block.id.namespace));
        tracing::info!(?unpinned, "namespaces are not pinned any more");
        Ok(unpinned)
    }

    /// All pins, by their numbers.
    ///
    /// # Errors
    /// `Closed`.
    pub fn pins(&self) -> Result<Vec<PinInfo>> {
        Ok(self.inner()?.residency.pins())
    }
}
