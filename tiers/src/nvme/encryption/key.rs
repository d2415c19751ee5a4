//! The key-encryption key: where it comes from. It is held in memory while a store is open, and written nowhere.

use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use zeroize::Zeroizing;

use super::KEY_BYTES;
use crate::error::{Error, ErrorKind, Result};

/// What a file or a command may say at most: 64 digits and white space.
const TEXT_BYTES_MAX: u64 = 4096;
/// How long a command may take.
const COMMAND_PATIENCE: Duration = Duration::from_secs(30);
/// How often it is looked at meanwhile.
const COMMAND_POLL: Duration = Duration::from_millis(10);

/// A key of 32 bytes with which a store's own keys are wrapped. `Debug` shows nothing of it; dropping it wipes it.
#[derive(Clone)]
pub struct EncryptionKey(Zeroizing<[u8; KEY_BYTES]>);

impl EncryptionKey {
    /// From its 32 bytes, which must be random.
    pub fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(Zeroizing::new(bytes))
    }

    /// Reads 64 hexadecimal digits from a file, which nobody but its owner may read or write, and which belongs to the
    /// user of this process or to root. `openssl rand -hex 32` makes one.
    ///
    /// # Errors
    /// `PermissionDenied` for a file that others have rights to or own, `InvalidInput` for anything but 64 digits, and
    /// what the file system reports.
    pub fn from_file(path: &Path) -> Result<Self> {
        let failed = |source| Error::from_io(format!("reading the key file {}", path.display()), source);
        let file = std::fs::File::open(path).map_err(failed)?;
        let found = file.metadata().map_err(failed)?;
        let user = rustix::process::geteuid().as_raw();
        let denied = |why: String| Err(Error::new(ErrorKind::PermissionDenied, why));
        if found.mode() & 0o077 != 0 {
            let mode = found.mode() & 0o777;
            return denied(format!(
                "the key file {} has mode {mode:03o}: others can read or change it; chmod 600 it",
                path.display()
            ));
        }
        if found.uid() != user && found.uid() != 0 {
            let owner = found.uid();
            return denied(format!(
                "the key file {} belongs to user {owner}, not to {user} or root; chown it",
                path.display()
            ));
        }
        let mut text = Zeroizing::new(String::new());
        file.take(TEXT_BYTES_MAX).read_to_string(&mut text).map_err(failed)?;
        Self::from_hex(&text).map_err(|error| error.with("path", path.display()))
    }

    /// Takes 64 hexadecimal digits from the standard output of a command, which `/bin/sh -c` runs: for a key that a key
    /// management service keeps. It has 30 s.
    ///
    /// # Errors
    /// `Unsupported` if it cannot be run or fails, `Timeout`, `InvalidInput` for anything but 64 digits.
    pub fn from_command(command: &str) -> Result<Self> {
        let failed = |why: String| Error::new(ErrorKind::Unsupported, format!("the command for the key {why}"));
        let spawned = Command::new("/bin/sh")
            .args(["-c", command])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(|error| failed(format!("cannot be run: {error}")))?;
        let mut child = Reaped(spawned);
        let deadline = Instant::now() + COMMAND_PATIENCE;
        // What it says fits into the pipe, or is too much: nobody has to read while it runs.
        let status = loop {
            match child.0.try_wait() {
                Ok(Some(status)) => break status,
                Ok(None) if Instant::now() >= deadline => {
                    let message = format!("the command for the key was not done after {COMMAND_PATIENCE:?}");
                    return Err(Error::new(ErrorKind::Timeout, message));
                }
                Ok(None) => std::thread::sleep(COMMAND_POLL),
                Err(error) => return Err(failed(format!("cannot be waited for: {error}"))),
            }
        };
        if !status.success() {
            return Err(failed(format!("failed: {status}")));
        }
        let mut text = Zeroizing::new(String::new());
        if let Some(said) = child.0.stdout.take() {
            let read = said.take(TEXT_BYTES_MAX).read_to_string(&mut text);
            read.map_err(|error| failed(format!("says nothing that can be read: {error}")))?;
        }
        Self::from_hex(&text)
    }

    fn from_hex(text: &str) -> Result<Self> {
        let digits = text.trim();
        let bad = || {
            let message = "a key is 64 hexadecimal digits and nothing else; make one with: openssl rand -hex 32";
            Error::new(ErrorKind::InvalidInput, message)
        };
        if digits.len() != 2 * KEY_BYTES || !digits.is_ascii() {
            return Err(bad());
        }
        let mut bytes = Zeroizing::new([0; KEY_BYTES]);
        for (byte, pair) in bytes.iter_mut().zip(digits.as_bytes().chunks_exact(2)) {
            let pair = std::str::from_utf8(pair).map_err(|_| bad())?;
            if pair.starts_with('+') {
                return Err(bad());
            }
            *byte = u8::from_str_radix(pair, 16).map_err(|_| bad())?;
        }
        Ok(Self(bytes))
    }

    pub(super) fn bytes(&self) -> &[u8; KEY_BYTES] {
        &self.0
    }
}

impl std::fmt::Debug for EncryptionKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("EncryptionKey(..)")
    }
}

/// A child that does not outlive whoever waits for it.
struct Reaped(std::process::Child);

impl Drop for Reaped {
    fn drop(&mut self) {
        if !matches!(self.0.try_wait(), Ok(Some(_))) {
            drop(self.0.kill());
            drop(self.0.wait());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn kind(result: Result<EncryptionKey>) -> Option<ErrorKind> {
        result.err().map(|error| error.kind())
    }

    #[test]
    fn a_key_file_is_its_owners_alone() {
        let at = tempfile::tempdir().expect("a directory");
        let path = at.path().join("key");
        let mode = |mode| std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).expect("ours");
        std::fs::write(&path, "0a".repeat(32) + "\n").expect("written");
        mode(0o600);
        assert_eq!(EncryptionKey::from_file(&path).expect("a key").bytes(), &[10; 32]);
        for open in [0o640, 0o604, 0o620, 0o666] {
            mode(open);
            assert_eq!(kind(EncryptionKey::from_file(&path)), Some(ErrorKind::PermissionDenied), "{open:o}");
        }
        mode(0o600);
        for bad in ["", "0a", &"0a".repeat(33), &"zz".repeat(32), &"+a".repeat(32)] {
            std::fs::write(&path, bad).expect("written");
            assert_eq!(kind(EncryptionKey::from_file(&path)), Some(ErrorKind::InvalidInput), "{bad:?}");
        }
    }

    #[test]
    fn a_command_gives_a_key_or_says_why_not() {
        let key = EncryptionKey::from_command("printf '%064d' 7").expect("a key");
        assert_eq!(key.bytes()[31], 7);
        assert_eq!(format!("{key:?}"), "EncryptionKey(..)");
        assert_eq!(kind(EncryptionKey::from_command("exit 3")), Some(ErrorKind::Unsupported));
        assert_eq!(kind(EncryptionKey::from_command("echo nothing")), Some(ErrorKind::InvalidInput));
    }
}
