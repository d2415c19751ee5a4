//! The command line of operators: asks a running server over its socket, and checks stores that no server has open.
#![deny(unsafe_code)]

mod bench;
mod doctor;
mod duration;
mod job;
mod manual;
mod namespaces;
mod pack;
mod pins;
mod policy;
mod prewarm;
mod remote;
mod scrub;
mod settings;
mod size;
mod top;
mod warm;

use std::ffi::OsString;
use std::fmt::Display;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::{CommandFactory, Parser, Subcommand};
use indicatif::{ProgressBar, ProgressStyle};
use pegaflow_engine::{
    ByteSize, EncryptionKey, Error, ErrorKind, FsckReport, Latencies, LoadPolicy, Result, StorePaths, fsck_with_key,
};
use pegaflow_server::ExitStatus;
use pegaflow_server::client::{Client, ClientConfig, Endpoint, Token};
use serde_json::{Value, json};

use namespaces::{ListOptions, PurgeOptions};
use pack::PackCommand;
use pegaflow_server::pack::cannot_read;
use pegaflow_server::settings::{Settings, told};
use pins::{PinOptions, UnpinOptions};
use policy::PolicyCommand;
use prewarm::PrewarmOptions;
use remote::TokenCommand;
use scrub::ScrubOptions;
use settings::ConfigCommand;
use size::SizeOptions;
use top::TopOptions;
use warm::{EvictOptions, WarmOptions};

/// Asks a running pegaflow-server, or checks a store that none has open.
///
/// Exit status: 0 done, 1 failed (also: `verify` has found problems that it did not repair), 2 invalid command line or
/// configuration, 3 not found, 4 refused (permission, foreign or newer store), 5 unavailable (no server, no answer in time, in
/// use by another process).
#[derive(Debug, Parser)]
#[command(name = "pegaflow", version)]
struct Options {
    /// The server's Unix socket. Default: $XDG_RUNTIME_DIR/pegaflow/pegaflow.sock, or /tmp/pegaflow-UID/pegaflow.sock.
    #[arg(long, env = "PEGAFLOW_SOCKET", value_name = "PATH", global = true)]
    socket: Option<PathBuf>,
    /// The server's loopback TCP address, instead of the socket.
    #[arg(long, value_name = "ADDRESS", global = true, conflicts_with = "socket")]
    tcp: Option<SocketAddr>,
    /// The server at another place: https://HOST:PORT, with --ca and --token-file, or http://ADDRESS:PORT on loopback.
    #[arg(long, env = "PEGAFLOW_SERVER", value_name = "URL", global = true, conflicts_with_all = ["socket", "tcp"])]
    server: Option<String>,
    /// The authorities that may vouch for that server, in PEM.
    #[arg(long, env = "PEGAFLOW_CA", value_name = "FILE", global = true)]
    ca: Option<PathBuf>,
    /// A file with the token to show it.
    #[arg(long, env = "PEGAFLOW_TOKEN_FILE", value_name = "FILE", global = true)]
    token_file: Option<PathBuf>,
    /// A certificate to show it, in PEM, where it asks for one; with --client-key.
    #[arg(long, env = "PEGAFLOW_CLIENT_CERT", value_name = "FILE", global = true, requires = "client_key")]
    client_cert: Option<PathBuf>,
    /// The key of that certificate.
    #[arg(long, env = "PEGAFLOW_CLIENT_KEY", value_name = "FILE", global = true, requires = "client_cert")]
    client_key: Option<PathBuf>,
    /// The longest wait for a connection, in seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 5, global = true,
          value_parser = clap::value_parser!(u64).range(1..=600))]
    connect_timeout: u64,
    /// Prints one JSON object instead of text; an error is one, too.
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Runs the server. The same as pegaflow-server.
    Serve {
        #[command(flatten)]
        settings: Box<Settings>,
    },
    /// Checks settings, or shows which of them hold. Needs no server; takes the same options as `serve`.
    Config {
        #[command(subcommand)]
        command: ConfigCommand,
    },
    /// Looks at this machine with the server's settings in hand: drives (and how fast they are), memory, limits, kernel,
    /// GPUs, permissions. Says what is slow, missing or wrong, and what mends it. Takes the same options as `serve`.
    ///
    /// Exit status 1 if something is wrong.
    Doctor {
        #[command(flatten)]
        settings: Box<Settings>,
        /// Do not write and read 512 MiB on each drive to see how fast it is.
        #[arg(long)]
        no_measure: bool,
    },
    /// Prints the server's counters and gauges.
    #[command(alias = "stats")]
    Status,
    /// Shows what the server does, every second: a screen on a terminal (q quits), a line for each moment elsewhere, a JSON
    /// object for each with --json.
    Top {
        #[command(flatten)]
        options: TopOptions,
    },
    /// Makes everything saved so far durable.
    Flush {
        /// The longest wait, in seconds.
        #[arg(long, value_name = "SECONDS", default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..=600))]
        timeout: u64,
    },
    /// Measures a running server as an engine would use it: saves random blocks, loads them out of DRAM and off the drives, looks
    /// them up, compares every byte, and purges them. Beside the speed of a plain copy, and of the drives as the server knows it.
    ///
    /// Takes room in DRAM and on the drive from what is cached there; loads of engines wait for it. Exit status 1 if a byte was wrong.
    Bench {
        #[command(flatten)]
        options: bench::BenchOptions,
    },
    /// Says whether the server answers, and how fast.
    Ping,
    /// Lists namespaces: model and tenant, instances, blocks and bytes in DRAM and on the drive, hits, last use; the last two
    /// since the server was started. And pins; with --prefixes also the prefixes in DRAM.
    Ls {
        #[command(flatten)]
        options: ListOptions,
    },
    /// Purges namespaces: nothing of them is found again, also after a crash. In an encrypted store their keys are destroyed, and
    /// the data with them. Engines that run go on, with an empty cache.
    ///
    /// Asks first on a terminal. Namespaces go as a whole: a prefix, or what is old of one, leaves DRAM with `evict`. Exit status 3
    /// if nothing matches.
    Purge {
        #[command(flatten)]
        options: PurgeOptions,
    },
    /// Checks stores that no server has open: every row of the index against its record, every record against its row.
    ///
    /// Exit status 0 if nothing disagrees (any more), 1 if something does.
    Verify {
        /// Directories of stores: homes, and the drives that belong to them.
        #[arg(value_name = "PATH", required = true)]
        paths: Vec<PathBuf>,
        /// Drops rows that disagree, puts missing ones back, removes an index that can not be used.
        #[arg(long)]
        repair: bool,
        /// The key of encrypted stores, in a file; see `serve`.
        #[arg(long, env = "PEGAFLOW_ENCRYPTION_KEY_FILE", value_name = "FILE")]
        encryption_key_file: Option<PathBuf>,
        /// A command that prints it.
        #[arg(
            long,
            env = "PEGAFLOW_ENCRYPTION_KEY_COMMAND",
            value_name = "COMMAND",
            conflicts_with = "encryption_key_file"
        )]
        encryption_key_command: Option<String>,
    },
    /// Has a running server read and check every record of its store now, beside its background scrub, whose pace and place
    /// stay as they are. Damaged records are found no more. Ctrl-C ends the waiting, not the scrub: `--look` shows it, `--stop`
    /// ends it.
    ///
    /// Exit status 1 if damaged records were found or not all were seen, 5 if one is running already.
    Scrub {
        #[command(flatten)]
        options: ScrubOptions,
    },
    /// Has a running server bring to DRAM what its drives have of namespaces, or of all: the most used blocks first, then the
    /// youngest, as far as there is free room. Ctrl-C ends the waiting, not the run: `--look` shows it, `--stop` ends it.
    ///
    /// Exit status 0 also if DRAM has no room for all, 1 if it was stopped or failed, 5 if another run goes on.
    Warm {
        #[command(flatten)]
        options: WarmOptions,
    },
    /// Has blocks leave the DRAM of a running server: all of namespaces, what continues a prefix, or what nobody has used for
    /// some time; but not those that its drives do not have yet and those that somebody uses or has pinned. What the drives
    /// have stays there. `purge` takes namespaces out for good.
    ///
    /// Exit status 3 if nothing matches.
    Evict {
        #[command(flatten)]
        options: EvictOptions,
    },
    /// Keeps blocks that are in the DRAM of a running server there, whatever else needs room: those of namespaces, or of a prefix.
    /// At most half of DRAM is pinned in all. A pin ends at its --ttl, by `unpin`, with a purge of its blocks and with the server. What
    /// comes to DRAM later is not pinned: `warm --pin` brings it there first.
    ///
    /// Exit status 2 if more than half of DRAM would be pinned, 3 if nothing matches, 5 with 64 pins.
    Pin {
        #[command(flatten)]
        options: PinOptions,
    },
    /// Ends a pin, or lets go of all that is pinned of namespaces. The blocks stay in DRAM until others need their room.
    ///
    /// Exit status 3 if there is no such pin or namespace.
    Unpin {
        #[command(flatten)]
        options: UnpinOptions,
    },
    /// Explains why blocks that were found were loaded or computed, and what came of it.
    Explain {
        /// vLLM's name of the request, with or without its random end. Without it: the latest of all requests.
        request: Option<String>,
        /// At most so many decisions, the newest first.
        #[arg(long, value_name = "NUMBER", default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=1024))]
        last: u32,
    },
    /// Says whether blocks that are found are loaded; with a policy, changes that at once.
    LoadPolicy {
        /// auto, always, never or shadow.
        policy: Option<LoadPolicy>,
    },
    /// Compares policies of what is kept, on traces of requests. Needs no server.
    Policy {
        #[command(subcommand)]
        command: PolicyCommand,
    },
    /// Carries blocks from one store to another in a signed file. The stores may not be open in a server.
    Pack {
        #[command(subcommand)]
        command: PackCommand,
    },
    /// Lets vLLM compute prompts offline, so that a vLLM that is started with the same model and options finds them on the
    /// drive. A run that was cut goes on where it was.
    ///
    /// With --path (or --config) the store there is opened, which no server may have open; else the server at --socket is
    /// asked. Example: pegaflow prewarm prompts.jsonl --path /nvme/kv -- Qwen/Qwen3-8B --max-model-len 32768
    ///
    /// What the drive has comes to a running server's DRAM with `pegaflow warm`, and stays there with its --pin and --ttl.
    Prewarm {
        #[command(flatten)]
        settings: Box<Settings>,
        #[command(flatten)]
        options: Box<PrewarmOptions>,
    },
    /// Prints the script that has a shell complete commands and options. Needs no server.
    ///
    /// bash: pegaflow completions bash > ~/.local/share/bash-completion/completions/pegaflow
    Completions {
        /// bash, zsh, fish, elvish or powershell.
        shell: clap_complete::Shell,
    },
    /// Writes the manual, a page for each command, into a directory. Needs no server.
    Man {
        /// Made if missing; such as ~/.local/share/man/man1.
        #[arg(value_name = "DIRECTORY")]
        folder: PathBuf,
    },
    /// Says what a model needs: bytes of a token, tokens that fit into DRAM and drives, the speed of a drive from which on
    /// loading beats computing, memory for the index. Needs no server and no GPU.
    ///
    /// Example: pegaflow size --model config.json --gpu h200 --dram 256GiB --nvme 7TB --drive-read 6.5GB
    Size {
        #[command(flatten)]
        options: Box<SizeOptions>,
    },
    /// Makes tokens for clients over TCP. Needs no server.
    Token {
        #[command(subcommand)]
        command: TokenCommand,
    },
    /// Tries now to open a store again that went out of use, instead of at the server's next attempt.
    Reopen {
        /// The longest wait, in seconds.
        #[arg(long, value_name = "SECONDS", default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..=600))]
        timeout: u64,
    },
}

fn main() -> ExitCode {
    let arguments: Vec<OsString> = std::env::args_os().collect();
    if let Some(path) = settings::asked_for(&Options::command(), &arguments) {
        return settings::command(&Options::command(), path, &arguments);
    }
    let options = match Options::try_parse_from(&arguments) {
        Ok(options) => options,
        Err(error) => {
            if error.use_stderr() && arguments.iter().any(|argument| argument == "--json") {
                print_error(ErrorKind::InvalidInput, &told(&error));
            }
            error.exit()
        }
    };
    let outcome = match &options.command {
        Command::Verify { paths, repair, encryption_key_file, encryption_key_command } => {
            let key = match (encryption_key_file, encryption_key_command) {
                (Some(path), _) => EncryptionKey::from_file(path).map(Some),
                (None, Some(command)) => EncryptionKey::from_command(command).map(Some),
                (None, None) => Ok(None),
            };
            key.and_then(|key| verify(paths, key.as_ref(), *repair, options.json))
        }
        Command::Pack { command } => pack::without_store(command, options.json).unwrap_or(Ok(ExitStatus::Ok)),
        Command::Policy { command } => policy::policy(command, options.json).map(|()| ExitStatus::Ok),
        Command::Completions { shell } => {
            manual::completions(Options::command(), *shell, options.json).map(|()| ExitStatus::Ok)
        }
        Command::Man { folder } => manual::man(Options::command(), folder, options.json).map(|()| ExitStatus::Ok),
        Command::Size { options: of_model } => size::size(of_model, options.json).map(|()| ExitStatus::Ok),
        Command::Token { command } => remote::token(command, options.json).map(|()| ExitStatus::Ok),
        _ => run(&options),
    };
    match outcome {
        Ok(status) => status.into(),
        Err(error) => failed(&error, options.json),
    }
}

/// What `--json` prints of a failure.
fn print_error(kind: ErrorKind, message: &str) {
    println!("{}", json!({ "error": { "kind": format!("{kind:?}"), "message": message } }));
}

/// Tells why it failed.
fn failed(error: &Error, is_json: bool) -> ExitCode {
    if is_json {
        print_error(error.kind(), &format!("{error:#}"));
    }
    eprintln!("pegaflow: {error:#}");
    ExitStatus::from(error.kind()).into()
}

fn run(options: &Options) -> Result<ExitStatus> {
    let endpoint = remote::endpoint(options)?;
    check_there(&endpoint)?;
    let mut config = ClientConfig::new(endpoint, "pegaflow command line");
    config.token = options.token_file.as_deref().map(Token::read).transpose()?;
    let client = Client::start(config.clone())?;
    client.wait_connected(Duration::from_secs(options.connect_timeout))?;
    if let Command::Top { options: top } = &options.command {
        let shown = top::top(&client, top, options.json);
        client.close(Duration::from_secs(1));
        return shown.map(|()| ExitStatus::Ok);
    }
    let (answer, status) = match &options.command {
        Command::Scrub { options: of_scrub } => scrub::scrub(&client, of_scrub, options.json)?,
        Command::Warm { options: of_warm } => warm::warm(&client, of_warm, options.json)?,
        Command::Bench { options: of_bench } => bench::bench(&client, config, of_bench, options.json)?,
        command => (ask(&client, command, options.json)?, ExitStatus::Ok),
    };
    if options.json {
        println!("{answer}");
    }
    client.close(Duration::from_secs(1));
    Ok(status)
}

/// What the server says, as JSON; also as text if that is wanted.
fn ask(client: &Client, command: &Command, is_json: bool) -> Result<Value> {
    let tell = |text: &dyn Display| {
        if !is_json {
            println!("{text}");
        }
    };
    Ok(match command {
        Command::Status => {
            let stats = client.stats()?;
            if !is_json {
                print_stats(&stats);
            }
            stats
        }
        Command::Flush { timeout } => {
            client.flush(Duration::from_secs(*timeout))?;
            tell(&"flushed");
            json!({ "flushed": true })
        }
        Command::Reopen { timeout } => {
            client.reopen_store(Duration::from_secs(*timeout))?;
            tell(&"the store is in use");
            json!({ "in_use": true })
        }
        Command::Ls { options } => namespaces::ls(client, options, is_json)?,
        Command::Evict { options } => warm::evict(client, options, is_json)?,
        Command::Pin { options } => pins::pin(client, options, is_json)?,
        Command::Unpin { options } => pins::unpin(client, options, is_json)?,
        Command::Purge { options } => namespaces::purge(client, options, is_json)?,
        Command::Explain { request, last } => {
            let decisions = client.explain(request.as_deref().unwrap_or_default(), *last)?;
            let decisions: Vec<Value> = serde_json::from_str(&decisions).map_err(|error| {
                Error::new(ErrorKind::Io, format!("the server's answer is not understood: {error}"))
            })?;
            if !is_json {
                print_decisions(&decisions);
            }
            json!({ "decisions": decisions })
        }
        Command::LoadPolicy { policy } => {
            let policy = client.load_policy(*policy)?;
            tell(&policy);
            json!({ "load_policy": policy.to_string() })
        }
        Command::Ping => {
            let started = Instant::now();
            let stats = client.stats()?;
            let version = stats.get("server_version").and_then(Value::as_str).unwrap_or("unknown");
            let ms = started.elapsed().as_secs_f64() * 1000.0;
            tell(&format_args!("pegaflow-server {version} answered in {ms:.1} ms"));
            json!({ "server_version": version, "answered_ms": ms })
        }
        // None of these asks a server, or not here; see `main` and `run`.
        Command::Verify { .. }
        | Command::Policy { .. }
        | Command::Token { .. }
        | Command::Completions { .. }
        | Command::Man { .. }
        | Command::Size { .. }
        | Command::Serve { .. }
        | Command::Top { .. }
        | Command::Scrub { .. }
        | Command::Warm { .. }
        | Command::Bench { .. }
        | Command::Config { .. }
        | Command::Prewarm { .. }
        | Command::Pack { .. }
        | Command::Doctor { .. } => Value::Null,
    })
}

/// One line for each decision.
fn print_decisions(decisions: &[Value]) {
    if decisions.is_empty() {
        println!("no decision is known: nothing was found for it, or it was too long ago");
    }
    for decision in decisions {
        let text = |name: &str| decision.get(name).and_then(Value::as_str).unwrap_or_default().to_owned();
        let ago = decision.get("ago_ms").and_then(Value::as_u64).unwrap_or_default() as f64 / 1000.0;
        let mistake = if decision.get("is_mistake") == Some(&Value::Bool(true)) { " (a mistake)" } else { "" };
        println!("{}, {ago:.1} s ago: {}{mistake}", text("request"), text("text"));
    }
}

/// Checks each store, and prints what was found.
fn verify(paths: &[PathBuf], key: Option<&EncryptionKey>, repair: bool, json: bool) -> Result<ExitStatus> {
    let mut reports = Vec::new();
    let stores = StorePaths::group(paths)?;
    for store in &stores {
        let report = verify_one(store, key, repair).map_err(|error| error.with("path", store.home.display()))?;
        if !json {
            print_report(&store.home, &report);
        }
        reports.push(report);
    }
    let is_good = reports.iter().all(FsckReport::is_good);
    if json {
        let sum = |of: fn(&FsckReport) -> u64| reports.iter().map(of).sum::<u64>();
        let (problems, repaired) = (sum(|report| report.problems), sum(|report| report.repaired));
        let stores: Vec<Value> = stores
            .iter()
            .zip(&reports)
            .map(|(store, report)| json!({ "path": store.home, "report": report }))
            .collect();
        println!("{}", json!({ "is_good": is_good, "problems": problems, "repaired": repaired, "stores": stores }));
    }
    Ok(if is_good { ExitStatus::Ok } else { ExitStatus::Failed })
}

fn verify_one(store: &StorePaths, key: Option<&EncryptionKey>, repair: bool) -> Result<FsckReport> {
    // Drawn on standard error, and only if that is a terminal.
    let bar = ProgressBar::new(0);
    if let Ok(style) = ProgressStyle::with_template("{bar:30} {pos}/{len} regions, {eta} left") {
        bar.set_style(style);
    }
    let report = fsck_with_key(store, key, repair, &mut |progress| {
        bar.set_length(progress.regions_total.into());
        bar.set_position(progress.regions.into());
    });
    bar.finish_and_clear();
    report
}

fn print_report(path: &Path, report: &FsckReport) {
    println!(
        "{}: {} records in {} of {} regions, {} rows, {} problems, {} repaired",
        path.display(),
        report.records,
        report.regions_in_use,
        report.regions,
        report.rows,
        report.problems,
        report.repaired
    );
    for finding in &report.findings {
        let place = match (finding.region, finding.page) {
            (Some(region), Some(page)) => format!(" region {region} page {page}:"),
            _ => String::new(),
        };
        println!("  {:?}:{place} {}", finding.problem, finding.what);
    }
    if !report.is_clean {
        println!(
            "  the store was not closed in order: {} records and {} rows are left to the next open",
            report.unindexed_records, report.stale_rows
        );
    }
}

/// A person waits: say at once that no server is there, instead of waiting for one to come.
fn check_there(endpoint: &Endpoint) -> Result<()> {
    let found = match endpoint {
        Endpoint::Unix(path) => std::os::unix::net::UnixStream::connect(path).map(drop),
        Endpoint::Tcp(address) => std::net::TcpStream::connect_timeout(address, Duration::from_secs(5)).map(drop),
        Endpoint::Tls { host, port, .. } => std::net::TcpStream::connect((host.as_str(), *port)).map(drop),
    };
    found.map_err(|error| match error.kind() {
        std::io::ErrorKind::PermissionDenied => Error::from_io(format!("cannot connect to {endpoint}"), error),
        _ => Error::new(
            ErrorKind::Closed,
            format!("no server at {endpoint} ({error}); start one with: pegaflow-server --path DIR"),
        ),
    })
}

/// A histogram of times in words.
fn times(value: &Value) -> Option<String> {
    let counts = value.get("counts")?.as_array()?.iter().map(|count| count.as_u64().unwrap_or(0)).collect();
    let times = Latencies { counts, sum_ns: 0 };
    let below = |share: f64| times.quantile(share).map_or_else(|| "-".into(), |time| format!("{:.3} ms", time * 1e3));
    Some(format!("{} times; median {}, 99 % {}", times.count(), below(0.5), below(0.99)))
}

fn print_stats(stats: &Value) {
    let print = |name: &str, value: &Value| match value {
        Value::Number(number) if name.ends_with("_bytes") => {
            let readable = number.as_u64().map_or_else(String::new, |bytes| format!("  ({})", ByteSize(bytes)));
            println!("{name:<26} {number}{readable}");
        }
        Value::String(text) => println!("{name:<26} {text}"),
        other => println!("{name:<26} {other}"),
    };
    let print = |name: &str, value: &Value| {
        let Some(sizes) = value.as_array().filter(|_| name.ends_with("_estimates")) else { return print(name, value) };
        for size in sizes {
            let number = |of: &str| size.get(of).and_then(Value::as_u64).unwrap_or_default();
            let (percent, bytes) = (number("percent_of_present"), ByteSize(number("capacity_bytes")));
            let ratio = number("hit_permille") as f64 / 1000.0;
            println!("{name:<26} {ratio:.3} of blocks with {percent} % of the size, {bytes}");
        }
    };
    let print = |name: &str, value: &Value| {
        let Some(accounts) = value.as_array().filter(|_| name == "dram_accounts") else { return print(name, value) };
        for account in accounts {
            let bytes = |of: &str| ByteSize(account.get(of).and_then(Value::as_u64).unwrap_or_default());
            let is = |what: &str| account.get(what) == Some(&Value::Bool(true));
            let whose = if is("is_of_others") { "all others" } else { "a namespace" };
            let active = if is("is_active") { "" } else { ", idle" };
            println!("{name:<26} {whose}: {}, {} guaranteed{active}", bytes("bytes"), bytes("guaranteed_bytes"));
        }
    };
    let print = |name: &str, value: &Value| match value.as_object() {
        None => print(name, value),
        Some(of_all) => {
            for (of, value) in of_all {
                println!("{:<26} {}", format!("{name}.{of}"), times(value).unwrap_or_else(|| value.to_string()));
            }
        }
    };
    let Some(fields) = stats.as_object() else { return };
    for (name, value) in fields {
        match value.as_object() {
            Some(inner) => inner.iter().for_each(|(name, value)| print(name, value)),
            None => print(name, value),
        }
    }
}

#[cfg(test)]
mod tests;
