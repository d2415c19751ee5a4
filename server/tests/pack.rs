//! `pegaflow pack`: blocks of one store are found and loaded out of another one, also where either is encrypted; what was
//! changed, what nobody vouches for and what is of something else is refused.
#![expect(clippy::expect_used, reason = "a test that cannot go on has failed")]

mod support;

use std::path::Path;
use std::process::Command;

use pegaflow_engine::LoadOutcome;
use pegaflow_server::client::{CompletionResult, Endpoint};
use serde_json::Value;
use support::{BLOCKS, PATIENCE, Process, Worker};

const COUNT: u32 = BLOCKS / 2;

/// Exit code, standard output as JSON, standard error.
fn pack(arguments: &[&str]) -> (Option<i32>, Value, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_pegaflow"));
    let output = command.args(["--json", "pack"]).args(arguments).env_remove("PEGAFLOW_PATH").output().expect("runs");
    let json = serde_json::from_slice(&output.stdout).unwrap_or_default();
    (output.status.code(), json, String::from_utf8(output.stderr).expect("UTF-8"))
}

/// A folder with stores, keys and packs.
struct Place(tempfile::TempDir);

impl Place {
    fn new() -> Self {
        Self(tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a directory"))
    }

    fn path(&self, name: &str) -> String {
        self.0.path().join(name).to_str().expect("UTF-8").to_owned()
    }

    fn server(&self, store: &str, more: &[&str]) -> (Process, Worker) {
        let socket = self.0.path().join("p.sock");
        let mut command = Process::command(&socket);
        command.args(["--capacity", "64MiB", "--region", "4MiB", "--warm-start", "off", "--path", &self.path(store)]);
        let (server, _) = Process::start({
            command.args(more);
            command
        });
        let worker = Worker::new(Endpoint::Unix(socket));
        worker.register();
        worker.client.wait_connected(PATIENCE).expect("connects");
        (server, worker)
    }

    /// A store in which the worker's blocks lie; what they hold.
    fn saved(&self, store: &str, more: &[&str]) -> Vec<Vec<u8>> {
        let (server, mut worker) = self.server(store, more);
        (0..COUNT).for_each(|block| worker.fill(block, block as u8));
        let operation = worker.start_save(COUNT).expect("accepted");
        worker.wait(operation);
        let held = (0..COUNT).map(|block| worker.read(block)).collect();
        stop(server, &worker);
        held
    }

    /// Loads all blocks out of a store.
    fn loaded(&self, store: &str, more: &[&str]) -> Vec<Vec<u8>> {
        let (server, worker) = self.server(store, more);
        let operation = worker.start_load(COUNT);
        let loaded = LoadOutcome { loaded_dram: 0, loaded_nvme: COUNT, failed: vec![] };
        assert_eq!(worker.wait(operation), CompletionResult::Load(loaded));
        let found = (0..COUNT).map(|block| worker.read(BLOCKS - COUNT + block)).collect();
        stop(server, &worker);
        found
    }

    fn key(&self, name: &str) -> (String, String) {
        let (code, made, error) = pack(&["key", &self.path(name)]);
        assert_eq!(code, Some(0), "{error}");
        (self.path(name), made["public"].as_str().expect("a key").to_owned())
    }
}

fn stop(mut server: Process, worker: &Worker) {
    worker.client.close(PATIENCE);
    server.signal("-TERM");
    assert_eq!(server.wait_exit(), Some(0));
}

fn store<'a>(path: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    [&["--path", path, "--capacity", "64MiB", "--region", "4MiB"], more].concat()
}

#[test]
fn a_namespace_goes_from_one_store_to_another() {
    let place = Place::new();
    let held = place.saved("a", &[]);
    let (key, public) = place.key("signer");
    let (file, a, b) = (place.path("kv.pack"), place.path("a"), place.path("b"));
    let (code, made, error) = pack(&[&["export", &file, "--key", &key], &store(&a, &[])[..]].concat());
    assert_eq!((code, &made["blocks"], &made["left_out"]), (Some(0), &COUNT.into(), &0.into()), "{error}");
    let (code, found, error) = pack(&["verify", &file]);
    assert_eq!(
        (code, &found["blocks"], &found["signer"]),
        (Some(0), &COUNT.into(), &public.as_str().into()),
        "{error}"
    );

    let import = |more: &[&str]| pack(&[&["import", &file, "--trust", &public], &store(&b, more)[..]].concat());
    let (code, done, error) = import(&[]);
    assert_eq!((code, &done["imported"], &done["present"]), (Some(0), &COUNT.into(), &0.into()), "{error}");
    let (code, done, _) = import(&[]);
    assert_eq!((code, &done["imported"], &done["present"]), (Some(0), &0.into(), &COUNT.into()));
    assert!(place.loaded("b", &[]) == held);
    // The same pack, whole, does not get in without its signer's key, nor over itself.
    let (code, _, error) = pack(&[&["import", &file], &store(&b, &[])[..]].concat());
    assert!(code == Some(4) && error.contains(&public), "{error}");
    let (code, _, error) = pack(&[&["export", &file, "--unsigned"], &store(&a, &[])[..]].concat());
    assert!(code == Some(2) && error.contains("exists already"), "{error}");
}

#[test]
fn what_was_changed_or_is_of_something_else_is_refused() {
    let place = Place::new();
    place.saved("a", &[]);
    let (file, a) = (place.path("kv.pack"), place.path("a"));
    let (code, ..) = pack(&[&["export", &file, "--unsigned"], &store(&a, &[])[..]].concat());
    assert_eq!(code, Some(0));
    let import = |file: &str, into: &str, more: &[&str]| {
        pack(&[&["import", file, "--unsigned"], &store(&place.path(into), more)[..]].concat())
    };
    let whole = std::fs::read(&file).expect("there");
    let changed = place.path("changed.pack");
    for at in [100, whole.len() - 1000] {
        let mut bytes = whole.clone();
        bytes[at] ^= 1;
        std::fs::write(&changed, bytes).expect("written");
        let (code, found, error) = import(&changed, "c", &[]);
        assert_eq!(code, Some(1), "{error}");
        assert!(found["error"]["kind"] == "Corrupt" && error.contains("changed"), "{error}");
    }
    let (code, _, error) = pack(&["verify", &changed]);
    assert_eq!(code, Some(1), "{error}");
    let (code, _, error) = import(&place.path("signer"), "c", &[]);
    assert_eq!(code, Some(3), "{error}");
    // A store that knows another model.
    let socket = place.0.path().join("p.sock");
    let mut command = Process::command(&socket);
    command.args(["--capacity", "64MiB", "--region", "4MiB", "--path", &place.path("d")]);
    let (server, _) = Process::start(command);
    let worker = Worker::new(Endpoint::Unix(socket));
    let other = pegaflow_engine::NamespaceDescriptor::new().with("model", "another");
    let spec = pegaflow_engine::InstanceSpec { namespace: other, ..Worker::spec() };
    worker.client.register(spec, worker.memory()).expect("registers");
    worker.client.wait_connected(PATIENCE).expect("connects");
    let operation = worker.start_save(1).expect("accepted");
    worker.wait(operation);
    stop(server, &worker);
    let (code, _, error) = import(&file, "d", &[]);
    assert!(code == Some(4) && error.contains("model is m in the pack, another here"), "{error}");
    let (code, done, error) = import(&file, "d", &["--new"]);
    assert_eq!((code, &done["imported"]), (Some(0), &COUNT.into()), "{error}");
    // Which of two?
    let export = |more: &[&str]| {
        let file = place.path("two.pack");
        pack(&[&["export", &file, "--unsigned"], &store(&place.path("d"), more)[..]].concat())
    };
    let (code, _, error) = export(&[]);
    assert!(code == Some(2) && error.contains("(m)") && error.contains("(another)"), "{error}");
    assert_eq!(export(&["--namespace", "ffffffffffff"]).0, Some(3));
    assert!(!Path::new(&place.path("two.pack.partial")).exists());
}

#[test]
fn encrypted_stores_pack_and_take_what_is_in_clear_in_the_pack() {
    use std::os::unix::fs::PermissionsExt;
    let place = Place::new();
    let secret = place.path("secret");
    std::fs::write(&secret, "5a".repeat(32)).expect("written");
    std::fs::set_permissions(&secret, std::fs::Permissions::from_mode(0o600)).expect("ours");
    let encrypted = ["--encryption-key-file", secret.as_str()];
    let held = place.saved("a", &encrypted);
    let file = place.path("kv.pack");
    let (a, b, c) = (place.path("a"), place.path("b"), place.path("c"));
    let (code, made, error) = pack(&[&["export", &file, "--unsigned"], &store(&a, &encrypted)[..]].concat());
    assert_eq!((code, &made["blocks"]), (Some(0), &COUNT.into()), "{error}");
    for (path, name, more) in [(&b, "b", &encrypted[..]), (&c, "c", &[])] {
        let (code, done, error) = pack(&[&["import", &file, "--unsigned"], &store(path, more)[..]].concat());
        assert_eq!((code, &done["imported"]), (Some(0), &COUNT.into()), "{error}");
        assert!(place.loaded(name, more) == held, "{name}");
    }
}
