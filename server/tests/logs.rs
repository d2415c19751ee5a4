//! Logs for collectors: every line is an object, and what a load or a save says names its engine, session and operation.
#![expect(clippy::expect_used, reason = "a test that cannot go on has failed")]

mod support;

use std::io::Read;

use pegaflow_server::client::Endpoint;
use support::{PATIENCE, Process, Worker};

#[test]
fn every_line_is_json_and_loads_and_saves_name_what_they_are_about() {
    let directory = tempfile::tempdir().expect("a directory");
    let socket = directory.path().join("p.sock");
    let mut command = Process::command(&socket);
    command.args(["--log-format", "json", "--log", "info,pegaflow_engine=debug"]);
    let (mut server, mut log) = Process::start_with_log(command);
    let worker = Worker::new(Endpoint::Unix(socket));
    worker.client.wait_connected(PATIENCE).expect("connects");
    worker.register();
    support::until("registered", || worker.lookup(1).is_ok());
    let saved = worker.start_save(3).expect("accepted");
    worker.wait(saved);
    let loaded = worker.start_load(3);
    worker.wait(loaded);
    worker.client.close(PATIENCE);
    server.signal("-TERM");
    assert_eq!(server.wait_exit(), Some(0));
    let mut text = String::new();
    log.read_to_string(&mut text).expect("reads");
    let lines: Vec<serde_json::Value> = text
        .lines()
        .map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("'{line}' is no JSON: {error}")))
        .collect();
    let find = |message: &str| {
        let is_it = |line: &&serde_json::Value| line["fields"]["message"] == message;
        lines.iter().find(is_it).unwrap_or_else(|| panic!("no '{message}' in\n{text}"))
    };
    assert!(lines.iter().all(|line| line["timestamp"].is_string() && line["level"].is_string()), "{text}");
    let (save, load) = (find("save ended"), find("load ended"));
    assert_eq!((&save["fields"]["saved"], &save["spans"][0]["name"]), (&3.into(), &"save".into()), "{save}");
    assert_eq!((&load["fields"]["dram_blocks"], &load["spans"][0]["name"]), (&3.into(), &"load".into()), "{load}");
    for (line, operation) in [(save, saved), (load, loaded)] {
        let span = &line["spans"][0];
        assert_eq!((&span["instance"], &span["operation"]), (&"engine".into(), &operation.0.into()), "{line}");
        assert!(span["session"].as_u64().is_some_and(|session| session > 0), "{line}");
    }
}

/// What a server with this store logs from its start to its end.
fn log_of(store: &std::path::Path) -> String {
    let directory = tempfile::tempdir().expect("a directory");
    let mut command = Process::command(&directory.path().join("p.sock"));
    command.args(["--capacity", "64MiB", "--region", "4MiB", "--path"]).arg(store);
    let (mut server, mut log) = Process::start_with_log(command);
    server.signal("-TERM");
    assert_eq!(server.wait_exit(), Some(0));
    let mut text = String::new();
    log.read_to_string(&mut text).expect("reads");
    text
}

/// A warning at the first start of a store would teach people to overlook warnings.
#[test]
fn a_new_store_is_no_reason_to_warn_and_one_without_its_index_is() {
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a directory");
    let store = directory.path().join("store");
    for start in ["first", "second"] {
        let log = log_of(&store);
        assert!(!log.contains("WARN") && !log.contains("ERROR"), "{start}: {log}");
        assert_eq!(log.contains("the store is new"), start == "first", "{start}: {log}");
    }
    std::fs::remove_dir_all(store.join("index")).expect("there");
    let log = log_of(&store);
    assert!(log.contains("WARN") && log.contains("the index is made anew"), "{log}");
}
