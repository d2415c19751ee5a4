//! `pegaflow --json COMMAND`: what every command prints is one JSON object, as its schema in `docs/schemas` says, and so is
//! what it prints when it fails. Objects are closed here: a field that no schema has is a failure, too.
#![expect(clippy::expect_used, reason = "a test that cannot go on has failed")]

mod support;

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use jsonschema::Validator;
use pegaflow_engine::{ErrorKind, LoadQuestion, LookupRequest};
use pegaflow_server::client::Endpoint;
use serde_json::Value;
use support::{BLOCKS, PATIENCE, Process, Worker};

/// What stands in for vLLM: takes prompts and says what became of them.
const VLLM: &str = r#"#!/bin/sh
echo '{"ready": {"model": "m"}}'
read line
echo '{"done": [{"id": 0, "tokens": 5, "cached": 2}, {"id": 1, "error": "too long"}], "saved": 1, "present": 0, "dropped": 0}'
read line
"#;
const PLACE: [&str; 4] = ["--capacity", "64MiB", "--region", "4MiB"];

fn folder_of_schemas() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/schemas")
}

/// Nothing but what the schema names.
fn close(schema: &mut Value) {
    match schema {
        Value::Object(fields) => {
            fields.values_mut().for_each(close);
            let is_open = fields.get("properties").is_some_and(Value::is_object);
            if is_open && !fields.contains_key("additionalProperties") {
                fields.insert("additionalProperties".into(), false.into());
            }
        }
        Value::Array(items) => items.iter_mut().for_each(close),
        _ => {}
    }
}

fn validator(name: &str) -> Validator {
    let path = folder_of_schemas().join(format!("{name}.json"));
    let text = std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let mut schema: Value = serde_json::from_slice(&text).expect("JSON");
    jsonschema::meta::validate(&schema).unwrap_or_else(|error| panic!("{name} is no schema: {error}"));
    close(&mut schema);
    jsonschema::validator_for(&schema).unwrap_or_else(|error| panic!("{name}: {error}"))
}

fn check(name: &str, told: &Value) {
    let problems: Vec<String> =
        validator(name).iter_errors(told).map(|error| format!("{} at {}", error, error.instance_path())).collect();
    assert!(problems.is_empty(), "{name}: {problems:#?}\n{told:#}");
}

/// Runs commands, and notes whose schema was met.
struct Desk {
    folder: tempfile::TempDir,
    met: RefCell<BTreeSet<String>>,
}

impl Desk {
    fn new() -> Self {
        let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a directory");
        Self { folder, met: RefCell::default() }
    }

    fn path(&self, name: &str) -> String {
        self.folder.path().join(name).to_str().expect("UTF-8").to_owned()
    }

    fn write(&self, name: &str, text: &str) -> String {
        std::fs::write(self.path(name), text).expect("written");
        self.path(name)
    }

    /// All of standard output is one object.
    fn run(&self, arguments: &[&str]) -> (Option<i32>, Value) {
        let mut command = Command::new(env!("CARGO_BIN_EXE_pegaflow"));
        for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("PEGAFLOW_")) {
            command.env_remove(name);
        }
        let output = command.arg("--json").args(arguments).stdin(Stdio::null()).output().expect("runs");
        let text = String::from_utf8(output.stdout).expect("UTF-8");
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        let told: Value = serde_json::from_str(&text)
            .unwrap_or_else(|error| panic!("{arguments:?} printed no JSON ({error}): {text}\n{errors}"));
        assert!(told.is_object() && !text.contains('\u{1b}'), "{arguments:?}: {text}");
        (output.status.code(), told)
    }

    /// Prints what the schema of that name says, with this exit status.
    fn meets(&self, name: &str, code: i32, arguments: &[&str]) -> Value {
        let (found, told) = self.run(arguments);
        assert_eq!(found, Some(code), "{arguments:?}: {told:#}");
        check(name, &told);
        self.met.borrow_mut().insert(name.to_owned());
        told
    }

    fn fails(&self, code: i32, kind: ErrorKind, arguments: &[&str]) {
        let told = self.meets("error", code, arguments);
        assert_eq!(told["error"]["kind"], format!("{kind:?}"), "{arguments:?}: {told}");
    }
}

/// A server with a store in which the worker's blocks lie, of which one request was explained.
fn server(desk: &Desk) -> (Process, Worker, String) {
    let socket = desk.path("p.sock");
    let mut command = Process::command(Path::new(&socket));
    command.args(PLACE).args(["--path", &desk.path("store")]);
    let (server, ready) = Process::start(command);
    check("serve", &ready);
    desk.met.borrow_mut().insert("serve".into());
    let worker = Worker::new(Endpoint::Unix(socket.clone().into()));
    worker.register();
    worker.client.wait_connected(PATIENCE).expect("connects");
    let count = BLOCKS / 2;
    let operation = worker.start_save(count).expect("accepted");
    worker.wait(operation);
    let question = LoadQuestion { request: "cmpl-1-abc".into(), block_tokens: 16, ..LoadQuestion::default() };
    let found = worker.client.lookup(&LookupRequest {
        instance: Worker::spec().instance,
        tenant: None,
        group: 0,
        keys: (0..count).map(Worker::key).collect(),
        lease: Some(PATIENCE),
        tag: 1,
        with_places: false,
        question: Some(question),
        prefetch: false,
    });
    assert_eq!(found.expect("answers").hit_blocks, count);
    (server, worker, socket)
}

fn stop(mut server: Process, worker: &Worker) {
    worker.client.close(PATIENCE);
    server.signal("-TERM");
    assert_eq!(server.wait_exit(), Some(0));
}

fn at<'a>(socket: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    [&["--socket", socket], more].concat()
}

fn in_store<'a>(store: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    [&["pack"], more, &PLACE, &["--path", store]].concat()
}

#[test]
fn every_command_prints_what_its_schema_says() {
    let desk = Desk::new();
    of_a_server(&desk);
    of_stores(&desk);
    without_either(&desk);
    let all = std::fs::read_dir(folder_of_schemas()).expect("there").map(|entry| {
        let name = entry.expect("an entry").file_name().into_string().expect("UTF-8");
        name.strip_suffix(".json").map(str::to_owned).unwrap_or(name)
    });
    assert_eq!(all.collect::<BTreeSet<_>>(), desk.met.take(), "the schemas, and those that were met");
}

/// Commands that ask a server, and what they print without one.
fn of_a_server(desk: &Desk) {
    let (server, worker, socket) = server(desk);
    let told = desk.meets("status", 0, &at(&socket, &["status"]));
    assert_eq!(told["engine"]["saved_blocks"], BLOCKS / 2, "{told:#}");
    desk.meets("top", 0, &at(&socket, &["top", "--once", "--interval", "0.2"]));
    desk.meets("flush", 0, &at(&socket, &["flush"]));
    desk.meets("ping", 0, &at(&socket, &["ping"]));
    let told = desk.meets("bench", 0, &at(&socket, &["bench", "--bytes", "1MiB", "--block", "64KiB"]));
    assert_eq!((&told["bytes"], &told["wrong_bytes"]), (&(1 << 20).into(), &0.into()), "{told:#}");
    assert!(told["load_drive_gbps"].as_f64().is_some_and(|rate| rate > 0.0), "{told:#}");
    for wrong in [&["--bytes", "8GiB"], &["--block", "4096TiB"], &["--block", "1KiB"]] {
        desk.fails(2, ErrorKind::InvalidInput, &at(&socket, &[&["bench"][..], wrong].concat()));
    }
    desk.meets("reopen", 0, &at(&socket, &["reopen"]));
    let told = desk.meets("explain", 0, &at(&socket, &["explain", "cmpl-1"]));
    assert_eq!(told["decisions"][0]["request"], "cmpl-1-abc", "{told:#}");
    desk.meets("explain", 0, &at(&socket, &["explain", "nobody"]));
    desk.meets("load-policy", 0, &at(&socket, &["load-policy"]));
    let told = desk.meets("ls", 0, &at(&socket, &["ls"]));
    let one = &told["namespaces"][0];
    assert_eq!((&one["fields"]["model"], &one["instances"]), (&"m".into(), &1.into()), "{told:#}");
    assert_eq!(
        (&one["dram_blocks"], &one["drive"]["blocks"]),
        (&(BLOCKS / 2).into(), &(BLOCKS / 2).into()),
        "{told:#}"
    );
    let told = desk.meets("ls", 0, &at(&socket, &["ls", "--count", "0"]));
    assert_eq!(told["namespaces"][0]["drive"], Value::Null, "{told:#}");
    desk.meets("load-policy", 0, &at(&socket, &["load-policy", "never"]));
    let told = desk.meets("scrub", 0, &at(&socket, &["scrub", "--look"]));
    assert_eq!((&told["state"], &told["number"]), (&"none".into(), &0.into()), "{told:#}");
    let told = desk.meets("scrub", 0, &at(&socket, &["scrub"]));
    let count = Value::from(BLOCKS / 2);
    assert_eq!(
        (&told["state"], &told["records"], &told["bad_records"]),
        (&"done".into(), &count, &0.into()),
        "{told:#}"
    );
    assert_eq!((&told["regions"], told["bytes"].as_u64() > Some(0)), (&told["regions_total"], true), "{told:#}");
    desk.meets("scrub", 0, &at(&socket, &["scrub", "--stop"]));
    desk.fails(2, ErrorKind::InvalidInput, &at(&socket, &["scrub", "--rate", "1KiB"]));
    let told = desk.meets("warm", 0, &at(&socket, &["warm", "--look"]));
    assert_eq!((&told["state"], &told["number"]), (&"none".into(), &0.into()), "{told:#}");
    let told = desk.meets("warm", 0, &at(&socket, &["warm"]));
    assert_eq!(
        (&told["state"], &told["seen_blocks"], &told["read_blocks"]),
        (&"done".into(), &count, &0.into()),
        "{told:#}"
    );
    desk.meets("warm", 0, &at(&socket, &["warm", "--stop"]));
    desk.fails(3, ErrorKind::NotFound, &at(&socket, &["warm", "--tenant", "nobody"]));
    // The lookup's lease holds them.
    let told = desk.meets("evict", 0, &at(&socket, &["evict", "--all"]));
    assert_eq!((&told["dram_blocks"], &told["kept_blocks"]), (&0.into(), &count), "{told:#}");
    let told = desk.meets("pin", 0, &at(&socket, &["pin", "--all", "--ttl", "2h"]));
    assert_eq!((&told["number"], &told["blocks"]), (&1.into(), &count), "{told:#}");
    let key = Worker::key(0).to_string();
    let told = desk.meets("pin", 0, &at(&socket, &["pin", "--prefix", &key[..12]]));
    assert_eq!((&told["prefix"], &told["left_ms"]), (&key[..12].into(), &Value::Null), "{told:#}");
    let told = desk.meets("ls", 0, &at(&socket, &["ls"]));
    assert_eq!((&told["namespaces"][0]["pinned_blocks"], &told["pins"][0]["number"]), (&count, &1.into()), "{told:#}");
    let told = desk.meets("status", 0, &at(&socket, &["status"]));
    assert_eq!(told["engine"]["dram_pins"], 2);
    let accounts = told["engine"]["dram_accounts"].as_array().expect("a list");
    let is_served = |account: &Value| account["is_of_others"] == false && account["is_active"] == true;
    assert!(accounts.iter().any(is_served), "{told:#}");
    let told = desk.meets("ls", 0, &at(&socket, &["ls", "--prefixes", "--most", "1"]));
    let prefix = &told["prefixes"][0];
    assert_eq!((&prefix["key"], &prefix["common_blocks"]), (&key.clone().into(), &count), "{told:#}");
    assert_eq!((&prefix["bytes"], &prefix["blocks"]), (&prefix["pinned_bytes"], &count), "{told:#}");
    let told = desk.meets("ls", 0, &at(&socket, &["ls", "--prefixes", "--under", &key]));
    assert_eq!(told["prefixes"], Value::Array(Vec::new()), "it goes on in one way: {told:#}");
    desk.fails(3, ErrorKind::NotFound, &at(&socket, &["ls", "--prefixes", "--under", "00000000"]));
    desk.fails(3, ErrorKind::NotFound, &at(&socket, &["ls", "--prefixes", "--namespace", "no"]));
    desk.fails(2, ErrorKind::InvalidInput, &at(&socket, &["ls", "--under", &key]));
    let told = desk.meets("warm", 0, &at(&socket, &["warm", "--all", "--pin", "--ttl", "30s"]));
    assert_eq!(told["pin"]["number"], 3, "{told:#}");
    let told = desk.meets("unpin", 0, &at(&socket, &["unpin", "1"]));
    assert_eq!((&told["pins"], &told["blocks"]), (&1.into(), &0.into()), "others hold them: {told:#}");
    let told = desk.meets("unpin", 0, &at(&socket, &["unpin", "--all"]));
    assert_eq!((&told["pins"], &told["blocks"]), (&2.into(), &count), "{told:#}");
    desk.fails(3, ErrorKind::NotFound, &at(&socket, &["unpin", "1"]));
    desk.fails(3, ErrorKind::NotFound, &at(&socket, &["pin", "--prefix", "00000000"]));
    desk.fails(2, ErrorKind::InvalidInput, &at(&socket, &["pin", "--prefix", "0000"]));
    desk.fails(2, ErrorKind::InvalidInput, &at(&socket, &["pin", "--all", "--ttl", "7"]));
    desk.fails(2, ErrorKind::InvalidInput, &at(&socket, &["pin", "--all", "--ttl", "400d"]));
    for command in [&["pin"][..], &["unpin"], &["unpin", "1", "--all"], &["warm", "--ttl", "1h"]] {
        desk.fails(2, ErrorKind::InvalidInput, &at(&socket, command));
    }
    let told = desk.meets("evict", 0, &at(&socket, &["evict", "--all", "--older-than", "1h"]));
    assert_eq!((&told["dram_blocks"], &told["kept_blocks"]), (&0.into(), &0.into()), "{told:#}");
    desk.fails(3, ErrorKind::NotFound, &at(&socket, &["evict", "--prefix", "00000000"]));
    desk.fails(3, ErrorKind::NotFound, &at(&socket, &["evict", "--tenant", "nobody"]));
    desk.fails(2, ErrorKind::InvalidInput, &at(&socket, &["evict"]));
    desk.fails(2, ErrorKind::InvalidInput, &at(&socket, &["warm", "--look", "--all"]));
    desk.fails(2, ErrorKind::InvalidInput, &at(&socket, &["scrub", "--look", "--stop"]));
    let vllm = desk.write("python", VLLM);
    std::fs::set_permissions(&vllm, std::fs::Permissions::from_mode(0o700)).expect("ours");
    let prompts = desk.write("prompts.jsonl", "{\"prompt\": \"one\"}\n{\"prompt\": \"two\"}\n");
    let told = desk.meets("prewarm", 1, &at(&socket, &["prewarm", &prompts, "--python", &vllm, "--", "model"]));
    assert_eq!((&told["done"], &told["failures"][0]["line"]), (&1.into(), &2.into()), "{told:#}");
    desk.fails(3, ErrorKind::NotFound, &at(&socket, &["prewarm", &desk.path("none.jsonl"), "--", "model"]));
    let id = one["id"].as_str().expect("a name");
    desk.fails(3, ErrorKind::NotFound, &at(&socket, &["purge", "--tenant", "nobody", "--yes"]));
    desk.fails(3, ErrorKind::NotFound, &at(&socket, &["purge", "--cache-salt", "nobody's", "--yes"]));
    desk.fails(3, ErrorKind::NotFound, &at(&socket, &["purge", "--namespace", "no", "--yes"]));
    desk.fails(2, ErrorKind::InvalidInput, &at(&socket, &["purge", "--namespace", &id[..8]]));
    desk.fails(2, ErrorKind::InvalidInput, &at(&socket, &["purge", "--yes"]));
    desk.fails(1, ErrorKind::Unsupported, &at(&socket, &["purge", "--all", "--yes", "--prefix", "00000000"]));
    desk.fails(3, ErrorKind::NotFound, &at(&socket, &["purge", "--all", "--yes", "--older-than", "1d"]));
    // What a server has open is in use.
    desk.fails(5, ErrorKind::Locked, &["verify", &desk.path("store")]);
    stop(server, &worker);
    for command in [
        &["status"][..],
        &["top"],
        &["flush"],
        &["ping"],
        &["reopen"],
        &["explain"],
        &["load-policy"],
        &["ls"],
        &["scrub"],
        &["scrub", "--look"],
        &["warm"],
        &["warm", "--look"],
        &["evict", "--all"],
        &["pin", "--all"],
        &["unpin", "--all"],
        &["purge", "--all", "--yes"],
    ] {
        desk.fails(5, ErrorKind::Closed, &at(&socket, command));
    }
}

/// Commands that take stores, packs and keys.
fn of_stores(desk: &Desk) {
    let (store, pack, key) = (desk.path("store"), desk.path("kv.pack"), desk.path("signer.key"));
    let told = desk.meets("pack-key", 0, &["pack", "key", &key]);
    let public = told["public"].as_str().expect("a key").to_owned();
    desk.meets("pack-export", 0, &in_store(&store, &["export", &pack, "--key", &key]));
    desk.meets("pack-verify", 0, &["pack", "verify", &pack]);
    desk.meets("pack-import", 0, &in_store(&store, &["import", &pack, "--trust", &public]));
    desk.fails(4, ErrorKind::PermissionDenied, &in_store(&store, &["import", &pack]));
    desk.fails(3, ErrorKind::NotFound, &["pack", "verify", &desk.path("none")]);
    let bare = desk.path("bare.pack");
    desk.meets("pack-export", 0, &in_store(&store, &["export", &bare, "--unsigned"]));
    desk.meets("pack-verify", 0, &["pack", "verify", &bare]);
    let file = std::fs::OpenOptions::new().write(true).open(&bare).expect("there");
    file.write_all_at(&[0xee; 8], 200).expect("written");
    desk.fails(1, ErrorKind::Corrupt, &["pack", "verify", &bare]);

    desk.meets("verify", 0, &["verify", &store]);
    let regions = std::fs::OpenOptions::new().write(true).open(Path::new(&store).join("regions.0")).expect("there");
    regions.write_all_at(&[0xee; 64], (2 + 3 + 1) * 4096).expect("written");
    let told = desk.meets("verify", 1, &["verify", &store]);
    assert_eq!(told["stores"][0]["report"]["findings"][0]["problem"], "bad_checksum", "{told:#}");
    desk.meets("verify", 0, &["verify", &store, "--repair"]);
    of_a_purge(desk);
}

/// Last: afterwards the store is empty.
fn of_a_purge(desk: &Desk) {
    let (server, worker, socket) = server(desk);
    let found = |count: u32| assert_eq!(worker.lookup(BLOCKS / 2).expect("answers").hit_blocks, count);
    found(BLOCKS / 2);
    let told = desk.meets("purge", 0, &at(&socket, &["purge", "--all", "--yes"]));
    assert_eq!((&told["namespaces"], &told["destroyed_keys"]), (&1.into(), &0.into()), "{told:#}");
    assert_eq!(told["purged"][0]["is_swept"], true, "{told:#}");
    found(0);
    let told = desk.meets("ls", 0, &at(&socket, &["ls"]));
    let one = &told["namespaces"][0];
    assert_eq!((&one["dram_blocks"], &one["drive"]["blocks"], &one["instances"]), (&0.into(), &0.into(), &1.into()));
    stop(server, &worker);
}

/// Commands that need neither a server nor a store; usage errors.
fn without_either(desk: &Desk) {
    desk.meets("config-check", 0, &["config", "check", "--dram", "64MiB"]);
    let told = desk.meets("config-check", 2, &["config", "check", "--dram", "1", "--policy", "best"]);
    assert!(!told["problems"].as_array().expect("a list").is_empty(), "{told}");
    let file = desk.write("pegaflow.toml", "dram = \"64MiB\"\n");
    desk.meets("config-show", 0, &["config", "show", "--config", &file, "--huge-pages"]);
    desk.fails(2, ErrorKind::InvalidInput, &["config", "show", "--dram", "1"]);
    let drive = desk.path("new");
    desk.meets("doctor", 0, &["doctor", "--no-measure", "--dram", "64MiB", "--path", &drive, "--capacity", "64MiB"]);
    desk.meets("doctor", 1, &["doctor", "--no-measure", "--dram", "64MiB", "--path", &drive, "--capacity", "900TiB"]);
    desk.fails(2, ErrorKind::InvalidInput, &["doctor", "--dram", "1"]);
    desk.meets("token-new", 0, &["token", "new", "--role", "operator", "--name", "on-call"]);
    desk.fails(2, ErrorKind::InvalidInput, &["token", "new", "--role", "operator", "--name", "two\nlines"]);
    let plot = desk.path("plot");
    let sizes = ["--synthetic", "chat", "--capacities", "500,1000", "--policies", "lru,pegaflow"];
    desk.meets("policy-replay", 0, &[&["policy", "replay"], &sizes[..]].concat());
    let more = ["--dram", "100", "--pareto", "1.5", "--plot", &plot];
    desk.meets("policy-replay", 0, &[&["policy", "replay"], &sizes[..], &more].concat());
    desk.fails(3, ErrorKind::NotFound, &["policy", "replay", "/none", "--capacities", "500"]);
    let sizes = ["--synthetic", "chat", "--dram", "100", "--drive", "1000", "--policies", "lru"];
    desk.meets("policy-prefetch", 0, &[&["policy", "prefetch"], &sizes[..]].concat());
    for shell in ["bash", "elvish", "fish", "powershell", "zsh"] {
        desk.meets("completions", 0, &["completions", shell]);
    }
    desk.fails(2, ErrorKind::InvalidInput, &["completions", "cmd"]);
    desk.meets("man", 0, &["man", &desk.path("man")]);
    desk.fails(1, ErrorKind::Io, &["man", &format!("{file}/man")]);
    let model =
        r#"{"num_hidden_layers": 32, "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8}"#;
    let model = desk.write("config.json", model);
    let size = |model: &str, more: &[&str]| {
        desk.meets("size", 0, &[&["size", "--model", model, "--gpu", "h200", "--dram", "64GiB"], more].concat())
    };
    assert_eq!(size(&model, &[])["bytes_per_token"], 131_072);
    size(desk.folder.path().to_str().expect("UTF-8"), &["--nvme", "1TiB", "--drive-read", "6GB"]);
    let latent = r#"{"num_hidden_layers": 61, "hidden_size": 7168, "num_attention_heads": 128, "kv_lora_rank": 512,
        "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128}"#;
    size(&desk.write("latent.json", latent), &["--gpus", "8", "--prefill-speed", "9000"]);
    let hybrid = desk.write("hybrid.json", r#"{"mamba_d_state": 16}"#);
    desk.fails(1, ErrorKind::Unsupported, &["size", "--model", &hybrid, "--gpu", "h200", "--dram", "1GiB"]);
    desk.fails(3, ErrorKind::NotFound, &["size", "--model", "/none", "--gpu", "h200", "--dram", "1GiB"]);
    desk.meets("policy-cost", 0, &["policy", "cost", "--blocks", "1000", "--policies", "lru"]);
    let shared = ["policy", "cost", "--blocks", "1000", "--policies", "pegaflow", "--namespaces", "1040"];
    desk.meets("policy-cost", 0, &shared);
    for wrong in [&["no-such-command"][..], &[], &["ping", "--frequency", "3"], &["explain", "--last", "0"]] {
        desk.fails(2, ErrorKind::InvalidInput, wrong);
    }
}

/// Every kind of error has its place in the schema of failures, and nothing else has.
#[test]
fn the_schema_of_failures_has_every_kind() {
    let schema: Value =
        serde_json::from_slice(&std::fs::read(folder_of_schemas().join("error.json")).expect("there")).expect("JSON");
    let listed = schema["properties"]["error"]["properties"]["kind"]["enum"].as_array().expect("a list").len();
    assert_eq!(listed, ErrorKind::ALL.len());
    for kind in ErrorKind::ALL {
        check("error", &serde_json::json!({ "error": { "kind": format!("{kind:?}"), "message": "what" } }));
    }
}

/// A schema that is met by anything is none.
#[test]
fn a_field_that_no_schema_has_and_a_missing_one_are_noticed() {
    let good = serde_json::json!({ "server_version": "1", "answered_ms": 0.5 });
    check("ping", &good);
    let fails = |change: fn(&mut serde_json::Map<String, Value>)| {
        let mut told = good.clone();
        change(told.as_object_mut().expect("an object"));
        assert!(!validator("ping").is_valid(&told), "{told}");
    };
    fails(|told| drop(told.remove("server_version")));
    fails(|told| drop(told.insert("more".into(), 1.into())));
    fails(|told| drop(told.insert("answered_ms".into(), "1".into())));
}
