use clap::{Parser, Subcommand};

use super::*;

#[derive(Debug, Parser)]
struct Line {
    #[command(subcommand)]
    command: Outer,
}

#[derive(Debug, Subcommand)]
enum Outer {
    #[command(subcommand)]
    Policy(PolicyCommand),
}

/// What `pegaflow policy replay` answers to these words.
fn answer(words: &[&str]) -> std::result::Result<(), String> {
    let line = Line::try_parse_from(["pegaflow", "policy", "replay"].iter().chain(words)).map_err(|e| e.to_string())?;
    let Outer::Policy(command) = line.command;
    policy(&command, false).map_err(|error| error.to_string())
}

#[test]
fn sizes_are_blocks_or_bytes() {
    let blocks = |text| blocks_of("--capacities", text, ByteSize(2 << 20)).map_err(|error| error.to_string());
    assert_eq!((blocks("500"), blocks("64GiB"), blocks("2MiB")), (Ok(500), Ok(32 << 10), Ok(1)));
    for (text, expected) in [
        ("0", "less than a block"),
        ("1MiB", "less than a block (blocks have 2 MiB)"),
        ("1.5", "is no size"),
        ("-5", "is no size"),
        ("", "is no size"),
        ("many", "write a number of blocks"),
        ("99999999999", "is 99999999999 blocks; a tier has 4294967295 at most"),
    ] {
        let error = blocks(text).expect_err("refused");
        assert!(error.starts_with("--capacities: ") && error.contains(expected), "{text}: {error}");
    }
}

#[test]
fn what_is_wrong_is_said_before_anything_is_replayed() {
    let folder = tempfile::tempdir().expect("a folder");
    let trace = folder.path().join("trace.jsonl");
    std::fs::write(&trace, "{\"timestamp\": 0, \"hash_ids\": [1, 2]}\n{\"timestamp\": 1, \"hash_ids\": [1\n")
        .expect("written");
    let trace = trace.to_str().expect("text");
    for (words, expected) in [
        (&["--capacities", "5"][..], "Give a TRACE"),
        (&["nowhere.jsonl", "--capacities", "5"], "there is no file nowhere.jsonl"),
        (&[trace, "--capacities", "5"], "trace.jsonl, line 2: not JSON"),
        (&[trace, "--capacities", "5,x"], "--capacities: 'x'"),
        (&[trace, "--capacities", "5", "--dram", "0"], "--dram: '0'"),
        (&[trace, "--capacities", "5", "--block-bytes", "0"], "--block-bytes"),
        (&[trace, "--capacities", "5", "--policies", "belady"], "'belady' is no policy"),
        (&[trace, "--capacities", "5", "--write-hurdle", "nan"], "a hurdle is a number"),
        (&[trace, "--capacities", "5", "--pareto", "1,-1"], "a hurdle is a number"),
        (&[trace, "--capacities", "5", "--plot", "/nowhere/x"], "cannot draw to /nowhere/x"),
        (&["--synthetic", "poetry", "--capacities", "5"], "'poetry' is no workload"),
    ] {
        let error = answer(words).expect_err("refused");
        assert!(error.contains(expected), "{words:?}: {error}");
    }
}

#[test]
fn a_small_trace_is_replayed_and_drawn() {
    let folder = tempfile::tempdir().expect("a folder");
    let (trace, plot) = (folder.path().join("trace.jsonl"), folder.path().join("plot"));
    std::fs::write(&trace, "{\"timestamp\": 0, \"hash_ids\": [1, 2]}\n{\"timestamp\": 9, \"hash_ids\": [1, 3]}\n")
        .expect("written");
    let (trace, plot_text) = (trace.to_str().expect("text"), plot.to_str().expect("text"));
    assert_eq!(answer(&[trace, "--capacities", "2, 2,10GiB", "--dram", "1", "--plot", plot_text]), Ok(()));
    for extension in ["svg", "png"] {
        assert!(std::fs::metadata(plot.with_extension(extension)).expect("drawn").len() > 1000);
    }
}
