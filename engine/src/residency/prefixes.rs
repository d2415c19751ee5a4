//! The blocks in DRAM as prefixes: the chains hang together as trees, since requests that begin alike share their first
//! blocks. A prefix is named by the key of its first block that no other one shares.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::Ordering;
use std::time::Duration;

use pegaflow_tiers::{BlockKey, Error, ErrorKind, NamespaceHandle, RecordId, Result};

use super::{Build, Residency};
use crate::choice::KeyPrefix;

/// A prefix, and all that continues it here.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Prefix {
    /// Its first block, in shard 0.
    pub(crate) id: RecordId,
    /// Blocks before that.
    pub(crate) depth: u32,
    /// From its first block on, blocks that all that continue it share.
    pub(crate) common_blocks: u64,
    /// In how many ways it goes on behind these.
    pub(crate) branches: u64,
    /// Blocks in all; each shard of a block counts.
    pub(crate) blocks: u64,
    /// What they take.
    pub(crate) bytes: u64,
    pub(crate) pinned_bytes: u64,
    /// How long ago one of them was used last.
    pub(crate) idle: Duration,
    /// Requests that used its first block, as far as the policy remembers.
    pub(crate) uses: Option<u8>,
}

/// A block with all of its shards, and in the end with all that continue it.
struct Node {
    id: RecordId,
    slot_bytes: usize,
    depth: u32,
    parent: u64,
    children: u64,
    /// One of them.
    child: u64,
    blocks: u64,
    bytes: u64,
    pinned_bytes: u64,
    used_s: u32,
}

type Nodes = HashMap<u64, Node, Build>;

impl Residency {
    /// The prefixes of these namespaces that begin a chain, or those in which the one whose first key begins with `under`
    /// goes on; at most `most`, the largest ones first.
    ///
    /// # Errors
    /// `NotFound` if no key begins so, `InvalidInput` if several do.
    pub(crate) fn prefixes(
        &self,
        namespaces: &HashSet<NamespaceHandle>,
        under: Option<&KeyPrefix>,
        most: usize,
    ) -> Result<Vec<Prefix>> {
        let mut nodes = self.nodes(namespaces);
        let mut by_depth: Vec<(u32, u64)> = nodes.iter().map(|(own, node)| (node.depth, *own)).collect();
        by_depth.sort_unstable();
        for (_, own) in by_depth.iter().rev() {
            add_to_parent(&mut nodes, *own);
        }
        let is_first = |node: &Node| nodes.get(&node.parent).is_none_or(|parent| parent.depth >= node.depth);
        let mut found: Vec<&Node> = match under {
            None => nodes.values().filter(|node| is_first(node)).collect(),
            Some(prefix) => {
                let (_, last) = common(&nodes, named(&nodes, prefix)?);
                let last = last.id.fingerprint();
                nodes.values().filter(|node| node.parent == last && !is_first(node)).collect()
            }
        };
        found.sort_unstable_by_key(|node| (std::cmp::Reverse(node.bytes), node.id));
        found.truncate(most);
        let (now_s, policies) = (self.now_s(), self.policies.lock());
        let told = found.into_iter().map(|node| {
            let (common_blocks, last) = common(&nodes, node);
            let memory = policies.memory(node.slot_bytes, node.id.fingerprint(), node.id.namespace.0.into());
            Prefix {
                id: node.id,
                depth: node.depth,
                common_blocks,
                branches: last.children,
                blocks: node.blocks,
                bytes: node.bytes,
                pinned_bytes: node.pinned_bytes,
                idle: Duration::from_secs(now_s.saturating_sub(node.used_s).into()),
                uses: memory.map(|memory| memory.uses),
            }
        });
        Ok(told.collect())
    }

    fn nodes(&self, namespaces: &HashSet<NamespaceHandle>) -> Nodes {
        let (mut nodes, mut after) = (Nodes::default(), None);
        loop {
            let state = self.state.lock();
            let (ids, last) = state.piece(after, |block| namespaces.contains(&block.id.namespace));
            for block in ids.iter().filter_map(|id| state.find(id)) {
                let id = RecordId { shard: 0, ..block.id };
                let slot_bytes = block.slot.bytes();
                let node = nodes.entry(id.fingerprint()).or_insert_with(|| Node {
                    id,
                    slot_bytes,
                    depth: block.depth,
                    parent: id.with_key(block.parent).fingerprint(),
                    children: 0,
                    child: 0,
                    blocks: 0,
                    bytes: 0,
                    pinned_bytes: 0,
                    used_s: 0,
                });
                node.blocks += 1;
                node.bytes += slot_bytes as u64;
                node.pinned_bytes += if block.is_pinned() { slot_bytes as u64 } else { 0 };
                node.used_s = node.used_s.max(block.used_s.load(Ordering::Relaxed));
            }
            drop(state);
            after = last;
            if after.is_none() {
                return nodes;
            }
        }
    }
}

/// Counts a block, and what continues it, as what continues its parent.
fn add_to_parent(nodes: &mut Nodes, own: u64) {
    let Some(&Node { parent, depth, blocks, bytes, pinned_bytes, used_s, .. }) = nodes.get(&own) else { return };
    // Whoever tells the depth wrong has no parent here: each is less deep than those that continue it.
    if let Some(parent) = nodes.get_mut(&parent).filter(|parent| parent.depth < depth) {
        parent.children += 1;
        parent.child = own;
        parent.blocks += blocks;
        parent.bytes += bytes;
        parent.pinned_bytes += pinned_bytes;
        parent.used_s = parent.used_s.max(used_s);
    }
}

/// How many blocks follow each other from this one on without a choice, itself included, and the last of them.
fn common<'a>(nodes: &'a Nodes, first: &'a Node) -> (u64, &'a Node) {
    let (mut count, mut last) = (1, first);
    while last.children == 1
        && let Some(next) = nodes.get(&last.child)
    {
        (count, last) = (count + 1, next);
    }
    (count, last)
}

/// The one block whose key begins so.
fn named<'a>(nodes: &'a Nodes, prefix: &KeyPrefix) -> Result<&'a Node> {
    let found: Vec<&Node> = nodes.values().filter(|node| prefix.begins(&node.id.key)).collect();
    check_one(found.iter().map(|node| node.id.key), prefix)?;
    // In several namespaces it is the same one.
    found.into_iter().min_by_key(|node| node.id).ok_or_else(|| none(prefix))
}

/// That all of these keys, which begin so, are one.
pub(super) fn check_one(keys: impl Iterator<Item = BlockKey>, prefix: &KeyPrefix) -> Result<()> {
    let keys: HashSet<BlockKey> = keys.collect();
    match keys.len() {
        0 => Err(none(prefix)),
        1 => Ok(()),
        several => {
            let message = format!("the keys of {several} blocks begin with '{prefix}'; give more digits");
            Err(Error::new(ErrorKind::InvalidInput, message))
        }
    }
}

fn none(prefix: &KeyPrefix) -> Error {
    let message =
        format!("no block in DRAM has a key that begins with '{prefix}'; pegaflow ls --prefixes shows what there is");
    Error::new(ErrorKind::NotFound, message)
}
