//! The socket: whether it can be made, and whether a server is there already.

use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::Path;

use pegaflow_server::default_socket_path;
use pegaflow_server::settings::Settings;

use super::{Finding, State};

/// The longest path of a socket.
const PATH_BYTES_MAX: usize = 103;

pub(super) fn examine(settings: &Settings) -> Vec<Finding> {
    let path = settings.socket.clone().unwrap_or_else(default_socket_path);
    vec![socket(&path)]
}

pub(super) fn socket(path: &Path) -> Finding {
    let shown = path.display().to_string();
    if shown.len() > PATH_BYTES_MAX {
        let found = format!("{shown} has {} bytes, at most {PATH_BYTES_MAX} work", shown.len());
        return Finding::other(State::Wrong, "socket", found, "give socket a shorter path");
    }
    match UnixStream::connect(path) {
        Ok(_) => Finding::good("socket", format!("a server answers at {shown}")),
        Err(error) if error.kind() == ErrorKind::PermissionDenied => {
            let owner = std::fs::metadata(path).map(|of| format!(" of user {}", of.uid())).unwrap_or_default();
            let remedy = format!("run engines and commands as the user of the server: sudo -u '#UID' ... ({error})");
            Finding::other(State::Wrong, "socket", format!("{shown}{owner} is not ours"), remedy)
        }
        Err(_) => folder(path, &shown),
    }
}

/// No server is there; one could be if its folder can be made.
fn folder(path: &Path, shown: &str) -> Finding {
    let there = path.ancestors().skip(1).find(|folder| folder.exists()).unwrap_or(Path::new("/"));
    let can_write = rustix::fs::access(there, rustix::fs::Access::WRITE_OK | rustix::fs::Access::EXEC_OK);
    match can_write {
        Ok(()) => Finding::good("socket", format!("no server at {shown}; one can be started")),
        Err(error) => {
            let found = format!("{} can not be written: {error}", there.display());
            let remedy =
                format!("give socket a path in a folder of this user, or: sudo chown $USER {}", there.display());
            Finding::other(State::Wrong, "socket", found, remedy)
        }
    }
}
