//! A file of settings under the command line: TOML, one key for each long option, with `_` where the option has `-`. What
//! it says takes the place of the option's default; environment and flags outrank it. The options of the command are the
//! only list of settings there is: names, values and limits are checked by them.

use std::error::Error as _;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

use clap::builder::{OsStr, Resettable};
use clap::error::{ContextKind, ContextValue, ErrorKind as ClapKind};
use clap::parser::ValueSource;
use clap::{Arg, ArgMatches, Command, Id};
use toml::Spanned;
use toml::de::{DeTable, DeValue};

/// The largest file that is read: 1 MiB.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// A setting as the file has it.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Entry {
    /// The option's name, with `-`.
    name: String,
    line: usize,
    values: Vec<String>,
}

/// The settings of a file that can be used.
#[derive(Debug, Clone)]
pub(super) struct SettingsFile {
    path: PathBuf,
    entries: Vec<Entry>,
}

/// Where a setting comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// The command line.
    Flag,
    /// This environment variable.
    Environment(String),
    /// This line of the file, from 1.
    File(usize),
    /// Nobody has set it.
    Default,
}

/// A setting as it holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Setting {
    /// Its name in a file.
    pub name: String,
    /// Its values as they were written; none if it is not set and has no default.
    pub values: Vec<String>,
    /// Where they come from.
    pub source: Source,
}

impl SettingsFile {
    /// Reads a file for a command. What is wrong with it goes to `problems`, each with file and line; the rest is used.
    pub(super) fn read(path: &Path, command: &Command, problems: &mut Vec<String>) -> Self {
        let mut file = Self { path: path.to_owned(), entries: Vec::new() };
        match read_text(path) {
            Ok(text) => file.parse(&text, command, problems),
            Err(problem) => problems.push(problem),
        }
        file
    }

    fn parse(&mut self, text: &str, command: &Command, problems: &mut Vec<String>) {
        let (table, errors) = DeTable::parse_recoverable(text);
        let at = |span: &std::ops::Range<usize>| line_of(text, span.start);
        for error in errors {
            let line = error.span().map_or(1, |span| at(&span));
            problems.push(self.problem(line, error.message()));
        }
        // So that a value is judged by itself.
        let bare = without_environment_of(command.clone(), |_| true);
        for (key, value) in table.get_ref() {
            let line = at(&key.span());
            match entry(key.get_ref().as_ref(), line, value, command, &bare) {
                Ok(entry) => self.entries.push(entry),
                Err(problem) => problems.push(self.problem(line, &problem)),
            }
        }
        self.entries.sort_by_key(|entry| entry.line);
    }

    fn problem(&self, line: usize, what: &str) -> String {
        format!("{}:{line}: {what}", self.path.display())
    }

    /// The command with what the file says as its defaults.
    pub(super) fn under(&self, command: Command) -> Command {
        self.entries.iter().fold(command, |command, entry| {
            let Some(id) = id_of(&command, &entry.name) else { return command };
            command.mut_arg(id, |arg| arg.default_values(entry.values.clone()))
        })
    }

    /// Every setting of a command as it holds, in the order of its options. `command` is as it was before
    /// [`SettingsFile::under`], `matches` what came of it afterwards.
    pub(super) fn effective(file: Option<&Self>, command: &Command, matches: &ArgMatches) -> Vec<Setting> {
        let options = command.get_arguments().filter(|arg| is_setting(arg));
        let setting = |arg: &Arg| {
            let id = arg.get_id().as_str();
            let name = arg.get_long().unwrap_or_default();
            let in_file = || file.and_then(|file| file.entries.iter().find(|entry| entry.name == name));
            let source = match matches.value_source(id) {
                Some(ValueSource::CommandLine) => Source::Flag,
                Some(ValueSource::EnvVariable) => {
                    Source::Environment(arg.get_env().unwrap_or_default().to_string_lossy().into_owned())
                }
                Some(_) => in_file().map_or(Source::Default, |entry| Source::File(entry.line)),
                None => Source::Default,
            };
            let raw = matches.get_raw(id).into_iter().flatten();
            let values = raw.map(|value| value.to_string_lossy().into_owned()).collect();
            Setting { name: name.replace('-', "_"), values, source }
        };
        options.map(setting).collect()
    }
}

/// Every environment variable of the command that can not be used, by the argument that it is of.
pub(super) fn environment_problems(command: &Command) -> Vec<(Id, String)> {
    let bare = without_environment_of(command.clone(), |_| true);
    let wrong = command.get_arguments().filter_map(|arg| {
        let (name, variable) = (arg.get_long()?, arg.get_env()?);
        let value = std::env::var_os(variable)?;
        let problem = try_value(&bare, name, &value.to_string_lossy()).err()?;
        Some((arg.get_id().clone(), format!("{}: {problem}", variable.to_string_lossy())))
    });
    wrong.collect()
}

/// The command with arguments that the environment does not set.
pub(super) fn without_environment_of(command: Command, is_meant: impl Fn(&Id) -> bool) -> Command {
    command.mut_args(|arg| if is_meant(arg.get_id()) { arg.env(Resettable::<OsStr>::Reset) } else { arg })
}

/// Help, version, and what only says where settings are or what to do with them.
fn is_setting(arg: &Arg) -> bool {
    arg.get_long().is_some() && arg.get_env().is_some() && arg.get_id() != "config"
}

fn id_of(command: &Command, name: &str) -> Option<Id> {
    let mut settings = command.get_arguments().filter(|arg| is_setting(arg));
    settings.find(|arg| arg.get_long() == Some(name)).map(|arg| arg.get_id().clone())
}

fn entry(
    key: &str,
    line: usize,
    value: &Spanned<DeValue<'_>>,
    command: &Command,
    bare: &Command,
) -> Result<Entry, String> {
    let name = key.replace('_', "-");
    if key.contains('-') {
        return Err(format!("'{key}' is written '{}' here", key.replace('-', "_")));
    }
    let values = values_of(value.get_ref()).map_err(|problem| format!("{key}: {problem}"))?;
    if id_of(command, &name).is_none() {
        return Err(format!("{key}: there is no such setting{}", meant(bare, &name)));
    }
    for value in &values {
        try_value(bare, &name, value).map_err(|problem| format!("{key}: {problem}"))?;
    }
    Ok(Entry { name, line, values })
}

fn values_of(value: &DeValue<'_>) -> Result<Vec<String>, String> {
    let one = |value: &DeValue<'_>| match value {
        DeValue::String(text) => Ok(text.to_string()),
        DeValue::Integer(number) if number.radix() == 10 => Ok(number.as_str().replace('_', "")),
        DeValue::Float(number) => Ok(number.as_str().replace('_', "")),
        DeValue::Boolean(is) => Ok(is.to_string()),
        other => {
            Err(format!("a value of type {} is not understood; give text, a number, true or false", other.type_str()))
        }
    };
    match value {
        DeValue::Array(array) => array.iter().map(|value| one(value.get_ref())).collect(),
        DeValue::Table(_) => Err("settings are not in sections; write NAME = VALUE".to_owned()),
        value => Ok(vec![one(value)?]),
    }
}

/// The setting that somebody may have had in mind.
fn meant(bare: &Command, name: &str) -> String {
    let asked = bare.clone().try_get_matches_from([bare.get_name(), &format!("--{name}")]);
    match asked.err().as_ref().and_then(|error| error.get(ContextKind::SuggestedArg)) {
        Some(ContextValue::String(arg)) => {
            format!("; did you mean '{}'?", arg.trim_start_matches("--").replace('-', "_"))
        }
        _ => String::new(),
    }
}

/// What the command's own parser says of a value.
fn try_value(bare: &Command, name: &str, value: &str) -> Result<(), String> {
    let program = OsString::from(bare.get_name());
    let Err(error) = bare.clone().try_get_matches_from([program, format!("--{name}={value}").into()]) else {
        return Ok(());
    };
    match error.kind() {
        ClapKind::ValueValidation => {
            let why = error.source().map(|source| format!(": {source}")).unwrap_or_default();
            Err(format!("'{value}' can not be used{why}"))
        }
        ClapKind::InvalidValue => {
            let values = match error.get(ContextKind::ValidValue) {
                Some(ContextValue::Strings(values)) if !values.is_empty() => {
                    format!("; give one of {}", values.join(", "))
                }
                _ => String::new(),
            };
            Err(format!("'{value}' can not be used{values}"))
        }
        ClapKind::TooManyValues
        | ClapKind::TooFewValues
        | ClapKind::WrongNumberOfValues
        | ClapKind::ArgumentConflict => {
            Err(format!("'{value}' can not be used: the option takes no such number of values"))
        }
        // What else the command line would need is looked at when all of it is known.
        _ => Ok(()),
    }
}

fn read_text(path: &Path) -> Result<String, String> {
    let shown = path.display();
    let bytes = std::fs::metadata(path).map_err(|error| format!("{shown}: cannot be read: {error}"))?.len();
    if bytes > FILE_BYTES_MAX {
        return Err(format!("{shown}: {bytes} bytes; a file of settings has at most {FILE_BYTES_MAX}"));
    }
    std::fs::read_to_string(path).map_err(|error| format!("{shown}: cannot be read: {error}"))
}

/// From 1.
fn line_of(text: &str, at: usize) -> usize {
    text.bytes().take(at).filter(|byte| *byte == b'\n').count() + 1
}

#[cfg(test)]
mod tests;
