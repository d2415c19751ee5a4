//! What holds for every command that there is.

use std::path::Path;

use super::*;

/// Commands that do something, as their words.
fn leaves(command: &clap::Command, path: &[String]) -> Vec<Vec<String>> {
    let below = command.get_subcommands().filter(|it| it.get_name() != "help");
    let found: Vec<Vec<String>> =
        below.flat_map(|it| leaves(it, &[path, &[it.get_name().to_owned()]].concat())).collect();
    if found.is_empty() { vec![path.to_vec()] } else { found }
}

/// Where a command is added: write its schema, and run it in `server/tests/json_output.rs`.
#[test]
fn every_command_has_a_schema_of_what_it_prints() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/schemas");
    for words in leaves(&Options::command(), &[]) {
        let schema = folder.join(format!("{}.json", words.join("-")));
        assert!(schema.is_file(), "pegaflow {} has no schema {}", words.join(" "), schema.display());
    }
}

#[test]
fn the_command_line_is_consistent() {
    Options::command().debug_assert();
}
