//! `pegaflow prewarm`: lets vLLM compute prompts offline, so that their blocks lie on the drive before anybody asks. What is
//! done is noted in a journal when it is durable; a run that was cut goes on there.

mod host;
mod journal;
mod progress;
mod prompts;
mod runner;

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use clap::Args;
use pegaflow_engine::{Error, ErrorKind, Result};
use pegaflow_server::ExitStatus;
use pegaflow_server::client::{Client, ClientConfig, Endpoint};
use pegaflow_server::settings::{Loaded, Source};
use serde_json::{Value, json};

use host::Host;
use journal::Journal;
use progress::Progress;
use prompts::{Place, PromptFile};
use runner::{BatchDone, Runner, RunnerConfig};

/// Prompts of a batch: at first, and at most. Between batches vLLM has nothing to do for a step, which is little beside
/// 256 prompts.
const BATCH_FIRST: usize = 16;
const BATCH_MAX: usize = 256;
/// Bytes of the lines of a batch.
const BATCH_BYTES_MAX: u64 = 16 << 20;
/// Batches in a row of which the cache took no block.
const REFUSALS_MAX: u32 = 3;
const FLUSH_TIMEOUT: Duration = Duration::from_secs(600);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Failed prompts that are named.
const FAILURES_MAX: usize = 20;

/// What is to be warmed, and by whom.
#[derive(Debug, Args)]
pub(crate) struct PrewarmOptions {
    /// A file with one JSON object a line: {"prompt": "..."}, {"prompt_token_ids": [...]} or {"messages": [...]}, with
    /// cache_salt, tools, chat_template_kwargs as vLLM takes them; or lines of an OpenAI batch. Other fields are ignored.
    #[arg(value_name = "PROMPTS")]
    prompts: PathBuf,
    /// The model and its options, exactly as they stand behind `vllm serve`: what is warmed is found by a vLLM that is
    /// started with the same.
    #[arg(value_name = "MODEL_AND_OPTIONS", last = true, required = true)]
    vllm: Vec<String>,
    /// Where it is noted which prompts are done. Default: PROMPTS.prewarmed. vLLM's log lies beside it, with .log behind
    /// its name.
    #[arg(long, value_name = "FILE")]
    journal: Option<PathBuf>,
    /// Forget what the journal says, and compute all prompts.
    #[arg(long)]
    again: bool,
    /// The Python that has vLLM and PegaFlow. Default: of the active environment, of the one that this program lies in,
    /// or python3.
    #[arg(long, value_name = "FILE")]
    python: Option<PathBuf>,
    /// The longest wait for the model, in seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 1800, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    start_timeout: u64,
    /// The longest wait for a batch of at most 256 prompts, in seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 7200, value_parser = clap::value_parser!(u64).range(1..=604_800))]
    batch_timeout: u64,
    /// Show what vLLM logs.
    #[arg(long)]
    verbose: bool,
}

/// What came of it.
#[derive(Debug, Default)]
struct Tally {
    done: u64,
    failed: u64,
    failures: Vec<(u64, String)>,
    tokens: u64,
    cached_tokens: u64,
    saved_blocks: u64,
    present_blocks: u64,
}

/// Does it; tells the outcome on standard output.
pub(crate) fn prewarm(loaded: &Loaded, options: &PrewarmOptions, is_json: bool) -> ExitCode {
    let outcome = warm(loaded, options, is_json);
    match outcome {
        Ok(status) => status.into(),
        Err(error) => super::failed(&error, is_json),
    }
}

fn warm(loaded: &Loaded, options: &PrewarmOptions, is_json: bool) -> Result<ExitStatus> {
    let prompts = PromptFile::read(&options.prompts)?;
    let stop = Arc::new(AtomicBool::new(false));
    let host = Host::start(has_own_store(loaded).then_some(&loaded.settings), &stop)?;
    let socket = match host.socket() {
        Some(socket) => socket.to_owned(),
        None => loaded.settings.socket.clone().unwrap_or_else(pegaflow_server::default_socket_path),
    };
    let outcome = Run::start(loaded, options, prompts, &socket, &stop).and_then(|run| run.finish(&stop));
    let ended = host.end();
    let (run, report) = outcome?;
    ended?;
    if is_json {
        println!("{report}");
    } else {
        run.print(&report);
    }
    Ok(if run.failed > 0 { ExitStatus::Failed } else { ExitStatus::Ok })
}

/// A store that is named on the command line is opened here; otherwise a running server is asked.
fn has_own_store(loaded: &Loaded) -> bool {
    let is_flag = |name: &str| loaded.effective.iter().any(|it| it.name == name && it.source == Source::Flag);
    loaded.settings.path.is_some() && (is_flag("path") || is_flag("config"))
}

/// A run over one file of prompts.
struct Run<'a> {
    options: &'a PrewarmOptions,
    prompts: PromptFile,
    journal: Journal,
    queue: VecDeque<Place>,
    skipped: u64,
    client: Client,
    runner: Runner,
    reclaimed_before: u64,
    failed_writes_before: u64,
}

impl<'a> Run<'a> {
    fn start(
        loaded: &Loaded,
        options: &'a PrewarmOptions,
        prompts: PromptFile,
        socket: &Path,
        stop: &Arc<AtomicBool>,
    ) -> Result<Self> {
        let endpoint = Endpoint::Unix(socket.to_owned());
        super::check_there(&endpoint)?;
        let client = Client::start(ClientConfig::new(endpoint, "pegaflow prewarm"))?;
        client.wait_connected(CONNECT_TIMEOUT)?;
        let stats = client.stats()?;
        if count(&stats, "nvme_capacity_bytes") == 0 {
            let message =
                "the server has no store: what is warmed would go with it; start it with --path, or give --path here";
            return Err(Error::new(ErrorKind::Unsupported, message));
        }
        let python = options.python.clone().unwrap_or_else(runner::python);
        let extra = json!({ "mode": "server", "socket": socket, "prewarm": true, "save_decode": false });
        eprintln!("pegaflow: {} prompts; vLLM loads the model", prompts.places.len());
        let config = RunnerConfig {
            python: &python,
            extra: &extra,
            vllm: &options.vllm,
            start_timeout: Duration::from_secs(options.start_timeout),
            batch_timeout: Duration::from_secs(options.batch_timeout),
            log: &beside(options, "log"),
            is_verbose: options.verbose,
        };
        let runner = Runner::start(&config, Arc::clone(stop))?;
        let cache = if has_own_store(loaded) { json!(loaded.settings.path) } else { json!(socket) };
        let of = json!({ "vllm": runner.about, "options": options.vllm, "cache": cache });
        let journal = Journal::open(&journal_path(options), &of, options.again)?;
        let queue: VecDeque<Place> = prompts.places.iter().filter(|place| !journal.has(&place.id)).copied().collect();
        let skipped = (prompts.places.len() - queue.len()) as u64;
        let (reclaimed_before, failed_writes_before) =
            (count(&stats, "reclaimed_regions"), count(&stats, "write_failed_records"));
        Ok(Self { options, prompts, journal, queue, skipped, client, runner, reclaimed_before, failed_writes_before })
    }

    /// Computes all that is not done; the sums, and all of it as JSON.
    fn finish(mut self, stop: &AtomicBool) -> Result<(Tally, Value)> {
        let mut tally = Tally::default();
        let bytes = self.queue.iter().map(|place| place.bytes).sum();
        let mut progress = Progress::new(bytes, self.queue.len() as u64);
        let outcome = self.batches(&mut tally, &mut progress);
        progress.end();
        if let Err(error) = outcome {
            let all = self.prompts.places.len() as u64;
            let is_asked = stop.load(std::sync::atomic::Ordering::Relaxed);
            let what = if is_asked { "stopped".to_owned() } else { error.message().to_owned() };
            let done = self.skipped + tally.done;
            let message = format!("{what}; {done} of {all} prompts are done, the same command goes on from there");
            return Err(Error::new(error.kind(), message));
        }
        let stats = self.client.stats()?;
        let report = self.report(&tally, &stats, progress.seconds());
        self.runner.end();
        self.client.close(Duration::from_secs(1));
        Ok((tally, report))
    }

    fn batches(&mut self, tally: &mut Tally, progress: &mut Progress) -> Result<()> {
        let (mut size, mut refusals) = (BATCH_FIRST, 0);
        while let Some(batch) = self.next_batch(size) {
            let prompts: Vec<Value> = batch
                .iter()
                .enumerate()
                .map(|(id, place)| {
                    let mut prompt = self.prompts.prompt(place)?;
                    if let Value::Object(fields) = &mut prompt {
                        fields.insert("id".into(), json!(id));
                    }
                    Ok(prompt)
                })
                .collect::<Result<_>>()?;
            let came = self.runner.run(&prompts)?;
            // Durable first, noted then.
            self.client.flush(FLUSH_TIMEOUT)?;
            self.check_writes()?;
            tally.saved_blocks += came.saved;
            if came.dropped > 0 {
                // DRAM was full of what the drive had not taken: fewer at a time, and what was computed is there already.
                refusals = if came.saved > 0 { 0 } else { refusals + 1 };
                if refusals >= REFUSALS_MAX {
                    let message = "the cache takes no blocks; see the server's log and `pegaflow status`";
                    return Err(Error::new(ErrorKind::Busy, message));
                }
                size = (batch.len() / 2).max(1);
                batch.into_iter().rev().for_each(|place| self.queue.push_front(place));
                continue;
            }
            refusals = 0;
            tally.present_blocks += came.present;
            size = (size * 2).min(BATCH_MAX);
            self.note(&batch, &came, tally)?;
            let bytes = batch.iter().map(|place| place.bytes).sum();
            progress.advance(bytes, batch.len() as u64, tally.tokens, tally.cached_tokens);
        }
        Ok(())
    }

    fn next_batch(&mut self, size: usize) -> Option<Vec<Place>> {
        let mut bytes = 0;
        let mut batch = Vec::new();
        while let Some(place) = self.queue.front()
            && batch.len() < size
            && (batch.is_empty() || bytes + place.bytes <= BATCH_BYTES_MAX)
        {
            bytes += place.bytes;
            batch.extend(self.queue.pop_front());
        }
        (!batch.is_empty()).then_some(batch)
    }

    fn note(&mut self, batch: &[Place], came: &BatchDone, tally: &mut Tally) -> Result<()> {
        let mut noted = Vec::new();
        for answer in &came.done {
            let Some(place) = batch.get(answer.id) else { continue };
            match &answer.error {
                Some(error) => {
                    tally.failed += 1;
                    if tally.failures.len() < FAILURES_MAX {
                        tally.failures.push((place.line, error.clone()));
                    }
                }
                None => {
                    tally.done += 1;
                    tally.tokens += answer.tokens;
                    tally.cached_tokens += answer.cached;
                    noted.push(place.id);
                }
            }
        }
        self.journal.note(noted)
    }

    /// A block that could not be written would be missing without a sign.
    fn check_writes(&self) -> Result<()> {
        let stats = self.client.stats()?;
        let failed = count(&stats, "write_failed_records").saturating_sub(self.failed_writes_before);
        if failed == 0 {
            return Ok(());
        }
        let message =
            format!("{failed} blocks could not be written to the drive; see `pegaflow status` and the server's log");
        Err(Error::new(ErrorKind::Io, message))
    }

    fn report(&self, tally: &Tally, stats: &Value, seconds: f64) -> Value {
        let failures: Vec<Value> =
            tally.failures.iter().map(|(line, error)| json!({ "line": line, "error": error })).collect();
        json!({
            "prompts": self.prompts.places.len(),
            "duplicates": self.prompts.duplicates,
            "done_before": self.skipped,
            "done": tally.done,
            "failed": tally.failed,
            "failures": failures,
            "prompt_tokens": tally.tokens,
            "cached_tokens": tally.cached_tokens,
            "saved_blocks": tally.saved_blocks,
            "present_blocks": tally.present_blocks,
            "reclaimed_regions": count(stats, "reclaimed_regions").saturating_sub(self.reclaimed_before),
            "seconds": (seconds * 10.0).round() / 10.0,
            "tokens_per_s": (tally.tokens as f64 / seconds.max(0.001)).round(),
            "journal": journal_path(self.options),
        })
    }
}

impl Tally {
    fn print(&self, report: &Value) {
        let number = |name: &str| report.get(name).and_then(Value::as_u64).unwrap_or_default();
        println!(
            "{} prompts are warm ({} of them before), {} were given twice; {} tokens, of which {} were cached, in {} s",
            self.done + number("done_before"),
            number("done_before"),
            number("duplicates"),
            self.tokens,
            self.cached_tokens,
            report.get("seconds").cloned().unwrap_or_default(),
        );
        for (line, error) in &self.failures {
            eprintln!("pegaflow: line {line}: {error}");
        }
        if self.failed > self.failures.len() as u64 {
            eprintln!("pegaflow: and {} prompts more have failed", self.failed - self.failures.len() as u64);
        }
        if number("reclaimed_regions") > 0 {
            eprintln!("pegaflow: the store was full, and gave up older blocks for these; make it larger (capacity)");
        }
    }
}

fn journal_path(options: &PrewarmOptions) -> PathBuf {
    options.journal.clone().unwrap_or_else(|| with_suffix(&options.prompts, "prewarmed"))
}

/// A file beside the journal.
fn beside(options: &PrewarmOptions, suffix: &str) -> PathBuf {
    with_suffix(&journal_path(options), suffix)
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".");
    name.push(suffix);
    name.into()
}

fn count(stats: &Value, name: &str) -> u64 {
    let inner = stats.get("engine").and_then(|engine| engine.get(name)).or_else(|| stats.get(name));
    inner.and_then(Value::as_u64).unwrap_or_default()
}
