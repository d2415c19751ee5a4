//! Asking the program `nvme` for a health page: found in the system's own folders only, run with nothing from the
//! environment, given a few seconds, and never waited for when the device does not answer.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::device::is_controller;
use super::log_page::{DriveHealth, PAGE_BYTES};
use crate::error::{Error, ErrorKind, Result};

/// Where the program may be.
const PROGRAMS: [&str; 4] = ["/usr/sbin/nvme", "/usr/bin/nvme", "/sbin/nvme", "/usr/local/sbin/nvme"];
/// How long it may take.
const PATIENCE: Duration = Duration::from_secs(5);

/// Reads health pages, one after the other.
#[derive(Debug, Default)]
pub struct HealthReader {
    program: Option<PathBuf>,
    /// One that was ended and has not gone: the kernel still waits for the device.
    stuck: Option<Child>,
}

impl HealthReader {
    /// With the program `nvme` of this system.
    pub fn new() -> Self {
        Self { program: PROGRAMS.iter().map(PathBuf::from).find(|program| program.exists()), stuck: None }
    }

    #[cfg(test)]
    fn with_program(program: &Path) -> Self {
        Self { program: Some(program.to_owned()), stuck: None }
    }

    /// The health of a controller, by its name (`nvme0`).
    ///
    /// # Errors
    /// `Unsupported` if the program is not installed or may not read the device, `Timeout` if the device does not answer,
    /// `Busy` while it still has not, `Corrupt` for an answer that is no health page, `Io`.
    pub fn read(&mut self, controller: &str) -> Result<DriveHealth> {
        let unsupported = |what: String| Error::new(ErrorKind::Unsupported, what);
        let program = self.program.as_deref();
        let program = program.ok_or_else(|| unsupported("the program nvme is not installed".into()))?;
        if !is_controller(controller) {
            return Err(unsupported(format!("{controller} is no NVMe controller")));
        }
        if let Some(stuck) = &mut self.stuck
            && matches!(stuck.try_wait(), Ok(None))
        {
            return Err(Error::new(ErrorKind::Busy, format!("{controller} has not answered the last time")));
        }
        self.stuck = None;
        let mut child = start(program, controller)?;
        let mut page = Vec::new();
        let ended = read_until(&mut child, &mut page, Instant::now() + PATIENCE);
        if !ended {
            let _ = child.kill();
            self.stuck = Some(child);
            return Err(Error::new(ErrorKind::Timeout, format!("{controller} does not answer")));
        }
        let status = child.wait().map_err(|source| Error::from_io("waiting for nvme", source))?;
        if !status.success() {
            return Err(unsupported(format!("nvme can not read {controller} ({status}); it needs CAP_SYS_ADMIN")));
        }
        DriveHealth::from_log_page(&page)
    }
}

fn start(program: &Path, controller: &str) -> Result<Child> {
    let mut command = Command::new(program);
    command.args(["smart-log", "--raw-binary"]).arg(format!("/dev/{controller}")).env_clear().current_dir("/");
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
    command.spawn().map_err(|source| Error::from_io(format!("starting {}", program.display()), source))
}

/// Reads what the child says, to its end but at most a little more than a page; false at the deadline.
fn read_until(child: &mut Child, page: &mut Vec<u8>, deadline: Instant) -> bool {
    let Some(mut output) = child.stdout.take() else { return true };
    let mut buffer = [0; PAGE_BYTES];
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let left = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: i64::from(left.subsec_nanos()) };
        match poll(&mut [PollFd::new(&output, PollFlags::IN)], Some(&left)) {
            Ok(0) => return false,
            Ok(_) => {}
            Err(rustix::io::Errno::INTR) => continue,
            Err(_) => return true,
        }
        match output.read(&mut buffer) {
            Ok(0) | Err(_) => return true,
            Ok(read) => page.extend(buffer.iter().take(read)),
        }
        // Too much: no page. The pipe closes and the child ends by itself.
        if page.len() > PAGE_BYTES {
            return true;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    /// A program that stands in for `nvme`.
    fn program(folder: &Path, script: &str) -> HealthReader {
        let path = folder.join("nvme");
        std::fs::write(&path, format!("#!/bin/sh\n{script}\n")).expect("written");
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o700)).expect("made executable");
        HealthReader::with_program(&path)
    }

    #[test]
    fn the_program_is_asked_for_the_raw_page_and_believed_only_if_it_is_one() {
        let folder = tempfile::tempdir().expect("a directory");
        let page = folder.path().join("page");
        let mut bytes = [0; PAGE_BYTES];
        (bytes[3], bytes[4], bytes[5]) = (100, 10, 7);
        std::fs::write(&page, bytes).expect("written");
        let asks = r#"[ "$*" = "smart-log --raw-binary /dev/nvme7" ] && [ -z "$HOME" ] || exit 3"#;
        let mut reader = program(folder.path(), &format!("{asks}; /bin/cat {}", page.display()));
        assert_eq!(reader.read("nvme7").expect("a page").used_percent, 7);
        let kind = |reader: &mut HealthReader, name: &str| reader.read(name).map_err(|error| error.kind());
        assert_eq!(kind(&mut reader, "nvme8"), Err(ErrorKind::Unsupported), "the program fails");
        for name in ["", "sda", "nvme0n1", "../nvme0", "nvme0 -x"] {
            assert_eq!(kind(&mut reader, name), Err(ErrorKind::Unsupported), "{name}");
        }
        assert_eq!(kind(&mut HealthReader::default(), "nvme0"), Err(ErrorKind::Unsupported));
        let cat = format!("/bin/cat {0} {0}", page.display());
        assert_eq!(kind(&mut program(folder.path(), &cat), "nvme0"), Err(ErrorKind::Corrupt), "too much");
        assert_eq!(kind(&mut program(folder.path(), "echo hello"), "nvme0"), Err(ErrorKind::Corrupt));
        let gone = HealthReader::with_program(&folder.path().join("gone")).read("nvme0").map_err(|error| error.kind());
        assert!(gone.is_err());
    }

    #[test]
    fn a_program_that_does_not_end_is_not_waited_for() {
        let folder = tempfile::tempdir().expect("a directory");
        let mut reader = program(folder.path(), "exec /bin/sleep 1000");
        assert_eq!(reader.read("nvme0").map_err(|error| error.kind()), Err(ErrorKind::Timeout));
        // It was killed; whether or not it has gone by now, the next question gets an answer of its own.
        let again = reader.read("nvme0").map_err(|error| error.kind());
        assert!(matches!(again, Err(ErrorKind::Timeout | ErrorKind::Busy)), "{again:?}");
        let mut stuck = reader.stuck.take().expect("the last one");
        drop(stuck.kill());
        drop(stuck.wait());
    }
}
