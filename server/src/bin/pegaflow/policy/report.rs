//! What a replay prints: a table for people, a JSON object for programs.

use std::fmt;

use serde_json::{Map, Value, json};

use super::run::{Done, Who};

impl fmt::Display for Who {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Policy(policy) => f.pad(policy.name()),
            Self::Optimal => f.pad("optimal"),
            Self::Hurdle(hurdle) => f.pad(&format!("hurdle {hurdle}")),
        }
    }
}

impl Done {
    /// The share of references that any tier served.
    pub(super) fn hit(&self) -> f64 {
        (0..self.outcome.tiers.len()).map(|tier| self.outcome.hit_ratio(tier)).sum()
    }

    /// Blocks written to the last tier.
    pub(super) fn writes(&self) -> u64 {
        self.outcome.tiers.last().map_or(0, |tier| tier.writes)
    }
}

pub(super) fn print(results: &[Done], has_dram: bool) {
    let of = |who: &str, size: &str| results.iter().find(|done| done.who.to_string() == who && done.size.0 == size);
    let tiers = if has_dram { "     dram     drive" } else { "" };
    println!(
        "{:>10}  {:<11} {:>7}{tiers} {:>9} {:>12} {:>12}",
        "size", "policy", "hits", "writes", "writes/lru", "gap closed"
    );
    for done in results {
        let (lru, best) = (of("lru", &done.size.0), of("optimal", &done.size.0));
        let number = |number: Option<f64>| number.map_or_else(|| "-".into(), |number| format!("{number:.3}"));
        let ratio = number(lru.map(|lru| done.writes() as f64 / lru.writes().max(1) as f64));
        let gap = match (lru, best) {
            (Some(lru), Some(best)) if best.hit() > lru.hit() => {
                number(Some((done.hit() - lru.hit()) / (best.hit() - lru.hit())))
            }
            _ => number(None),
        };
        let tiers = match (has_dram, done.outcome.tiers.len()) {
            (true, 2) => format!("  {:>7.4}   {:>7.4}", done.outcome.hit_ratio(0), done.outcome.hit_ratio(1)),
            (true, _) => " ".repeat(19),
            _ => String::new(),
        };
        println!(
            "{:>10}  {:<11} {:>7.4}{tiers} {:>9} {ratio:>12} {gap:>12}",
            done.size.0,
            done.who,
            done.hit(),
            done.writes()
        );
    }
}

pub(super) fn json(trace: &str, results: &[Done]) -> Value {
    let (mut policies, mut pareto) = (Map::new(), Map::new());
    for done in results {
        let (group, name) = match done.who {
            Who::Hurdle(hurdle) => (&mut pareto, hurdle.to_string()),
            who => (&mut policies, who.to_string()),
        };
        let mut cell = json!({ "hit": done.hit(), "writes": done.writes() });
        if let (2, Some(cell)) = (done.outcome.tiers.len(), cell.as_object_mut()) {
            cell.insert("hit_dram".into(), done.outcome.hit_ratio(0).into());
            cell.insert("hit_drive".into(), done.outcome.hit_ratio(1).into());
        }
        let sizes = group.entry(name).or_insert_with(|| Value::Object(Map::new()));
        if let Some(sizes) = sizes.as_object_mut() {
            sizes.insert(done.size.0.clone(), cell);
        }
    }
    let mut object = json!({ "trace": trace, "policies": policies });
    if let (false, Some(object)) = (pareto.is_empty(), object.as_object_mut()) {
        object.insert("pareto".into(), Value::Object(pareto));
    }
    object
}
