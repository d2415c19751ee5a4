//! From a command line to settings that hold: the file that it names, the environment, the flags, and what is wrong with
//! any of them, all at once.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{ArgMatches, Command, FromArgMatches};

use super::Settings;
use super::file::{Setting, SettingsFile, environment_problems, without_environment_of};

/// Settings that hold.
#[derive(Debug, Clone)]
pub struct Loaded {
    /// The settings.
    pub settings: Settings,
    /// Each of them as it was written, and where.
    pub effective: Vec<Setting>,
    /// All of the command line, for what else it has.
    pub matches: ArgMatches,
}

/// Reads the settings of a command, or of the subcommand at `path`. Ends the process where the command line asks for help
/// or the version only.
///
/// # Errors
/// Every problem of file, environment and flags; each names its place, the value and what to give instead.
pub fn load(command: &Command, path: &[&str], arguments: &[OsString]) -> Result<Loaded, Vec<String>> {
    let mut problems = Vec::new();
    let Some(of_settings) = find(command, path) else { return Err(vec![format!("there is no command {path:?}")]) };
    let file = named_file(command, path, arguments).map(|file| SettingsFile::read(&file, of_settings, &mut problems));
    let wrong = environment_problems(of_settings);
    let change = |command: Command| {
        let command = without_environment_of(command, |id| wrong.iter().any(|(of, _)| of == id));
        file.as_ref().map_or(command.clone(), |file| file.under(command))
    };
    let changed = change_at(command.clone(), path, &change);
    problems.extend(wrong.iter().map(|(_, problem)| problem.clone()));
    match changed.try_get_matches_from(arguments) {
        Ok(matches) => {
            if let Some(at_path) = descend(&matches, path) {
                match Settings::from_arg_matches(at_path) {
                    Ok(settings) => {
                        problems.extend(settings.problems());
                        if problems.is_empty() {
                            let effective = SettingsFile::effective(file.as_ref(), of_settings, at_path);
                            return Ok(Loaded { settings, effective, matches });
                        }
                    }
                    Err(error) => problems.push(told(&error)),
                }
            }
        }
        Err(error) if !error.use_stderr() => error.exit(),
        Err(error) => problems.push(told(&error)),
    }
    Err(problems)
}

/// The file that the command line or the environment names.
fn named_file(command: &Command, path: &[&str], arguments: &[OsString]) -> Option<PathBuf> {
    let matches = command.clone().ignore_errors(true).try_get_matches_from(arguments).ok()?;
    descend(&matches, path)?.try_get_one::<PathBuf>("config").ok().flatten().cloned()
}

fn find<'a>(command: &'a Command, path: &[&str]) -> Option<&'a Command> {
    path.iter().try_fold(command, |command, name| command.find_subcommand(name))
}

fn descend<'a>(matches: &'a ArgMatches, path: &[&str]) -> Option<&'a ArgMatches> {
    path.iter().try_fold(matches, |matches, name| matches.subcommand_matches(name))
}

fn change_at(command: Command, path: &[&str], change: &dyn Fn(Command) -> Command) -> Command {
    match path {
        [] => change(command),
        [name, rest @ ..] => command.mut_subcommand(name, |command| change_at(command, rest, change)),
    }
}

/// What is wrong with a command line, without the usage, which does not help to find the place.
pub fn told(error: &clap::Error) -> String {
    let text = error.to_string();
    let lines = text.lines().take_while(|line| !line.starts_with("Usage:") && !line.starts_with("For more"));
    let told: Vec<&str> = lines.map(str::trim).filter(|line| !line.is_empty()).collect();
    told.join("; ").trim_start_matches("error: ").to_owned()
}
