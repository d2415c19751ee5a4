//! `pegaflow completions` and `pegaflow man`: what shells and readers of manuals want, made from the command line itself, so
//! that it can not lag behind.

use std::io::Write;
use std::path::{Path, PathBuf};

use clap::Command;
use clap_complete::Shell;
use clap_mangen::Man;
use pegaflow_engine::{Error, ErrorKind, Result};
use serde_json::json;

/// Prints the script that has a shell complete commands and options.
///
/// # Errors
/// `Io` if standard output is closed.
pub(crate) fn completions(mut command: Command, shell: Shell, is_json: bool) -> Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut command, "pegaflow", &mut script);
    if is_json {
        let script = String::from_utf8_lossy(&script);
        script_out(json!({ "shell": shell.to_string(), "script": script }).to_string().as_bytes())?;
        return script_out(b"\n");
    }
    script_out(&script)
}

/// Whoever reads may have read enough: `pegaflow completions bash | head`.
fn script_out(bytes: &[u8]) -> Result<()> {
    match std::io::stdout().write_all(bytes) {
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        written => written.map_err(|error| Error::from_io("standard output", error)),
    }
}

/// Writes a page for each command into a directory, which is made if it is missing; pages of that name are replaced.
///
/// # Errors
/// `NotFound`, `PermissionDenied`, `NoSpace` or `Io` with the file.
pub(crate) fn man(command: Command, folder: &Path, is_json: bool) -> Result<()> {
    std::fs::create_dir_all(folder)
        .map_err(|error| Error::from_io(format!("cannot make the directory {}", folder.display()), error))?;
    let mut command = command.disable_help_subcommand(true);
    command.build();
    let mut pages = Vec::new();
    write_pages(&command, folder, &mut pages)?;
    if is_json {
        println!("{}", json!({ "pages": pages }));
    } else {
        println!(
            "{} pages in {}; read them with: man -l {}/pegaflow.1",
            pages.len(),
            folder.display(),
            folder.display()
        );
    }
    Ok(())
}

/// The page of a command and those of the commands below it.
fn write_pages(command: &Command, folder: &Path, pages: &mut Vec<PathBuf>) -> Result<()> {
    let man = Man::new(command.clone()).source(concat!("PegaFlow ", env!("CARGO_PKG_VERSION"))).manual("PegaFlow");
    let path = folder.join(man.get_filename());
    let mut page = Vec::new();
    man.render(&mut page).map_err(|error| Error::new(ErrorKind::Io, error.to_string()))?;
    std::fs::write(&path, page).map_err(|error| Error::from_io(format!("cannot write {}", path.display()), error))?;
    pages.push(path);
    command.get_subcommands().try_for_each(|below| write_pages(below, folder, pages))
}
