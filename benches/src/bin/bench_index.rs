//! How fast lookups are and how much memory the index takes, at a given number of keys. Progress goes to standard error,
//! one JSON object to standard output, as its last line.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use clap::Parser;
use hdrhistogram::Histogram;
use pegaflow_benches::{PROMPT_BLOCKS, Records};
use pegaflow_tiers::{IndexChange, IndexLog, Location, RecordId, RegionMark, Table};
use rand::SeedableRng;
use rand::rngs::StdRng;

/// Changes in one commit of the log: about what a second of saves is.
const COMMIT_ROWS: usize = 4096;

/// Measures lookups of 2,048 keys, memory per key, and the time from open to the first hit.
#[derive(Parser)]
struct Arguments {
    /// How many keys the index holds. At least 2,048.
    #[arg(long, env = "KEYS", default_value_t = 1_000_000, value_parser = clap::value_parser!(u64).range(2048..=100_000_000))]
    keys: u64,
    /// How many lookups are measured; a tenth as many run before them.
    #[arg(long, env = "LOOKUPS", default_value_t = 5000, value_parser = clap::value_parser!(u64).range(10..=10_000_000))]
    lookups: u64,
    /// The seed of keys and of the prompts looked up.
    #[arg(long, env = "SEED", default_value_t = 1)]
    seed: u64,
    /// Where the store is made, in a new directory that is removed afterwards. Default: the directory for temporary files.
    #[arg(long)]
    directory: Option<PathBuf>,
}

/// Whatever answers lookups: the table, an engine in the process, a client at a socket.
trait Lookups {
    /// How many of the keys, from the first on, are known.
    fn lookup(&mut self, ids: &[RecordId]) -> Result<usize>;
}

/// The table of a store, asked as the engine asks it: by identity, with the fingerprints computed on the way.
struct TableLookups<'a> {
    table: &'a Table,
    fingerprints: Vec<u64>,
    found: Vec<Location>,
}

impl<'a> TableLookups<'a> {
    fn new(table: &'a Table) -> Self {
        Self { table, fingerprints: Vec::new(), found: Vec::new() }
    }
}

impl Lookups for TableLookups<'_> {
    fn lookup(&mut self, ids: &[RecordId]) -> Result<usize> {
        self.fingerprints.clear();
        self.fingerprints.extend(ids.iter().map(RecordId::fingerprint));
        self.table.prefix(&self.fingerprints, &mut self.found);
        Ok(self.found.len())
    }
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let directory = match &arguments.directory {
        Some(path) => tempfile::tempdir_in(path).with_context(|| format!("in {}", path.display()))?,
        None => tempfile::tempdir()?,
    };
    let index = directory.path().join("index");

    progress(&format!("making {} keys from seed {}", arguments.keys, arguments.seed));
    let records = Records::new(usize::try_from(arguments.keys)?, arguments.seed);
    progress("writing the index");
    write_log(&records, &index)?;

    progress("opening the index");
    let start = Instant::now();
    let table = open_table(&index)?;
    ensure!(TableLookups::new(&table).lookup(&records.ids()[..1])? == 1, "the first key is not found after the open");
    let open_first_hit = start.elapsed();

    progress(&format!("measuring {} lookups of {PROMPT_BLOCKS} keys", arguments.lookups));
    let in_process = measure(&mut TableLookups::new(&table), &records, &arguments)?;
    let micros = |nanos: u64| nanos as f64 / 1000.0;
    let report = serde_json::json!({
        "keys": table.len(),
        "lookup2048_p50_us": micros(in_process.value_at_quantile(0.5)),
        "lookup2048_p99_us": micros(in_process.value_at_quantile(0.99)),
        "socket_lookup2048_p99_us": serde_json::Value::Null,
        "bytes_per_key": table.memory_bytes() as f64 / table.len() as f64,
        "open_first_hit_ms": open_first_hit.as_secs_f64() * 1000.0,
    });
    println!("{report}");
    Ok(())
}

/// Writes all records as a store that ran would have: in commits, and without a last flush of the memtables.
fn write_log(records: &Records, path: &Path) -> Result<()> {
    let log = IndexLog::open(path)?;
    let mut batch = Vec::with_capacity(COMMIT_ROWS);
    let commit = |batch: &mut Vec<IndexChange>| {
        let mark = match batch.last() {
            Some(IndexChange::Put(row)) => RegionMark {
                region: row.location.region,
                generation: row.location.generation,
                page: row.location.page + row.location.pages,
                sequence: row.sequence,
            },
            _ => return Ok(()),
        };
        let result = log.commit(batch, &[mark]);
        batch.clear();
        result
    };
    for row in records.rows() {
        batch.push(IndexChange::Put(row));
        if batch.len() == COMMIT_ROWS {
            commit(&mut batch)?;
        }
    }
    commit(&mut batch)?;
    log.close();
    Ok(())
}

/// Fills a table from the log, as a store does when it opens.
fn open_table(path: &Path) -> Result<Table> {
    let start = Instant::now();
    let log = IndexLog::open(path)?;
    progress(&format!("the log was open after {} ms", start.elapsed().as_millis()));
    let table = Table::new();
    log.scan(&mut |row| {
        // The low half is what the table keeps of a parent.
        let parent = if row.parent.is_root() { 0 } else { row.id.with_key(row.parent).fingerprint() as u32 };
        table.insert(row.id.fingerprint(), parent, row.location);
        Ok(())
    })?;
    progress(&format!("the table was full after {} ms", start.elapsed().as_millis()));
    Ok(table)
}

/// Looks up whole prompts, drawn at random; the times are in nanoseconds.
fn measure(lookups: &mut dyn Lookups, records: &Records, arguments: &Arguments) -> Result<Histogram<u64>> {
    let mut random = StdRng::seed_from_u64(arguments.seed);
    let mut times = Histogram::new(3)?;
    let unmeasured = arguments.lookups / 10;
    for round in 0..unmeasured + arguments.lookups {
        // A copy, so that the keys are in the cache, as those of a request are that was just read.
        let prompt = records.ids()[records.random_prompt(&mut random)].to_vec();
        let start = Instant::now();
        let found = lookups.lookup(&prompt)?;
        let elapsed = start.elapsed();
        ensure!(found == prompt.len(), "a lookup found {found} of {} keys", prompt.len());
        if round >= unmeasured {
            times.record(u64::try_from(elapsed.as_nanos())?)?;
        }
    }
    Ok(times)
}

fn progress(what: &str) {
    // A closed standard error is no reason to stop.
    let _ = writeln!(std::io::stderr(), "bench-index: {what}");
}
