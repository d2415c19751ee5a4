//! `pegaflow doctor`: looks at the machine with the server's settings in hand, measures what there is to measure, and says
//! what is slow, missing or wrong, with what mends it.

mod drive;
mod machine;
mod reach;

use std::process::ExitCode;

use pegaflow_server::ExitStatus;
use pegaflow_server::settings::Settings;
use serde::Serialize;
use serde_json::json;

/// How something is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum State {
    /// As it should be.
    Good,
    /// It works, and would be better otherwise.
    Slow,
    /// It is not there, and something goes without it.
    Missing,
    /// The server will not start, or will not do what it was told.
    Wrong,
}

/// What was found of one thing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct Finding {
    /// What was looked at.
    what: String,
    state: State,
    /// What it is like.
    found: String,
    /// What mends it: a command or a setting.
    remedy: Option<String>,
}

impl Finding {
    fn good(what: impl Into<String>, found: impl Into<String>) -> Self {
        Self { what: what.into(), state: State::Good, found: found.into(), remedy: None }
    }

    fn other(state: State, what: impl Into<String>, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { what: what.into(), state, found: found.into(), remedy: Some(remedy.into()) }
    }
}

/// Looks at everything; tells as it goes.
pub(crate) fn examine(settings: &Settings, measures: bool, is_json: bool) -> ExitCode {
    let mut findings = Vec::new();
    let mut add = |more: Vec<Finding>| {
        if !is_json {
            more.iter().for_each(print);
        }
        findings.extend(more);
    };
    add(machine::examine(settings));
    add(reach::examine(settings));
    for (path, capacity) in settings.drives_in_all() {
        add(drive::examine(&path, capacity, measures));
    }
    let is_good = findings.iter().all(|finding| finding.state != State::Wrong);
    if is_json {
        println!("{}", json!({ "is_good": is_good, "findings": findings }));
    } else {
        let count = |state| findings.iter().filter(|finding| finding.state == state).count();
        let (slow, missing, wrong) = (count(State::Slow), count(State::Missing), count(State::Wrong));
        println!("{} looked at: {wrong} wrong, {missing} missing, {slow} slow", findings.len());
    }
    if is_good { ExitStatus::Ok } else { ExitStatus::Failed }.into()
}

fn print(finding: &Finding) {
    let state = match finding.state {
        State::Good => "good",
        State::Slow => "slow",
        State::Missing => "missing",
        State::Wrong => "WRONG",
    };
    println!("{state:<8}{}: {}", finding.what, finding.found);
    if let Some(remedy) = &finding.remedy {
        println!("{:8}-> {remedy}", "");
    }
}

#[cfg(test)]
mod tests;
