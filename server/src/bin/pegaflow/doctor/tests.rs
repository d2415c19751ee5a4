use super::*;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;

const MEMORY: &str =
    "MemTotal:       16000000 kB\nMemAvailable:    8388608 kB\nHugePages_Free:      512\nHugepagesize:       2048 kB\n";

#[test]
fn memory_has_to_do_for_dram_and_the_server() {
    assert_eq!(machine::room(MEMORY, None, 7 << 30).state, State::Good);
    let too_much = machine::room(MEMORY, None, 8 << 30);
    assert_eq!(
        (too_much.state, too_much.remedy.as_deref()),
        (State::Wrong, Some("give dram at most 7.50 GiB, or free some memory"))
    );
    assert_eq!(machine::room(MEMORY, Some(4 << 30), 4 << 30).state, State::Wrong, "the control group is smaller");
    assert_eq!(machine::room("", None, 1).state, State::Missing);
    assert_eq!(machine::huge_pages(MEMORY, 1 << 30).state, State::Good);
    let few = machine::huge_pages(MEMORY, 2 << 30);
    assert!(few.state == State::Slow && few.remedy.is_some_and(|remedy| remedy.contains("vm.nr_hugepages=1024")));
    assert_eq!(machine::of_memory(MEMORY, "HugePages_Free"), Some(512));
}

#[test]
fn a_socket_is_there_can_be_made_or_can_not() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("new/p.sock");
    assert!(reach::socket(&path).found.contains("one can be started"));
    let there = folder.path().join("there.sock");
    let _listener = UnixListener::bind(&there).expect("bound");
    assert!(reach::socket(&there).found.contains("a server answers"));
    let long = folder.path().join("x".repeat(120));
    assert_eq!(reach::socket(&long).state, State::Wrong);
    // Root may write everywhere.
    std::fs::set_permissions(folder.path(), std::fs::Permissions::from_mode(0o500)).expect("changed");
    let is_refused = reach::socket(&folder.path().join("no/p.sock")).state == State::Wrong;
    assert_eq!(is_refused, !rustix::process::geteuid().is_root());
}

#[test]
fn a_drive_is_tried_and_left_as_it_was() {
    let folder = tempfile::tempdir().expect("a folder");
    let store = folder.path().join("not/made/yet");
    let findings = drive::examine(&store, 1 << 20, true);
    let with = |part: &str| findings.iter().find(|finding| finding.found.contains(part));
    assert!(with("GB/s").is_some() || with("not measured").is_some(), "{findings:?}");
    assert!(with("io_uring").is_some(), "{findings:?}");
    assert_eq!(std::fs::read_dir(folder.path()).expect("read").count(), 0, "nothing is left behind");
    let full = drive::examine(&store, u64::MAX / 2, false);
    assert!(
        full[0].state == State::Wrong && full[0].remedy.as_ref().is_some_and(|text| text.contains("at most")),
        "{full:?}"
    );
}
