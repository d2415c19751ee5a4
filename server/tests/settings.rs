//! Settings in a file, in the environment and on the command line: which of them holds, what is wrong with them, and what
//! of them changes while the server runs.
#![expect(clippy::expect_used, reason = "a test that cannot go on has failed")]

mod support;

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::Value;
use support::{Process, until};

fn cli(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_pegaflow"));
    let variables = std::env::vars().filter(|(name, _)| name.starts_with("PEGAFLOW_"));
    for (name, _) in variables {
        command.env_remove(name);
    }
    command.args(arguments).stdin(Stdio::null());
    command
}

fn run(command: &mut Command) -> (Option<i32>, String, String) {
    let output = command.output().expect("runs");
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("UTF-8");
    (output.status.code(), text(output.stdout), text(output.stderr))
}

fn file(folder: &Path, text: &str) -> PathBuf {
    let path = folder.join("pegaflow.toml");
    std::fs::write(&path, text).expect("written");
    path
}

/// By name: values, source, place.
fn shown(command: &mut Command) -> Vec<(String, Value, String, Value)> {
    let (code, stdout, stderr) = run(command);
    assert_eq!(code, Some(0), "{stderr}");
    let shown: Value = serde_json::from_str(&stdout).expect("JSON");
    let settings = shown["settings"].as_array().expect("a list").iter();
    let text = |value: &Value| value.as_str().expect("text").to_owned();
    settings
        .map(|one| (text(&one["name"]), one["values"].clone(), text(&one["source"]), one["place"].clone()))
        .collect()
}

#[test]
fn flags_outrank_the_environment_and_that_the_file() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = file(folder.path(), "dram = \"1GiB\"\ncapacity = \"2GiB\"\nlog = \"debug\"\nhuge_pages = true\n");
    let path = path.to_str().expect("text");
    let mut command = cli(&["config", "show", "--json", "--config", path, "--dram", "3GiB", "--huge-pages=false"]);
    let settings = shown(command.env("PEGAFLOW_CAPACITY", "4GiB").env("PEGAFLOW_DRAM", "5GiB"));
    let of = |name: &str| settings.iter().find(|one| one.0 == name).cloned().expect("is there");
    let expected = |name: &str, value: &str, source: &str, place: Value| {
        assert_eq!(of(name), (name.to_owned(), Value::from(vec![value]), source.to_owned(), place));
    };
    expected("dram", "3GiB", "flag", Value::Null);
    expected("capacity", "4GiB", "environment", "PEGAFLOW_CAPACITY".into());
    expected("log", "debug", "file", 3.into());
    expected("huge_pages", "false", "flag", Value::Null);
    expected("policy", "pegaflow", "default", Value::Null);
    assert_eq!(of("path").1, Value::Array(Vec::new()));
    // By its environment variable, as a service gives it.
    let settings = shown(cli(&["config", "show", "--json"]).env("PEGAFLOW_CONFIG", path));
    assert!(settings.iter().any(|one| one.0 == "dram" && one.1 == Value::from(vec!["1GiB"])));
}

#[test]
fn what_is_shown_is_a_file_of_the_same_settings() {
    let folder = tempfile::tempdir().expect("a folder");
    let flags = ["--path", "/a \"b\"", "--drive", "/b=1GiB,/c=2GiB", "--scrub", "0", "--http", "off", "--log", "warn"];
    let (code, text, _) = run(cli(&["config", "show"]).args(flags));
    assert_eq!(code, Some(0));
    let path = file(folder.path(), &text);
    let again = shown(cli(&["config", "show", "--json", "--config"]).arg(path));
    let before = shown(cli(&["config", "show", "--json"]).args(flags));
    let values = |all: &[(String, Value, String, Value)]| {
        all.iter().map(|one| (one.0.clone(), one.1.clone())).collect::<Vec<_>>()
    };
    assert_eq!(values(&before), values(&again));
    assert!(again.iter().filter(|one| one.1 != Value::Array(Vec::new())).all(|one| one.2 == "file"), "{again:?}");
}

#[test]
fn every_problem_is_named_at_once_with_its_place() {
    let folder = tempfile::tempdir().expect("a folder");
    let text = "dram = \"lots\"\ncapcity = \"1GiB\"\nregion = \"5MiB\"\ncodec = \"zip\"\ntcp = \"127.0.0.1:1\"\n";
    let path = file(folder.path(), text);
    let mut command = cli(&["config", "check", "--config", path.to_str().expect("text"), "--reinsert-percent", "60"]);
    command.env("PEGAFLOW_SCRUB", "much").env("PEGAFLOW_LOG", "==").env("PEGAFLOW_GUARANTEED_PERCENT", "101");
    let (code, _, stderr) = run(&mut command);
    assert_eq!(code, Some(2), "{stderr}");
    let at = |line: usize| format!("{}:{line}: ", path.display());
    for part in [
        format!("{}dram: 'lots' can not be used", at(1)),
        format!("{}capcity: there is no such setting; did you mean 'capacity'?", at(2)),
        format!("{}codec: 'zip' can not be used; give one of auto, always, none", at(4)),
        "PEGAFLOW_SCRUB: 'much' can not be used".to_owned(),
        "guaranteed_percent is 101; give 0 to 100".to_owned(),
        "region is given without a store".to_owned(),
        "insecure_loopback".to_owned(),
        "log '==' can not be read".to_owned(),
    ] {
        assert!(stderr.contains(&part), "{part} not in {stderr}");
    }
    let (code, stdout, _) = run(command.arg("--json"));
    let checked: Value = serde_json::from_str(&stdout).expect("JSON");
    assert_eq!((code, &checked["valid"]), (Some(2), &Value::Bool(false)));
    assert_eq!(checked["problems"].as_array().map(Vec::len), Some(stderr.lines().count()));
    let (code, stdout, _) = run(&mut cli(&["config", "check", "--json"]));
    assert_eq!((code, stdout.as_str()), (Some(0), "{\"problems\":[],\"valid\":true}\n"));
    let (code, _, stderr) = run(&mut cli(&["serve", "--config", "/nowhere/pegaflow.toml"]));
    assert!(code == Some(2) && stderr.contains("/nowhere/pegaflow.toml: cannot be read"), "{stderr}");
}

#[test]
fn the_example_names_every_setting_with_its_default() {
    let example = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/deploy/pegaflow.toml");
    let text = std::fs::read_to_string(&example).expect("read");
    let is_setting =
        |line: &&str| line.strip_prefix('#').is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_lowercase()));
    let lines: Vec<&str> = text.lines().filter(is_setting).map(|line| &line[1..]).collect();
    let defaults = shown(&mut cli(&["config", "show", "--json"]));
    let name = |line: &str| line.split(" = ").next().unwrap_or_default().to_owned();
    let mut named: Vec<String> = lines.iter().map(|line| name(line)).collect();
    let mut known: Vec<String> = defaults.iter().map(|one| one.0.clone()).collect();
    named.sort();
    known.sort();
    assert_eq!(named, known);
    // As it stands it changes nothing, and what it shows is understood.
    assert!(shown(cli(&["config", "show", "--json", "--config"]).arg(&example)).iter().all(|one| one.2 == "default"));
    let folder = tempfile::tempdir().expect("a folder");
    // Of two that stand for one another, one.
    let together: Vec<&str> = lines.iter().copied().filter(|line| name(line) != "encryption_key_command").collect();
    let path = file(folder.path(), &together.join("\n"));
    for (name, values, source, _) in shown(cli(&["config", "show", "--json", "--config"]).arg(path)) {
        let (_, default, ..) = defaults.iter().find(|one| one.0 == name).expect("known");
        let has_default = *default != Value::Array(Vec::new());
        assert!(source == "file" || name == "encryption_key_command", "{name}: {source}");
        assert!(!has_default || values == *default, "{name} is {values}, by default {default}");
    }
}

#[test]
fn hang_up_changes_what_can_change_and_names_the_rest() {
    let folder = tempfile::tempdir().expect("a folder");
    let socket = folder.path().join("p.sock");
    let store = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a folder");
    let of_store = format!("path = \"{}\"\ncapacity = \"64MiB\"\nregion = \"16MiB\"\n", store.path().display());
    let settings = |more: &str| file(folder.path(), &format!("http = \"off\"\n{of_store}{more}"));
    let path = settings("dram = \"32MiB\"\n");
    let mut child = cli(&["serve", "--config"])
        .arg(&path)
        .arg("--socket")
        .arg(&socket)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("starts");
    let mut log = BufReader::new(child.stderr.take().expect("piped")).lines();
    let mut ready = String::new();
    BufReader::new(child.stdout.take().expect("piped")).read_line(&mut ready).expect("reads");
    assert!(ready.contains("\"ready\":true"), "{ready}");
    let mut server = Process { child };
    let socket = socket.to_str().expect("text").to_owned();
    let policy = || run(&mut cli(&["--socket", &socket, "load-policy"])).1;
    let number = |name: &str| {
        let (_, stdout, _) = run(&mut cli(&["--socket", &socket, "--json", "status"]));
        let status: Value = serde_json::from_str(&stdout).expect("JSON");
        status["engine"][name].as_u64().expect("a number")
    };
    let mut wait_for = |part: &str| loop {
        let line = log.next().expect("the log goes on").expect("reads");
        if line.contains(part) {
            return line;
        }
    };
    assert_eq!((policy().as_str(), number("write_budget_day_bytes"), number("guaranteed_percent")), ("auto\n", 0, 50));
    settings(
        "dram = \"64MiB\"\nload_policy = \"never\"\nwrite_budget = \"1GiB/day\"\nscrub = \"1MiB\"\nguaranteed_percent = 20\n",
    );
    server.signal("-HUP");
    let line = wait_for("takes a restart");
    assert!(line.contains("dram") && line.contains("64MiB"), "{line}");
    until("policy, budget and shares have changed", || {
        policy() == "never\n" && number("write_budget_day_bytes") == 1 << 30 && number("guaranteed_percent") == 20
    });
    settings("load_policy = \"sometimes\"\n");
    server.signal("-HUP");
    let line = wait_for("the settings stay as they are");
    assert!(line.contains("pegaflow.toml:5: load_policy"), "{line}");
    assert_eq!(policy(), "never\n");
    server.signal("-HUP");
    wait_for("the settings stay as they are");
    server.signal("-TERM");
    assert_eq!(server.wait_exit(), Some(0));
}

#[test]
fn the_doctor_names_what_is_wrong_and_what_mends_it() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("store");
    let examine = |arguments: &[&str]| -> (Option<i32>, Value) {
        let mut command = cli(&["--json", "doctor", "--no-measure", "--dram", "16MiB", "--socket"]);
        let (code, stdout, stderr) = run(command.arg(folder.path().join("p.sock")).args(arguments));
        (code, serde_json::from_str(&stdout).unwrap_or_else(|error| panic!("{stdout}{stderr}: {error}")))
    };
    let (code, good) = examine(&[]);
    assert_eq!((code, &good["is_good"]), (Some(0), &Value::Bool(true)), "{good}");
    let (code, full) = examine(&["--capacity", "9000000TiB", "--path", path.to_str().expect("text")]);
    assert_eq!((code, &full["is_good"]), (Some(1), &Value::Bool(false)), "{full}");
    let findings = full["findings"].as_array().expect("a list");
    let wrong: Vec<&Value> = findings.iter().filter(|finding| finding["state"] == "wrong").collect();
    assert!(
        wrong.iter().any(|finding| finding["remedy"].as_str().is_some_and(|text| text.contains("give it at most")))
    );
    assert!(!path.exists(), "looking changes nothing");
    let (code, text, _) = run(cli(&["doctor", "--no-measure", "--dram", "90000TiB"]).env("PEGAFLOW_HTTP", "off"));
    assert!(code == Some(1) && text.contains("WRONG   memory: "), "{text}");
}
