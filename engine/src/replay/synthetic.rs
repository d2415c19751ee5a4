//! Workloads that are made up, for what no public trace shows. Seeded: the same seed gives the same requests. All last an
//! hour and name whole blocks only.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::str::FromStr;

use super::Trace;
use crate::policy::SplitMix;

const HOUR_MS: u64 = 3_600_000;

/// Which workload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Synthetic {
    /// People talking with four assistants: each turn makes the next more likely, a minute or two pass between them.
    Chat,
    /// Twenty kinds of agents, each with a long tool prompt of its own, working in quick steps and at times waiting for a
    /// person.
    Agents,
    /// Questions about documents, some of them asked about often, most of them once.
    Rag,
    /// [`Synthetic::Chat`] at half the rate, and batch jobs that read thousands of documents; one reads the same ones
    /// again every ten minutes.
    Scans,
}

impl Synthetic {
    /// All.
    pub const ALL: [Self; 4] = [Self::Chat, Self::Agents, Self::Rag, Self::Scans];

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Chat => "chat",
            Self::Agents => "agents",
            Self::Rag => "rag",
            Self::Scans => "scans",
        }
    }

    /// Its requests.
    pub fn trace(self, seed: u64) -> Trace {
        let mut maker = Maker { random: SplitMix::new(seed), next_id: 1, arrivals: BinaryHeap::new() };
        match self {
            Self::Chat => maker.chat(1.2),
            Self::Agents => maker.agents(),
            Self::Rag => maker.rag(),
            Self::Scans => {
                maker.chat(0.6);
                maker.scans();
            }
        }
        let mut trace = Trace::default();
        while let Some(Reverse((now_ms, _, ids))) = maker.arrivals.pop() {
            trace.push(now_ms, 0, ids);
        }
        trace
    }
}

impl FromStr for Synthetic {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let known = || Self::ALL.map(Self::name).join(", ");
        let found = Self::ALL.into_iter().find(|choice| choice.name() == text);
        found.ok_or_else(|| format!("'{text}' is no workload; there are {}", known()))
    }
}

struct Maker {
    random: SplitMix,
    next_id: u64,
    /// Arrival, number, blocks.
    arrivals: BinaryHeap<Reverse<(u64, u64, Vec<u64>)>>,
}

impl Maker {
    fn blocks(&mut self, count: usize) -> Vec<u64> {
        let begin = self.next_id;
        self.next_id += count as u64;
        (begin..self.next_id).collect()
    }

    fn between(&mut self, least: usize, most: usize) -> usize {
        least + self.random.below(most - least + 1)
    }

    fn happens(&mut self, chance: f64) -> bool {
        self.random.unit() < chance
    }

    /// Of a log-normal distribution, in ms.
    fn pause(&mut self, median_s: f64, spread: f64) -> u64 {
        // The sum of twelve even numbers is near enough to normal.
        let normal = (0..12).map(|_| self.random.unit()).sum::<f64>() - 6.0;
        (median_s * (spread * normal).exp() * 1000.0) as u64
    }

    /// Arrivals of a Poisson process, in ms.
    fn poisson(&mut self, per_s: f64) -> Vec<u64> {
        let mut now = 0.0;
        let mut arrivals = Vec::new();
        while now < HOUR_MS as f64 {
            arrivals.push(now as u64);
            now += -(1.0 - self.random.unit()).ln() / per_s * 1000.0;
        }
        arrivals
    }

    fn ask(&mut self, now_ms: u64, ids: &[u64]) {
        if now_ms < HOUR_MS {
            let number = self.arrivals.len() as u64;
            self.arrivals.push(Reverse((now_ms, number, ids.to_vec())));
        }
    }

    fn chat(&mut self, starts_per_s: f64) {
        let prompts: Vec<Vec<u64>> = [2, 4, 6, 12].into_iter().map(|blocks| self.blocks(blocks)).collect();
        for mut now in self.poisson(starts_per_s) {
            let at = self.random.below(prompts.len());
            let mut ids = prompts[at].clone();
            let patience = 0.4 + 0.2 * self.random.unit();
            for turn in 1.. {
                let new = if turn == 1 { self.between(1, 30) } else { self.between(1, 4) };
                let new = self.blocks(new);
                ids.extend(new);
                self.ask(now, &ids);
                let goes_on = (patience + 0.08 * f64::from(turn)).min(0.9);
                if !self.happens(goes_on) {
                    break;
                }
                now += self.pause(75.0, 0.9);
            }
        }
    }

    fn agents(&mut self) {
        let kinds: Vec<Vec<u64>> = (0..20)
            .map(|_| {
                let blocks = self.between(15, 60);
                self.blocks(blocks)
            })
            .collect();
        for mut now in self.poisson(0.35) {
            // Some kinds are much more popular than others.
            let at = self.random.below(kinds.len()).min(self.random.below(kinds.len()));
            let mut ids = kinds[at].clone();
            let steps = self.between(2, 30);
            for _ in 0..steps {
                let new = self.between(1, 4);
                let new = self.blocks(new);
                ids.extend(new);
                self.ask(now, &ids);
                now += if self.happens(0.08) { self.pause(180.0, 1.0) } else { self.pause(6.0, 0.8) };
            }
        }
    }

    fn rag(&mut self) {
        let system = self.blocks(3);
        let documents: Vec<Vec<u64>> = (0..4000)
            .map(|_| {
                let blocks = self.between(4, 40);
                self.blocks(blocks)
            })
            .collect();
        for mut now in self.poisson(2.5) {
            // Zipf-like: the rank is spread evenly in its logarithm.
            let rank = ((documents.len() as f64).powf(self.random.unit()) - 1.0) as usize;
            let mut ids = system.clone();
            ids.extend(&documents[rank.min(documents.len() - 1)]);
            // A key covers all before it, and all documents come after the same system prompt.
            loop {
                let question = self.blocks(1);
                ids.extend(question);
                self.ask(now, &ids);
                if !self.happens(0.25) {
                    break;
                }
                now += self.pause(40.0, 0.8);
            }
        }
    }

    fn scans(&mut self) {
        let system = self.blocks(4);
        let corpus: Vec<Vec<u64>> = (0..300).map(|_| self.blocks(20)).collect();
        for job in 0..12u64 {
            for at in 0..300u64 {
                let mut ids = system.clone();
                if job % 2 == 0 {
                    ids.extend(&corpus[at as usize]);
                } else {
                    let document = self.blocks(20);
                    ids.extend(document);
                }
                self.ask(job * 300_000 + at * 400, &ids);
            }
        }
    }
}
