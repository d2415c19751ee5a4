//! Which of the blocks in DRAM somebody means: those of namespaces, of these what continues a prefix, of these what nobody has
//! used for some time.

use std::collections::HashSet;
use std::time::Duration;

use pegaflow_tiers::{NamespaceHandle, RecordId, Result};

use super::prefixes::check_one;
use super::{Residency, Resident};
use crate::choice::KeyPrefix;

/// What a chain is followed by: how deep a block is, its fingerprint, its parent's, and whether it is the one that was named.
type Link = (u32, u64, u64, bool);

/// The blocks that are meant.
#[derive(Default)]
pub(crate) struct Meant {
    namespaces: HashSet<NamespaceHandle>,
    /// By fingerprint; `None`: all of the namespaces.
    under: Option<HashSet<u64>>,
    /// Used last at this second at the latest; `None`: whenever.
    used_until_s: Option<u32>,
}

impl Meant {
    pub(crate) fn is(&self, block: &Resident) -> bool {
        self.namespaces.contains(&block.id.namespace)
            && self.used_until_s.is_none_or(|until| block.used_s.load(std::sync::atomic::Ordering::Relaxed) <= until)
            && self.under.as_ref().is_none_or(|under| under.contains(&block.id.fingerprint()))
    }
}

impl Residency {
    /// The blocks of these namespaces: all, or those that nobody has used for so long, or the block with the key that begins
    /// so and all that continue it here, in every shard. `with_ancestors` adds those before it in its chain.
    ///
    /// # Errors
    /// `NotFound` if no key begins so, `InvalidInput` if several do.
    pub(crate) fn meant(
        &self,
        namespaces: HashSet<NamespaceHandle>,
        (prefix, with_ancestors): (Option<&KeyPrefix>, bool),
        unused_for: Option<Duration>,
    ) -> Result<Meant> {
        let used_until_s = match unused_for {
            None => None,
            // A second is the grain: what was used within the one at the border stays.
            Some(time) => match self.age().checked_sub(time).and_then(|at| at.as_secs().checked_sub(1)) {
                // Nobody has been here for so long.
                None => return Ok(Meant::default()),
                Some(until) => Some(u32::try_from(until).unwrap_or(u32::MAX)),
            },
        };
        let mut meant = Meant { namespaces, under: None, used_until_s };
        if let Some(prefix) = prefix {
            meant.under = Some(self.under(&meant.namespaces, prefix, with_ancestors)?);
        }
        Ok(meant)
    }

    fn under(
        &self,
        namespaces: &HashSet<NamespaceHandle>,
        prefix: &KeyPrefix,
        with_ancestors: bool,
    ) -> Result<HashSet<u64>> {
        let (mut links, heads) = self.links(namespaces, prefix);
        check_one(heads.iter().map(|head| head.key), prefix)?;
        // Each is less deep than those that continue it.
        links.sort_unstable_by_key(|(depth, ..)| *depth);
        let mut under = HashSet::new();
        for (_, own, parent, is_head) in links {
            if is_head || under.contains(&parent) {
                under.insert(own);
            }
        }
        if with_ancestors {
            for head in heads {
                let mut at = self.get(&head);
                while let Some(block) = at.filter(|block| !block.parent.is_root()) {
                    let parent = self.get(&block.id.with_key(block.parent));
                    // Whoever tells the depth wrong leads nobody in a circle.
                    at = parent.filter(|parent| parent.depth < block.depth);
                    under.extend(at.iter().map(|parent| parent.id.fingerprint()));
                }
            }
        }
        Ok(under)
    }

    /// How the blocks of these namespaces hang together, and those with such a key.
    fn links(&self, namespaces: &HashSet<NamespaceHandle>, prefix: &KeyPrefix) -> (Vec<Link>, Vec<RecordId>) {
        let (mut links, mut heads, mut after) = (Vec::new(), Vec::new(), None);
        loop {
            let state = self.state.lock();
            let (ids, last) = state.piece(after, |block| namespaces.contains(&block.id.namespace));
            for block in ids.iter().filter_map(|id| state.find(id)) {
                let is_head = prefix.begins(&block.id.key);
                let parent = block.id.with_key(block.parent).fingerprint();
                links.push((block.depth, block.id.fingerprint(), parent, is_head));
                heads.extend(is_head.then_some(block.id));
            }
            drop(state);
            after = last;
            if after.is_none() {
                return (links, heads);
            }
        }
    }
}
