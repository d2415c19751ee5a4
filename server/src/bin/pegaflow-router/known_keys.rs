//! Keys of blocks for the beginnings of prompts, as engines have told them: what a PegaFlow server can be asked about. The
//! router has texts and no tokens, so it takes a key for the text up to about where its tokens end; a guess that is off by a
//! little costs a worse choice of engine, never a wrong byte. Bounded: the oldest are forgotten.

use std::num::NonZeroUsize;
use std::sync::Arc;
use std::time::{Duration, Instant};

use lru::LruCache;
use pegaflow_engine::{BlockKey, HitTier, InstanceId, NamespaceId, TenantId};
use serde::Deserialize;
use serde_json::value::RawValue;
use serde_json::{Map, Value};

use crate::affinity::{Beginning, PIECE_BYTES};

/// The setting of the connector that asks for keys, and its answer.
pub(crate) const KEYS: &str = "pegaflow_keys";
/// Keys in one answer; the connector tells 32.
const TOLD_MAX: usize = 64;
/// The longest name of an instance that a server takes.
const INSTANCE_BYTES_MAX: usize = 256;
/// Pieces of prompts with a key, of about 150 bytes each.
const KEPT: NonZeroUsize = NonZeroUsize::new(65_536).unwrap();
/// A block that an engine has saved is found in its server after this time, unless it has gone again.
const SETTLED: Duration = Duration::from_secs(1);

/// What an engine tells of a prompt's blocks.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Told {
    /// The engine's name at its server, until it restarts.
    pub(crate) instance: InstanceId,
    pub(crate) tenant: Option<TenantId>,
    prompt_tokens: u64,
    /// Each with the number of tokens up to the end of its block, ascending.
    keys: Vec<(u64, BlockKey)>,
}

/// As it is written.
#[derive(Deserialize)]
struct Written {
    instance: String,
    tenant: Option<String>,
    prompt_tokens: u64,
    tokens: Vec<u64>,
    keys: Vec<String>,
}

#[derive(Deserialize)]
struct Answer<'a> {
    #[serde(borrow)]
    kv_transfer_params: Option<&'a RawValue>,
}

impl Told {
    /// Takes it out of an engine's answer: what it tells, if that makes sense, and the answer as the client would have got it
    /// without the question, every other byte as it was. `stays`: the client has asked for it, too.
    pub(crate) fn take(answer: &[u8], stays: bool) -> (Option<Self>, Option<Vec<u8>>) {
        let Ok(Answer { kv_transfer_params: Some(written) }) = serde_json::from_slice(answer) else {
            return (None, None);
        };
        let Ok(mut parameters) = serde_json::from_str::<Map<String, Value>>(written.get()) else { return (None, None) };
        let Some(told) = parameters.remove(KEYS) else { return (None, None) };
        let told = serde_json::from_value(told).ok().and_then(Self::check);
        let start = written.get().as_ptr().addr().saturating_sub(answer.as_ptr().addr());
        let (before, after) = (answer.get(..start), answer.get(start + written.get().len()..));
        let (Some(before), Some(after), false) = (before, after, stays) else { return (told, None) };
        let left = if parameters.is_empty() { "null".into() } else { Value::Object(parameters).to_string() };
        (told, Some([before, left.as_bytes(), after].concat()))
    }

    fn check(written: Written) -> Option<Self> {
        let Written { instance, tenant, prompt_tokens, tokens, keys } = written;
        let is_ascending =
            tokens.first().is_some_and(|first| *first > 0) && tokens.is_sorted_by(|one, next| one < next);
        let is_within = tokens.last().is_some_and(|last| *last <= prompt_tokens) && keys.len() <= TOLD_MAX;
        let is_named = (1..=INSTANCE_BYTES_MAX).contains(&instance.len());
        if keys.len() != tokens.len() || !is_ascending || !is_within || !is_named {
            return None;
        }
        let tenant = tenant.map(|name| TenantId::new(&name)).transpose().ok()?;
        let keys = keys.iter().map(|key| key_of(key)).collect::<Option<Vec<BlockKey>>>()?;
        Some(Self {
            instance: InstanceId(instance.into()),
            tenant,
            prompt_tokens,
            keys: tokens.into_iter().zip(keys).collect(),
        })
    }

    /// The deepest key whose text ends before so many bytes of the prompt, if its tokens are of one length.
    fn key_up_to(&self, end: usize, prompt_bytes: usize) -> Option<BlockKey> {
        let ends_before =
            |tokens: u64| u128::from(tokens) * prompt_bytes as u128 <= end as u128 * u128::from(self.prompt_tokens);
        self.keys.iter().rev().find(|(tokens, _)| ends_before(*tokens)).map(|(_, key)| *key)
    }
}

/// A key in 64 hex digits.
fn key_of(text: &str) -> Option<BlockKey> {
    blake3::Hash::from_hex(text).ok().map(|bytes| BlockKey::from_bytes(*bytes.as_bytes()))
}

/// Where blocks are at home: the same in all servers.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Home {
    pub(crate) namespace: NamespaceId,
    pub(crate) tenant: Option<TenantId>,
}

#[derive(Debug)]
struct Claim {
    key: BlockKey,
    home: Arc<Home>,
    /// Engines by number.
    told_by: u64,
    told_at: Instant,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct KnownKeys {
    known: LruCache<u64, Claim>,
}

impl KnownKeys {
    pub(crate) fn new() -> Self {
        Self { known: LruCache::new(KEPT) }
    }

    /// An engine has told keys of a prompt with this beginning.
    pub(crate) fn note(&mut self, beginning: &Beginning, told: &Told, home: &Arc<Home>, engine: usize, now: Instant) {
        for (digest, end) in beginning.pieces().iter().zip((PIECE_BYTES..).step_by(PIECE_BYTES)) {
            let Some(key) = told.key_up_to(end, beginning.prompt_bytes()) else { continue };
            let known = self.known.get(digest).filter(|known| known.key == key && known.home == *home);
            let told_by = known.map_or(0, |known| known.told_by) | 1 << engine;
            self.known.put(*digest, Claim { key, home: Arc::clone(home), told_by, told_at: now });
        }
    }

    /// What a server is to be asked about a beginning, if anything of it is known.
    pub(crate) fn question(&mut self, beginning: &Beginning, now: Instant) -> Option<Question> {
        let pieces = beginning.pieces();
        let home = pieces.iter().rev().find_map(|digest| Some(Arc::clone(&self.known.get(digest)?.home)))?;
        let mut asked: Vec<Asked> = Vec::new();
        for (number, digest) in pieces.iter().enumerate() {
            let Some(claim) = self.known.peek(digest).filter(|claim| claim.home == home) else { continue };
            let share = (number + 1) as f64 / pieces.len() as f64;
            match asked.last_mut().filter(|last| last.key == claim.key) {
                Some(last) => last.share = share,
                None => {
                    let is_settled = now.saturating_duration_since(claim.told_at) >= SETTLED;
                    let saved_by = if is_settled { claim.told_by } else { 0 };
                    asked.push(Asked { key: claim.key, share, saved_by });
                }
            }
        }
        Some(Question { home, asked })
    }
}

/// What is known of a beginning.
#[derive(Debug)]
pub(crate) struct Question {
    pub(crate) home: Arc<Home>,
    /// At most one for each piece, shortest first.
    asked: Vec<Asked>,
}

#[derive(Debug)]
struct Asked {
    key: BlockKey,
    /// Of the beginning, up to where this is the deepest key.
    share: f64,
    /// Engines that have told it, long enough ago that their servers have had it.
    saved_by: u64,
}

/// How much of a beginning the server of an engine holds, as shares of it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Held {
    pub(crate) dram: f64,
    /// In DRAM or on the drive.
    pub(crate) stored: f64,
    /// What the engine may still have of its own: what its server has lost since, it has lost before.
    pub(crate) own_max: f64,
}

impl Held {
    pub(crate) const NOTHING: Self = Self { dram: 0.0, stored: 0.0, own_max: 1.0 };
}

impl Question {
    pub(crate) fn keys(&self) -> Vec<BlockKey> {
        self.asked.iter().map(|asked| asked.key).collect()
    }

    /// What an engine's server holds, by its answer: a tier for each key. Only what is there without gaps counts.
    pub(crate) fn held(&self, tiers: &[Option<HitTier>], engine: usize) -> Held {
        let share_while = |is_held: &dyn Fn(Option<HitTier>) -> bool| {
            let held = self.asked.iter().zip(tiers).take_while(|(_, tier)| is_held(**tier));
            held.last().map_or(0.0, |(asked, _)| asked.share)
        };
        let stored = share_while(&|tier| tier.is_some());
        let lost = self.asked.iter().zip(tiers).find(|(_, tier)| tier.is_none()).map(|(asked, _)| asked);
        let had_it = lost.is_some_and(|lost| lost.saved_by >> engine & 1 == 1);
        Held {
            dram: share_while(&|tier| tier == Some(HitTier::Dram)),
            stored,
            own_max: if had_it { stored } else { 1.0 },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn hex(number: u8) -> String {
        format!("{number:02x}").repeat(32)
    }

    fn key(number: u8) -> BlockKey {
        BlockKey::from_bytes([number; 32])
    }

    /// Of a prompt of 100 tokens: a key after every 25.
    fn told() -> Told {
        let keys = (1..=4_u8).map(|number| (u64::from(number) * 25, key(number))).collect();
        Told { instance: InstanceId("engine".into()), tenant: None, prompt_tokens: 100, keys }
    }

    fn home(namespace: u8, tenant: Option<&str>) -> Arc<Home> {
        let tenant = tenant.map(|name| TenantId::new(name).expect("a name"));
        Arc::new(Home { namespace: NamespaceId::from_bytes([namespace; 32]), tenant })
    }

    fn prompt(shared: usize, own: u8) -> Beginning {
        let text = [vec![b'a'; shared * PIECE_BYTES], vec![own; (8 - shared) * PIECE_BYTES]].concat();
        Beginning::new("m", None, &text)
    }

    #[test]
    fn keys_are_taken_out_of_an_answer_and_all_else_stays_as_it_was() {
        let keys = json!({"instance": "e/0", "tenant": "salt-1", "prompt_tokens": 40, "tokens": [16, 32],
                          "keys": [hex(1), hex(2)]});
        let text = |parameters: &Value| {
            format!(r#"{{"z": 0.10000000000000000555, "kv_transfer_params" : {parameters} , "a":"\u00e9"}}"#)
        };
        let answer = text(&json!({"pegaflow_keys": keys}));
        let (taken, left) = Told::take(answer.as_bytes(), false);
        let taken = taken.expect("told");
        assert_eq!((&*taken.instance.0, &taken.keys[..]), ("e/0", &[(16, key(1)), (32, key(2))][..]));
        assert_eq!(taken.tenant.expect("there").as_str(), "salt-1");
        assert_eq!(String::from_utf8(left.expect("changed")).expect("text"), text(&Value::Null));
        let (taken, left) = Told::take(answer.as_bytes(), true);
        assert!(taken.is_some() && left.is_none(), "who has asked is told");
        let both = text(&json!({"pegaflow_keys": keys, "pegaflow_tokens": 32}));
        let left = Told::take(both.as_bytes(), false).1.expect("changed");
        assert_eq!(String::from_utf8(left).expect("text"), text(&json!({"pegaflow_tokens": 32})));
        for nothing in ["", "[]", "{", "{}", r#"{"kv_transfer_params": null}"#, r#"{"kv_transfer_params": {"a": 1}}"#] {
            assert_eq!(Told::take(nothing.as_bytes(), false), (None, None), "{nothing}");
        }
    }

    #[test]
    fn what_makes_no_sense_is_not_believed() {
        let good =
            json!({"instance": "e", "tenant": null, "prompt_tokens": 40, "tokens": [16, 32], "keys": [hex(1), hex(2)]});
        let take =
            |told: &Value| Told::take(json!({"kv_transfer_params": {KEYS: told}}).to_string().as_bytes(), false).0;
        assert!(take(&good).is_some());
        let many: Vec<u64> = (1..=65).collect();
        for (name, value) in [
            ("tokens", json!([32, 16])),
            ("tokens", json!([16])),
            ("tokens", json!([16, 41])),
            ("tokens", json!([0, 16])),
            ("tokens", json!([-1, 16])),
            ("tokens", json!([])),
            ("keys", json!([hex(1), "ab"])),
            ("keys", json!([hex(1), 7])),
            ("tenant", json!("no name")),
            ("instance", json!(7)),
            ("instance", json!("")),
            ("instance", json!("e".repeat(257))),
        ] {
            let mut bad = good.clone();
            bad[name] = value;
            assert_eq!(take(&bad), None, "{bad}");
        }
        let keys: Vec<String> = many.iter().map(|_| hex(1)).collect();
        assert_eq!(take(&json!({"instance": "e", "prompt_tokens": 99, "tokens": many, "keys": keys})), None);
    }

    #[test]
    fn another_prompt_is_asked_about_up_to_where_it_is_the_same() {
        let (mut known, now) = (KnownKeys::new(), Instant::now());
        known.note(&prompt(4, b'b'), &told(), &home(1, None), 0, now);
        assert_eq!(known.question(&prompt(4, b'b'), now).expect("known").keys(), [1, 2, 3, 4].map(key));
        let other = known.question(&prompt(4, b'c'), now).expect("known");
        assert_eq!(other.keys(), [1, 2].map(key));
        let held = other.held(&[Some(HitTier::Dram), Some(HitTier::Nvme)], 0);
        assert_eq!(held, Held { dram: 0.375, stored: 0.5, own_max: 1.0 });
        assert_eq!(other.held(&[None, Some(HitTier::Dram)], 0), Held::NOTHING, "with a gap nothing can be loaded");
        assert!(known.question(&prompt(0, b'c'), now).is_none());
        let salted = Beginning::new("m", Some("s"), &[b'a'; 4 * PIECE_BYTES]);
        assert!(known.question(&salted, now).is_none(), "of another tenant nothing is known");
    }

    #[test]
    fn keys_of_another_home_are_not_asked_about_together() {
        let (mut known, now) = (KnownKeys::new(), Instant::now());
        known.note(&prompt(8, b'b'), &told(), &home(1, None), 0, now);
        let mut half = told();
        half.keys.truncate(1);
        known.note(&prompt(4, b'c'), &half, &home(2, Some("t")), 0, now);
        let question = known.question(&prompt(4, b'c'), now).expect("known");
        assert_eq!((question.keys(), &question.home), (vec![key(1)], &home(2, Some("t"))));
        let question = known.question(&prompt(8, b'b'), now).expect("known");
        assert_eq!((question.keys(), &question.home), ([2, 3, 4].map(key).to_vec(), &home(1, None)));
    }

    #[test]
    fn what_the_server_has_lost_the_engine_that_saved_it_has_lost() {
        let (mut known, now) = (KnownKeys::new(), Instant::now());
        known.note(&prompt(8, b'b'), &told(), &home(1, None), 3, now);
        let tiers = [Some(HitTier::Dram), None, None, None];
        let soon = known.question(&prompt(8, b'b'), now).expect("known");
        assert_eq!(soon.held(&tiers, 3).own_max, 1.0, "it may be on its way still");
        let later = known.question(&prompt(8, b'b'), now + SETTLED).expect("known");
        assert_eq!(later.held(&tiers, 3).own_max, later.held(&tiers, 3).stored);
        assert_eq!(later.held(&tiers, 2).own_max, 1.0, "another engine has never said that it saved it");
    }

    #[test]
    fn what_is_kept_is_bounded() {
        let (mut known, now) = (KnownKeys::new(), Instant::now());
        for number in 0..400_u32 {
            let text: Vec<u8> = number.to_le_bytes().repeat(256 * PIECE_BYTES / 4);
            known.note(&Beginning::new("m", None, &text), &told(), &home(1, None), 0, now);
        }
        assert_eq!(known.known.len(), KEPT.get());
    }
}
