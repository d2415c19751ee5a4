//! `pegaflow serve`, `config` and `doctor`: what has to do with the server's settings.

use std::ffi::OsString;
use std::process::ExitCode;

use clap::{ArgMatches, Command, FromArgMatches, Subcommand};
use pegaflow_engine::ErrorKind;
use pegaflow_server::settings::{Loaded, Setting, Settings, Source, load};
use pegaflow_server::{ExitStatus, run_server};
use serde_json::{Value, json};

use crate::doctor;
use crate::pack::{self, PackCommand};
use crate::prewarm::{self, PrewarmOptions};

/// What is to be done with settings.
#[derive(Debug, Subcommand)]
pub(crate) enum ConfigCommand {
    /// Names every problem of the settings, with file and line. Exit status 0 if there is none, 2 otherwise.
    Check {
        #[command(flatten)]
        settings: Box<Settings>,
    },
    /// Prints the settings that hold as a file of settings, with where each comes from.
    Show {
        #[command(flatten)]
        settings: Box<Settings>,
    },
}

/// Commands with settings, which are read in a way of their own.
const COMMANDS: [&[&str]; 7] = [
    &["serve"],
    &["config", "check"],
    &["config", "show"],
    &["doctor"],
    &["prewarm"],
    &["pack", "export"],
    &["pack", "import"],
];

/// Which of the commands of this module was asked for.
pub(crate) fn asked_for(command: &Command, arguments: &[OsString]) -> Option<&'static [&'static str]> {
    let matches = command.clone().ignore_errors(true).try_get_matches_from(arguments).ok()?;
    let is_there = |path: &&&[&str]| {
        let mut at = Some(&matches);
        path.iter().all(|name| {
            at = at.and_then(|matches| matches.subcommand_matches(name));
            at.is_some()
        })
    };
    COMMANDS.iter().find(is_there).copied()
}

/// Does what was asked for.
pub(crate) fn command(command: &Command, path: &[&str], arguments: &[OsString]) -> ExitCode {
    let read = || load(command, path, arguments);
    let loaded = read();
    let has_json = arguments.iter().any(|argument| argument == "--json");
    match (path, loaded) {
        (["config", "check"], loaded) if has_json => {
            let problems = loaded.err().unwrap_or_default();
            println!("{}", json!({ "valid": problems.is_empty(), "problems": problems }));
            if problems.is_empty() { ExitStatus::Ok } else { ExitStatus::Usage }.into()
        }
        (_, Err(problems)) => {
            if has_json {
                super::print_error(ErrorKind::InvalidInput, &problems.join("; "));
            }
            problems.iter().for_each(|problem| eprintln!("pegaflow: {problem}"));
            ExitStatus::Usage.into()
        }
        (["config", "check"], Ok(_)) => {
            println!("the configuration is valid");
            ExitStatus::Ok.into()
        }
        (["config", ..], Ok(loaded)) => {
            show(&loaded, has_json);
            ExitStatus::Ok.into()
        }
        (["doctor"], Ok(loaded)) => {
            let of_doctor = loaded.matches.subcommand_matches("doctor");
            let measures = !of_doctor.is_some_and(|matches| matches.get_flag("no_measure"));
            doctor::examine(&loaded.settings, measures, has_json)
        }
        (["pack", ..], Ok(loaded)) => {
            match PackCommand::from_arg_matches(
                loaded.matches.subcommand_matches("pack").unwrap_or(&ArgMatches::default()),
            ) {
                Ok(command) => pack::with_store(&loaded, &command, has_json),
                Err(error) => error.exit(),
            }
        }
        (["prewarm"], Ok(loaded)) => match options_of(&loaded) {
            Ok(options) => prewarm::prewarm(&loaded, &options, has_json),
            Err(error) => error.exit(),
        },
        (_, Ok(loaded)) => match run_server(&loaded, &read) {
            Ok(()) => ExitStatus::Ok.into(),
            Err(error) => super::failed(&error, has_json),
        },
    }
}

fn options_of(loaded: &Loaded) -> Result<PrewarmOptions, clap::Error> {
    let none = ArgMatches::default();
    PrewarmOptions::from_arg_matches(loaded.matches.subcommand_matches("prewarm").unwrap_or(&none))
}

fn show(loaded: &Loaded, is_json: bool) {
    let settings = loaded.effective.iter().filter(|setting| setting.name != "config");
    if is_json {
        let settings: Vec<Value> = settings.map(in_json).collect();
        println!("{}", json!({ "settings": settings }));
        return;
    }
    for setting in settings {
        let line = match setting.values.as_slice() {
            [] => format!("# {} is not set", setting.name),
            values => format!("{} = {}", setting.name, in_toml(values)),
        };
        match &setting.source {
            Source::Default if setting.values.is_empty() => println!("{line}"),
            Source::Default => println!("{line:<48} # default"),
            Source::Flag => println!("{line:<48} # command line"),
            Source::Environment(variable) => println!("{line:<48} # {variable}"),
            Source::File(at) => println!("{line:<48} # line {at} of the file"),
        }
    }
}

fn in_json(setting: &Setting) -> Value {
    let (source, place) = match &setting.source {
        Source::Default => ("default", Value::Null),
        Source::Flag => ("flag", Value::Null),
        Source::Environment(variable) => ("environment", json!(variable)),
        Source::File(line) => ("file", json!(line)),
    };
    json!({ "name": setting.name, "values": setting.values, "source": source, "place": place })
}

/// As text, but for numbers and truth values; JSON's text is TOML's.
fn in_toml(values: &[String]) -> String {
    let one = |value: &String| {
        let is_bare = value.parse::<u64>().is_ok() || value == "true" || value == "false";
        if is_bare { value.clone() } else { Value::from(value.as_str()).to_string() }
    };
    match values {
        [value] => one(value),
        values => format!("[{}]", values.iter().map(one).collect::<Vec<_>>().join(", ")),
    }
}
