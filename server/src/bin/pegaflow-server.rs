//! The server: one store, one DRAM arena, shared by every inference engine of the host. The same as `pegaflow serve`.
#![deny(unsafe_code)]

use std::ffi::OsString;
use std::process::ExitCode;

use clap::{CommandFactory, Parser};
use pegaflow_server::settings::{Settings, load};
use pegaflow_server::{ExitStatus, run_server};

/// A tiered KV cache for LLM engines: DRAM and NVMe, kept across restarts.
///
/// Exit status: 0 stopped in order, 1 other, 2 invalid command line or configuration, 3 store or socket in use by another
/// process, 4 foreign or newer store format, 5 permission denied, 6 no space, 7 input/output error.
#[derive(Debug, Parser)]
#[command(name = "pegaflow-server", version)]
struct Options {
    #[command(flatten)]
    settings: Settings,
    /// Check the configuration, print every problem, and end.
    #[arg(long)]
    validate: bool,
}

fn main() -> ExitCode {
    let arguments: Vec<OsString> = std::env::args_os().collect();
    let read = || load(&Options::command(), &[], &arguments);
    let loaded = match read() {
        Ok(loaded) => loaded,
        Err(problems) => {
            problems.iter().for_each(|problem| eprintln!("pegaflow-server: {problem}"));
            return ExitStatus::Usage.into();
        }
    };
    if loaded.matches.get_flag("validate") {
        println!("the configuration is valid");
        return ExitStatus::Ok.into();
    }
    match run_server(&loaded, &read) {
        Ok(()) => ExitStatus::Ok.into(),
        Err(error) => {
            eprintln!("pegaflow-server: {error:#}");
            ExitStatus::from(error.kind()).into()
        }
    }
}
