//! Throws any bytes at everything that reads bytes from outside: structures on the drive, requests, settings, tokens, packs. Each
//! target begins with what the repository has of its kind (the frozen fixtures, `tests/corpus/`), changes that at random,
//! and goes on from inputs that led to an outcome not seen before. A panic is a crash: its input is kept in
//! `tests/corpus/TARGET/`, where the next run begins with it. Prints one JSON object as its last line; exit code 0 only
//! without crashes.
//!
//! There is no feedback from the compiler: this runs on the stable toolchain.

use std::collections::HashSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::{Args, Command, Parser};
use pegaflow_server::fuzzing;
use pegaflow_server::proto;
use pegaflow_server::settings::{Settings, load};
use pegaflow_tiers::FuzzTarget;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use serde_json::json;

/// Inputs of a target that are kept in memory.
const CORPUS_MAX: usize = 4096;
/// Bytes of an input at most.
const INPUT_BYTES_MAX: usize = 256 << 10;
/// Numbers at which programs break.
const NUMBERS: [u64; 10] = [0, 1, 0x7f, 0xff, 0xffff, 0x8000_0000, 0xffff_ffff, 0x7fff_ffff_ffff_ffff, u64::MAX, 4096];

#[derive(Parser)]
#[command(about = "Throws any bytes at everything that reads bytes from outside")]
struct Arguments {
    /// Seconds for each target.
    #[arg(long, default_value_t = 60)]
    seconds: u64,
    /// Only this target.
    #[arg(long)]
    target: Option<String>,
    /// The seed.
    #[arg(long)]
    seed: Option<u64>,
}

/// Reads bytes, and says what came of them, in words.
type Run = Box<dyn Fn(&[u8]) -> String>;

/// Something that reads bytes, and what is known of its kind.
struct Target {
    name: String,
    run: Run,
    corpus: Vec<Vec<u8>>,
}

fn main() -> Result<ExitCode> {
    let arguments = Arguments::parse();
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let seed = arguments.seed.unwrap_or_else(|| rand::rng().random());
    eprintln!("seed {seed}");
    let (mut names, mut crashes, mut executions) = (Vec::new(), 0, 0);
    let scratch = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir())?;
    // Panics are counted; their messages would fill the screen.
    std::panic::set_hook(Box::new(|_| ()));
    for target in targets(root, scratch.path())? {
        if arguments.target.as_ref().is_some_and(|only| *only != target.name) {
            continue;
        }
        let deadline = Instant::now() + Duration::from_secs(arguments.seconds);
        let found = fuzz(&target, seed, deadline);
        eprintln!(
            "{:<24} {:>10} inputs, {:>5} outcomes, {} crashes",
            target.name,
            found.runs,
            found.outcomes,
            found.crashes.len()
        );
        for (number, input) in found.crashes.iter().enumerate() {
            let folder = root.join("corpus").join(&target.name);
            std::fs::create_dir_all(&folder)?;
            let path = folder.join(format!("crash-{seed}-{number}"));
            std::fs::write(&path, input)?;
            eprintln!("  {}", path.display());
        }
        crashes += found.crashes.len();
        executions += found.runs;
        names.push(target.name);
    }
    println!("{}", json!({ "targets": names, "crashes": crashes, "executions": executions, "seed": seed }));
    Ok(if crashes == 0 && !names.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// What a target did with its inputs.
#[derive(Default)]
struct Found {
    runs: u64,
    outcomes: usize,
    crashes: Vec<Vec<u8>>,
}

fn fuzz(target: &Target, seed: u64, deadline: Instant) -> Found {
    let mut random = SmallRng::seed_from_u64(seed);
    let mut corpus = target.corpus.clone();
    let (mut found, mut outcomes, mut crashed) = (Found::default(), HashSet::new(), HashSet::new());
    let mut first = target.corpus.clone().into_iter();
    while Instant::now() < deadline {
        // What is known comes first, as it is.
        let input = first.next().unwrap_or_else(|| changed(&corpus, &mut random));
        found.runs += 1;
        match catch_unwind(AssertUnwindSafe(|| (target.run)(&input))) {
            Ok(outcome) => {
                // Outcomes are remembered as long as there is room for the inputs that led to them.
                if corpus.len() < CORPUS_MAX && outcomes.insert(outcome) {
                    corpus.push(input);
                }
            }
            Err(panic) => {
                let text = panic.downcast_ref::<String>().cloned();
                let text = text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
                let text: String = text.unwrap_or_default().chars().filter(|c| !c.is_ascii_digit()).collect();
                // One of each kind.
                if crashed.insert(text) {
                    found.crashes.push(input);
                }
            }
        }
    }
    found.outcomes = outcomes.len();
    found
}

/// One of the inputs with a few changes.
fn changed(corpus: &[Vec<u8>], random: &mut SmallRng) -> Vec<u8> {
    let mut input = pick(corpus, random);
    for _ in 0..1 << random.random_range(0..5) {
        let length = input.len();
        if length == 0 {
            input = vec![0; random.random_range(1..64)];
            continue;
        }
        let at = random.random_range(0..length);
        match random.random_range(0..8) {
            0 => input[at] ^= 1 << random.random_range(0..8),
            1 => input[at] = random.random(),
            2 => {
                let number = NUMBERS[random.random_range(0..NUMBERS.len())]
                    .wrapping_add(random.random_range(0..3))
                    .to_le_bytes();
                let bytes = [1, 2, 4, 8][random.random_range(0..4)].min(length - at);
                input[at..at + bytes].copy_from_slice(&number[..bytes]);
            }
            3 => input.truncate(at),
            4 => drop(input.drain(at..(at + random.random_range(1..=32)).min(length))),
            5 => {
                let more: Vec<u8> = (0..random.random_range(1..=32)).map(|_| random.random()).collect();
                drop(input.splice(at..at, more));
            }
            6 => {
                let end = (at + random.random_range(1..=64)).min(length);
                let copy = input[at..end].to_vec();
                let to = random.random_range(0..=length - copy.len());
                input[to..to + copy.len()].copy_from_slice(&copy);
            }
            _ => {
                let other = pick(corpus, random);
                let from = random.random_range(0..=other.len());
                input.truncate(at);
                input.extend_from_slice(&other[from..]);
            }
        }
    }
    input.truncate(INPUT_BYTES_MAX);
    input
}

fn pick(corpus: &[Vec<u8>], random: &mut SmallRng) -> Vec<u8> {
    match corpus.len() {
        0 => Vec::new(),
        count => corpus[random.random_range(0..count)].clone(),
    }
}

fn targets(root: &Path, scratch: &Path) -> Result<Vec<Target>> {
    let fixtures = root.join("../tiers/fixtures/v1");
    let mut targets = Vec::new();
    for structure in FuzzTarget::ALL {
        let folder = match structure {
            FuzzTarget::RecordHeader | FuzzTarget::SealedRecordHeader | FuzzTarget::Frame => "record",
            FuzzTarget::RegionHeader => "region",
            FuzzTarget::Superblock => "superblock",
            FuzzTarget::DriveIdentity => "drive",
            FuzzTarget::Namespace => "namespaces",
            FuzzTarget::Version => "version",
            _ => "",
        };
        let mut corpus = if folder.is_empty() { Vec::new() } else { fixtures_in(&fixtures.join(folder))? };
        if structure == FuzzTarget::Frame {
            corpus = corpus.iter().filter_map(|image| frame_of(image)).collect();
        }
        targets.push(Target {
            name: kebab(&format!("{structure:?}")),
            run: Box::new(move |bytes| structure.run(bytes)),
            corpus,
        });
    }
    targets.push(Target { name: "request".into(), run: Box::new(fuzzing::request), corpus: requests() });
    targets.push(Target { name: "tokens".into(), run: Box::new(fuzzing::tokens), corpus: Vec::new() });
    let pack = scratch.join("pack");
    targets.push(Target {
        name: "pack-manifest".into(),
        run: Box::new(move |bytes| fuzzing::pack_manifest(&pack, bytes)),
        corpus: fuzzing::pack_manifests(),
    });
    let example = std::fs::read(root.join("../docs/deploy/pegaflow.toml")).context("the example of settings")?;
    // The example has its settings as comments.
    let settings = String::from_utf8_lossy(&example).replace("\n#", "\n").into_bytes();
    let file = scratch.join("settings.toml");
    targets.push(Target {
        name: "settings".into(),
        run: Box::new(move |bytes| settings_outcome(&file, bytes)),
        corpus: vec![example, settings, b"dram = \"1GiB\"\n".to_vec()],
    });
    for target in &mut targets {
        let folder = root.join("corpus").join(&target.name);
        for entry in std::fs::read_dir(folder).into_iter().flatten() {
            target.corpus.push(std::fs::read(entry?.path())?);
        }
    }
    Ok(targets)
}

fn settings_outcome(file: &PathBuf, bytes: &[u8]) -> String {
    if std::fs::write(file, bytes).is_err() {
        return "not written".into();
    }
    let command = Settings::augment_args(Command::new("fuzz"));
    let loaded = load(&command, &[], &["fuzz".into(), "--config".into(), file.into()]);
    match loaded {
        Ok(_) => "good".into(),
        Err(problems) => problems.join(" ").chars().filter(|c| c.is_alphabetic()).take(80).collect(),
    }
}

/// All fixtures in a folder and below.
fn fixtures_in(folder: &Path) -> Result<Vec<Vec<u8>>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).with_context(|| folder.display().to_string())? {
        let path = entry?.path();
        if path.is_dir() {
            found.extend(fixtures_in(&path)?);
        } else if path.extension().is_some_and(|extension| extension == "zst") {
            found.push(zstd::decode_all(std::fs::File::open(&path)?)?);
        }
    }
    Ok(found)
}

/// Codec, decoded bytes and frame of a record.
fn frame_of(image: &[u8]) -> Option<Vec<u8>> {
    let stored = u64::from_le_bytes(image.get(200..208)?.try_into().ok()?);
    let frame = image.get(4096..4096 + usize::try_from(stored).ok()?)?;
    Some([image.get(58..60)?, image.get(192..200)?, frame].concat())
}

/// A good request of each kind, and a reply, with its number before it.
fn requests() -> Vec<Vec<u8>> {
    use prost::Message;
    let (keys, lease) = (vec![7u8; 64], vec![1u8; 16]);
    let (namespace, prefix) = (vec![9u8; 32], "0123456789abcdef".to_owned());
    let all: [(u8, Vec<u8>); 11] = [
        (
            0,
            proto::RegisterRequest {
                session: 1,
                instance: "engine".into(),
                namespace: [("model".to_owned(), "m".to_owned())].into(),
                groups: vec![proto::Group { group: 0, block_bytes: 4096, shards: 2 }],
                shard: 1,
                blocks: 8,
                ..Default::default()
            }
            .encode_to_vec(),
        ),
        (
            1,
            proto::LookupRequest {
                session: 1,
                instance: "engine".into(),
                keys: keys.clone().into(),
                ..Default::default()
            }
            .encode_to_vec(),
        ),
        (
            2,
            proto::LoadRequest {
                session: 1,
                lease: lease.clone().into(),
                indexes: vec![0, 1],
                blocks: vec![2, 3],
                ..Default::default()
            }
            .encode_to_vec(),
        ),
        (
            3,
            proto::SaveRequest {
                session: 1,
                instance: "engine".into(),
                keys: keys.clone().into(),
                parents: keys.into(),
                depths: vec![0, 1],
                blocks: vec![0, 1],
                ..Default::default()
            }
            .encode_to_vec(),
        ),
        (4, proto::FlushRequest { timeout_ms: 5 }.encode_to_vec()),
        (5, proto::ConsumeRequest { session: 1, leases: lease.into(), shard: 0 }.encode_to_vec()),
        (6, proto::OpenSessionRequest { client_name: "name".into(), ..Default::default() }.encode_to_vec()),
        (
            9,
            proto::LocateRequest {
                session: 1,
                keys: vec![7; 32].into(),
                namespace: namespace.clone().into(),
                ..Default::default()
            }
            .encode_to_vec(),
        ),
        (
            10,
            proto::EvictRequest { namespaces: vec![namespace.clone().into()], prefix, unused_for_ms: 1000 }
                .encode_to_vec(),
        ),
        (11, proto::UnpinRequest { pin: 0, namespaces: vec![namespace.into()] }.encode_to_vec()),
        (
            12,
            proto::LookupAnswer {
                answer: Some(proto::lookup_answer::Answer::Found(proto::LookupReply {
                    hit_blocks: 2,
                    ..Default::default()
                })),
            }
            .encode_to_vec(),
        ),
    ];
    all.into_iter().map(|(number, bytes)| [vec![number], bytes].concat()).collect()
}

fn kebab(name: &str) -> String {
    let mut text = String::new();
    for c in name.chars() {
        if c.is_uppercase() && !text.is_empty() {
            text.push('-');
        }
        text.extend(c.to_lowercase());
    }
    text
}
