//! `pegaflow verify`: what it prints, and how it ends.
#![expect(clippy::expect_used, reason = "a test that cannot go on has failed")]

mod support;

use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;

use pegaflow_server::client::Endpoint;
use support::{PATIENCE, Process, Worker};

/// Exit code, standard output as JSON if it is, standard error.
fn verify(arguments: &[&str], store: &Path) -> (Option<i32>, serde_json::Value, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_pegaflow"));
    let output = command.arg("verify").args(arguments).arg(store).output().expect("runs");
    let json = serde_json::from_slice(&output.stdout).unwrap_or_default();
    (output.status.code(), json, String::from_utf8(output.stderr).expect("UTF-8"))
}

#[test]
fn a_store_is_checked_and_repaired_and_the_exit_code_says_so() {
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a directory");
    let (socket, store) = (directory.path().join("p.sock"), directory.path().join("store"));
    let mut command = Process::command(&socket);
    command.args(["--capacity", "64MiB", "--region", "4MiB", "--path"]).arg(&store);
    let (mut server, _) = Process::start(command);
    let worker = Worker::new(Endpoint::Unix(socket));
    worker.register();
    worker.client.wait_connected(PATIENCE).expect("connects");
    let operation = worker.start_save(32).expect("accepted");
    worker.wait(operation);
    worker.client.flush(PATIENCE).expect("durable");
    let (code, _, error) = verify(&[], &store);
    assert_eq!(code, Some(5), "{error}");
    assert!(error.contains(&server.child.id().to_string()), "it says who has it open: {error}");
    worker.client.close(PATIENCE);
    server.signal("-TERM");
    assert_eq!(server.wait_exit(), Some(0));

    let (code, found, error) = verify(&["--json"], &store);
    assert_eq!((code, &found["problems"], error.as_str()), (Some(0), &0.into(), ""), "{found}");
    let report = &found["stores"][0]["report"];
    assert_eq!((&report["rows"], &report["records"], &report["is_clean"]), (&32.into(), &32.into(), &true.into()));

    // A page of a payload: the second record's.
    let regions = std::fs::OpenOptions::new().write(true).open(store.join("regions.0")).expect("there");
    regions.write_all_at(&[0xee; 64], (2 + 3 + 1) * 4096).expect("written");
    let (code, found, _) = verify(&["--json"], &store);
    assert_eq!((code, &found["problems"], &found["is_good"]), (Some(1), &1.into(), &false.into()), "{found}");
    assert_eq!(found["stores"][0]["report"]["findings"][0]["problem"], "bad_checksum", "{found}");
    let (code, found, _) = verify(&["--json", "--repair"], &store);
    assert_eq!((code, &found["problems"], &found["repaired"]), (Some(0), &1.into(), &1.into()), "{found}");
    let (code, found, _) = verify(&["--json"], &store);
    assert_eq!((code, &found["stores"][0]["report"]["rows"]), (Some(0), &31.into()), "{found}");
    assert_eq!(verify(&[], &store).0, Some(0), "as text");

    let (code, _, error) = verify(&[], directory.path());
    assert!(code == Some(2) && error.contains("there is no store"), "{error}");
    assert_eq!(
        Command::new(env!("CARGO_BIN_EXE_pegaflow")).arg("verify").output().expect("runs").status.code(),
        Some(2)
    );
}

/// An encrypted store: without its key, with another one, or with one that others can read, programs end with 4 and change
/// nothing.
#[test]
fn an_encrypted_store_is_refused_without_its_key() {
    use std::os::unix::fs::PermissionsExt;
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a directory");
    let (socket, store) = (directory.path().join("p.sock"), directory.path().join("store"));
    let key = |name: &str, digits: &str, mode| {
        let path = directory.path().join(name);
        std::fs::write(&path, digits.repeat(32)).expect("written");
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).expect("ours");
        path.into_os_string().into_string().expect("UTF-8")
    };
    let (right, wrong, open) = (key("right", "5a", 0o600), key("wrong", "5b", 0o600), key("open", "5a", 0o644));
    let command = |key: &[&str]| {
        let mut command = Process::command(&socket);
        command.args(["--capacity", "64MiB", "--region", "4MiB", "--log", "error", "--path"]).arg(&store).args(key);
        command
    };
    let (mut server, _) = Process::start(command(&["--encryption-key-file", &right]));
    let worker = Worker::new(Endpoint::Unix(socket.clone()));
    worker.register();
    worker.client.wait_connected(PATIENCE).expect("connects");
    let operation = worker.start_save(32).expect("accepted");
    worker.wait(operation);
    worker.client.flush(PATIENCE).expect("durable");
    worker.client.close(PATIENCE);
    server.signal("-TERM");
    assert_eq!(server.wait_exit(), Some(0));

    let image = || std::fs::read(store.join("regions.0")).expect("there");
    let before = image();
    let refused: [(&[&str], &str); 4] = [
        (&[], "--encryption-key-file"),
        (&["--encryption-key-file", &wrong], "another key"),
        (&["--encryption-key-file", &open], "chmod 600"),
        (&["--encryption-key-command", "printf '%064d' 7"], "another key"),
    ];
    for (arguments, remedy) in refused {
        let output = command(arguments).output().expect("runs");
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(4), "{arguments:?}: {said}");
        assert!(said.contains(remedy), "{arguments:?}: {said}");
        let (code, _, said) = verify(arguments, &store);
        assert!(code == Some(4) && said.contains(remedy), "{arguments:?}: {said}");
        assert!(before == image(), "{arguments:?} changed the store");
    }
    let (code, found, error) = verify(&["--json", "--encryption-key-file", &right], &store);
    assert_eq!((code, &found["problems"]), (Some(0), &0.into()), "{found} {error}");
    let report = &found["stores"][0]["report"];
    assert_eq!((&report["rows"], &report["records"]), (&32.into(), &32.into()));
}
