//! What a metric is, and how its values are collected. Labels have few values, which are checked when tests collect.

use pegaflow_engine::{Latencies, Stats};
use pegaflow_tiers::DriveUse;

use super::process::Process;

/// What metrics are made of: one moment of a server.
pub(crate) struct Now<'a> {
    pub(crate) stats: &'a Stats,
    pub(crate) server: ServerGauges,
    pub(crate) process: Process,
}

/// What only the server knows.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct ServerGauges {
    pub(crate) sessions: usize,
    pub(crate) operations: usize,
    pub(crate) is_ready: bool,
    /// Sampled spans that a collector has taken, has not taken, and that had no room to wait for it.
    pub(crate) spans: [u64; 3],
}

/// How a metric moves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Up and down.
    Gauge,
    /// Up; from 0 again after a restart.
    Counter,
    /// Counts of times up to bounds.
    Histogram,
}

/// What a value counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Unit {
    Bytes,
    BytesPerSecond,
    Blocks,
    Records,
    /// Sessions, requests, times that something happened: the name says which.
    Things,
    /// 1 or 0.
    Flag,
    /// 0 to 1.
    Ratio,
    Percent,
    Seconds,
    /// Seconds since 1970.
    UnixSeconds,
    Nanoseconds,
}

impl Unit {
    /// Its name in the reference.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Bytes => "bytes",
            Self::BytesPerSecond => "bytes per second",
            Self::Blocks => "blocks",
            Self::Records => "records",
            Self::Things => "count",
            Self::Flag => "1 or 0",
            Self::Ratio => "0 to 1",
            Self::Percent => "percent",
            Self::Seconds => "seconds",
            Self::UnixSeconds => "seconds since 1970",
            Self::Nanoseconds => "nanoseconds",
        }
    }
}

/// A label and the values that it may have.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Label {
    pub(crate) name: &'static str,
    pub(crate) values: LabelValues,
}

#[derive(Debug, Clone, Copy)]
pub(crate) enum LabelValues {
    /// One of these.
    OneOf(&'static [&'static str]),
    /// What it is, and the most values that there can be in one server.
    Few(&'static str, usize),
}

pub(crate) const fn one_of(name: &'static str, values: &'static [&'static str]) -> Label {
    Label { name, values: LabelValues::OneOf(values) }
}

pub(crate) const fn few(name: &'static str, what: &'static str, most: usize) -> Label {
    Label { name, values: LabelValues::Few(what, most) }
}

type Collect = fn(&Now<'_>, &mut Out);

/// One metric.
pub(crate) struct Metric {
    pub(crate) name: &'static str,
    pub(crate) kind: Kind,
    pub(crate) unit: Unit,
    pub(crate) labels: &'static [Label],
    pub(crate) help: &'static str,
    collect: Collect,
}

/// Metrics that belong together.
pub(crate) struct Group {
    pub(crate) title: &'static str,
    pub(crate) metrics: &'static [Metric],
}

pub(crate) const fn gauge(
    name: &'static str,
    unit: Unit,
    labels: &'static [Label],
    help: &'static str,
    collect: Collect,
) -> Metric {
    Metric { name, kind: Kind::Gauge, unit, labels, help, collect }
}

pub(crate) const fn counter(
    name: &'static str,
    unit: Unit,
    labels: &'static [Label],
    help: &'static str,
    collect: Collect,
) -> Metric {
    Metric { name, kind: Kind::Counter, unit, labels, help, collect }
}

pub(crate) const fn times(
    name: &'static str,
    labels: &'static [Label],
    help: &'static str,
    collect: Collect,
) -> Metric {
    Metric { name, kind: Kind::Histogram, unit: Unit::Seconds, labels, help, collect }
}

impl Metric {
    /// Its values at this moment.
    pub(crate) fn samples(&self, now: &Now<'_>) -> Vec<Sample> {
        let mut out = Out { labels: self.labels, samples: Vec::new() };
        (self.collect)(now, &mut out);
        out.samples
    }
}

/// One value.
pub(crate) struct Sample {
    /// Values of the labels, in their order.
    pub(crate) labels: Vec<String>,
    pub(crate) value: Value,
}

pub(crate) enum Value {
    Number(f64),
    Times(Latencies),
}

/// Where the values of one metric go.
pub(crate) struct Out {
    labels: &'static [Label],
    samples: Vec<Sample>,
}

/// What can be the value of a gauge or a counter.
pub(crate) trait Number {
    fn number(self) -> f64;
}

impl Out {
    /// The value of a metric without labels.
    pub(crate) fn one(&mut self, value: impl Number) {
        self.with(&[], value);
    }

    /// A value with the values of all labels.
    pub(crate) fn with(&mut self, labels: &[&str], value: impl Number) {
        self.push(labels, Value::Number(value.number()));
    }

    /// The values of each drive: of reads, of writes.
    pub(crate) fn by_drive(&mut self, now: &Now<'_>, values: fn(&DriveUse) -> (u64, u64)) {
        for drive in &now.stats.drive_uses {
            let (read, write) = values(drive);
            let path = &*drive.path.to_string_lossy();
            self.with(&[path, "read"], read);
            self.with(&[path, "write"], write);
        }
    }

    /// A histogram.
    pub(crate) fn times(&mut self, labels: &[&str], times: &Latencies) {
        self.push(labels, Value::Times(times.clone()));
    }

    fn push(&mut self, labels: &[&str], value: Value) {
        debug_assert!(self.are_declared(labels), "{labels:?} are not what the table has: {:?}", self.labels);
        self.samples.push(Sample { labels: labels.iter().map(|&label| label.to_owned()).collect(), value });
    }

    fn are_declared(&self, labels: &[&str]) -> bool {
        let is_declared = |(label, value): (&Label, &&str)| match label.values {
            LabelValues::OneOf(values) => values.contains(value),
            LabelValues::Few(..) => true,
        };
        let most = self.labels.iter().map(|label| match label.values {
            LabelValues::OneOf(values) => values.len(),
            LabelValues::Few(_, most) => most,
        });
        self.samples.len() < most.product()
            && self.labels.len() == labels.len()
            && self.labels.iter().zip(labels).all(is_declared)
    }
}

macro_rules! numbers {
    ($($integer:ty),*) => {
        $(impl Number for $integer {
            fn number(self) -> f64 {
                self as f64
            }
        })*
    };
}

numbers!(u8, u32, u64, usize, f64);

impl Number for bool {
    fn number(self) -> f64 {
        f64::from(u8::from(self))
    }
}
