//! What a person sees on a terminal: colours where they are wanted, and none with `NO_COLOR`, in no command.
#![expect(clippy::expect_used, reason = "a test that cannot go on has failed")]

mod support;

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::process::{Command, Stdio};

use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use support::Local;

/// Runs a command on a terminal of its own, types what there is to type, and returns what it showed.
fn shown(arguments: &[&str], typed: &str, no_color: bool) -> String {
    let ours = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).expect("a terminal");
    grantpt(&ours).expect("ours");
    unlockpt(&ours).expect("ours");
    let name = ptsname(&ours, Vec::new()).expect("a name");
    let theirs = File::options().read(true).write(true).open(name.to_str().expect("UTF-8")).expect("opens");
    let end = || Stdio::from(OwnedFd::from(theirs.try_clone().expect("another")));
    let mut command = Command::new(env!("CARGO_BIN_EXE_pegaflow"));
    command.args(arguments).stdin(end()).stdout(end()).stderr(end());
    command.env("TERM", "xterm-256color").env_remove("CLICOLOR").env_remove("CLICOLOR_FORCE").env_remove("NO_COLOR");
    if no_color {
        command.env("NO_COLOR", "1");
    }
    let mut child = command.spawn().expect("starts");
    // So that its end is the end of the terminal.
    drop((command, theirs));
    let mut ours = File::from(ours);
    ours.write_all(typed.as_bytes()).expect("types");
    let (mut seen, mut part) = (Vec::new(), [0; 4096]);
    while let Ok(count @ 1..) = ours.read(&mut part) {
        seen.extend_from_slice(&part[..count]);
    }
    child.wait().expect("ends");
    String::from_utf8_lossy(&seen).into_owned()
}

/// Whether there is a sequence that sets a colour or a style, other than one that resets both.
fn has_color(text: &str) -> bool {
    text.split("\u{1b}[").skip(1).any(|rest| {
        let end = rest.find(|c: char| !c.is_ascii_digit() && c != ';');
        end.is_some_and(|end| rest[end..].starts_with('m') && !["", "0"].contains(&&rest[..end]))
    })
}

#[test]
fn no_color_is_heard_by_every_command() {
    let mut local = Local::start();
    let socket = local.socket.to_str().expect("UTF-8").to_owned();
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a directory");
    let path = folder.path().to_str().expect("UTF-8");
    let colored: [(&[&str], &str); 4] = [
        (&["--help"], ""),
        (&["ping", "--frequency"], ""),
        (&["help", "serve"], ""),
        (&["--socket", &socket, "top", "--interval", "0.2"], "q"),
    ];
    for (arguments, typed) in colored {
        let text = shown(arguments, typed, false);
        assert!(has_color(&text), "{arguments:?} has colours on a terminal: {text:?}");
    }
    let plain: [(&[&str], &str); 5] = [
        (&["--socket", &socket, "status"], ""),
        (&["doctor", "--no-measure", "--dram", "64MiB", "--path", path, "--capacity", "64MiB"], ""),
        (&["verify", path], ""),
        (&["config", "show"], ""),
        (&["policy", "replay", "--synthetic", "chat", "--capacities", "500", "--policies", "lru"], ""),
    ];
    for (arguments, typed) in colored.into_iter().chain(plain) {
        let text = shown(arguments, typed, true);
        assert!(!text.is_empty() && !has_color(&text), "{arguments:?} has none with NO_COLOR: {text:?}");
    }
    local.stop().expect("stops");
}

#[test]
fn scripts_of_completion_and_pages_of_the_manual_name_commands_and_options() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a directory");
    let pages = folder.path().join("new/man1");
    let run = |arguments: &[&str]| {
        let output = Command::new(env!("CARGO_BIN_EXE_pegaflow")).args(arguments).output().expect("runs");
        assert_eq!(output.status.code(), Some(0), "{arguments:?}: {output:?}");
        String::from_utf8(output.stdout).expect("UTF-8")
    };
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let script = run(&["completions", shell]);
        assert!(script.contains("load-policy") && script.contains("connect-timeout"), "{shell}");
    }
    let bash = folder.path().join("pegaflow.bash");
    std::fs::write(&bash, run(&["completions", "bash"])).expect("written");
    let ask = format!(
        "source {} && COMP_WORDS=(pegaflow load-pol) COMP_CWORD=1 && _pegaflow pegaflow load-pol && echo ${{COMPREPLY[@]}}",
        bash.display()
    );
    let answered = Command::new("bash").args(["--norc", "-c", &ask]).output().expect("runs");
    assert_eq!(String::from_utf8_lossy(&answered.stdout).trim(), "load-policy", "{answered:?}");

    run(&["man", pages.to_str().expect("UTF-8")]);
    let page = |name: &str| std::fs::read_to_string(pages.join(name)).unwrap_or_else(|error| panic!("{name}: {error}"));
    assert!(
        page("pegaflow.1").contains("pegaflow\\-prewarm(1)") && page("pegaflow-serve.1").contains("write\\-budget")
    );
    for name in ["pegaflow-pack.1", "pegaflow-pack-export.1", "pegaflow-policy-replay.1", "pegaflow-size.1"] {
        let page = page(name);
        assert!(page.contains(".SH NAME") && page.contains(".SH SYNOPSIS"), "{page}");
        assert!(page.contains(concat!("PegaFlow ", env!("CARGO_PKG_VERSION"))), "{page}");
    }
}

#[test]
fn a_purge_asks_and_only_a_yes_purges() {
    let mut local = Local::start();
    let socket = local.socket.to_str().expect("UTF-8").to_owned();
    let worker = local.worker();
    let operation = worker.start_save(8).expect("accepted");
    worker.wait(operation);
    let purge = ["--socket", &socket, "purge", "--all"];
    let found = || worker.lookup(8).expect("answers").hit_blocks;
    // Ctrl-D answers nothing.
    for no in ["n\n", "\n", "yesterday\n", "\u{4}"] {
        let text = shown(&purge, no, false);
        let is_asked = text.contains("(m)") && text.contains("Purge 1 namespaces, for good? [y/N]");
        assert!(is_asked && text.contains("nothing was purged"), "{no:?}: {text:?}");
        assert_eq!(found(), 8, "{no:?}");
    }
    let text = shown(&purge, "Yes\n", false);
    assert!(text.contains("for good? [y/N]") && text.contains("1 namespaces purged, 0 keys destroyed"), "{text:?}");
    assert_eq!(found(), 0);
    let text = shown(&[&purge[..], &["--yes"]].concat(), "", false);
    assert!(text.contains("namespaces purged") && !text.contains("[y/N]"), "{text:?}");
    worker.client.close(support::PATIENCE);
    local.stop().expect("stops");
}
