//! Tokens: made once, printed once, kept as digests. A token is 32 random bytes, so that a plain SHA-256 of it tells
//! nothing of it; it needs no slow hash, which is for what people think up.

use std::path::Path;
use std::sync::Arc;

use pegaflow_engine::{Error, ErrorKind, Result};
use ring::digest::{SHA256, digest};
use ring::rand::{SecureRandom, SystemRandom};
use subtle::ConstantTimeEq;

use super::{Client, Role};
use crate::limits::{NAME_BYTES_MAX, TOKENS_MAX};
use crate::owner_only;

/// So that people and scanners of repositories know one when they see it.
const PREFIX: &str = "pega_";
const RANDOM_BYTES: usize = 32;
const DIGEST_BYTES: usize = 32;

/// A token that was just made.
#[derive(Debug)]
pub struct NewToken {
    /// What the client gets. It is kept nowhere.
    pub token: String,
    /// The line for the server's file.
    pub line: String,
}

impl NewToken {
    /// Makes one for somebody.
    ///
    /// # Errors
    /// `InvalidInput` for a name that is empty, longer than 256 bytes, or has white space or a `#`; `Io` if the system gives
    /// no random numbers.
    pub fn make(role: Role, name: &str) -> Result<Self> {
        check_name(name)?;
        let mut random = [0; RANDOM_BYTES];
        let filled = SystemRandom::new().fill(&mut random);
        filled.map_err(|_| Error::new(ErrorKind::Io, "the system gives no random numbers"))?;
        let token = format!("{PREFIX}{}", hex(&random));
        let line = format!("{role} {name} {}", hex(digest(&SHA256, token.as_bytes()).as_ref()));
        Ok(Self { token, line })
    }
}

fn check_name(name: &str) -> Result<()> {
    let is_good = !name.is_empty()
        && name.len() <= NAME_BYTES_MAX
        && !name.chars().any(|c| c.is_whitespace() || c.is_control() || c == '#');
    if is_good {
        return Ok(());
    }
    let message =
        format!("'{name}' is no name for a token; give 1 to {NAME_BYTES_MAX} bytes without white space and #");
    Err(Error::new(ErrorKind::InvalidInput, message))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn unhex(text: &str) -> Option<[u8; DIGEST_BYTES]> {
    let mut bytes = [0; DIGEST_BYTES];
    if text.len() != 2 * DIGEST_BYTES || !text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return None;
    }
    for (byte, pair) in bytes.iter_mut().zip(text.as_bytes().chunks_exact(2)) {
        *byte = u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()?;
    }
    Some(bytes)
}

/// The tokens that a server takes.
#[derive(Debug)]
pub struct Tokens {
    entries: Vec<([u8; DIGEST_BYTES], Arc<Client>)>,
}

impl Tokens {
    /// Reads a file with one token a line: role, name, SHA-256 of the token, with white space between. Empty lines and
    /// those that begin with `#` do not count.
    ///
    /// # Errors
    /// `PermissionDenied` for a file that others have rights to, `InvalidInput` with the number of a line that can not be
    /// read, or for more than 1024 tokens, and what the file system reports.
    pub fn read(path: &Path) -> Result<Self> {
        Self::parse(&owner_only::read("the file of tokens", path)?).map_err(|error| error.with("path", path.display()))
    }

    pub(crate) fn parse(text: &str) -> Result<Self> {
        let bad = |message: String| Error::new(ErrorKind::InvalidInput, message);
        let mut entries: Vec<([u8; DIGEST_BYTES], Arc<Client>)> = Vec::new();
        for (number, line) in (1..).zip(text.lines()) {
            let line = line.trim();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let fields: Vec<&str> = line.split_whitespace().collect();
            let [role, name, digest] = fields[..] else {
                return Err(bad(format!("line {number} has {} words; give role, name and SHA-256", fields.len())));
            };
            let role = role.parse().map_err(|error| bad(format!("line {number}: {error}")))?;
            check_name(name).map_err(|error| bad(format!("line {number}: {error}")))?;
            let digest =
                unhex(digest).ok_or_else(|| bad(format!("line {number}: a SHA-256 has 64 hexadecimal digits")))?;
            if entries.iter().any(|(known, client)| *known == digest || client.name == name) {
                return Err(bad(format!("line {number}: the name or the token stands there twice")));
            }
            entries.push((digest, Client::new(role, name.to_owned())));
            if entries.len() > TOKENS_MAX {
                return Err(bad(format!("there are more than {TOKENS_MAX} tokens")));
            }
        }
        Ok(Self { entries })
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there are none: then nobody gets in.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Whose token this is. Takes the same time whichever it is, and whether it is one.
    pub(super) fn find(&self, token: &[u8]) -> Option<Arc<Client>> {
        let presented = digest(&SHA256, token);
        let mut found = None;
        for (digest, client) in &self.entries {
            if bool::from(digest[..].ct_eq(presented.as_ref())) {
                found = Some(client);
            }
        }
        found.cloned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_token_is_found_by_its_digest_alone() {
        let made: Vec<NewToken> =
            Role::ALL.into_iter().map(|role| NewToken::make(role, role.as_str()).expect("made")).collect();
        let text = made.iter().map(|new| new.line.as_str()).collect::<Vec<_>>().join("\n\n# a comment\n");
        let tokens = Tokens::parse(&text).expect("read");
        assert_eq!(tokens.len(), 3);
        for (new, role) in made.iter().zip(Role::ALL) {
            assert!(!text.contains(&new.token));
            let client = tokens.find(new.token.as_bytes()).expect("known");
            assert_eq!((client.role, client.name.as_str()), (role, role.as_str()));
            assert!(tokens.find(&new.token.as_bytes()[1..]).is_none());
            assert!(tokens.find(new.line.as_bytes()).is_none());
        }
        assert!(tokens.find(b"").is_none());
    }

    #[test]
    fn a_file_that_says_something_else_is_refused_by_its_line() {
        let digest = "0".repeat(64);
        for (text, what) in [
            (format!("operator alice {digest} more"), "line 1"),
            (format!("\nroot alice {digest}"), "line 2"),
            ("operator alice 00".to_owned(), "64"),
            (format!("operator alice {}", "+0".repeat(32)), "64"),
            (format!("operator a {digest}\nengine b {digest}"), "twice"),
            (format!("operator a {digest}\nengine a {}", "1".repeat(64)), "twice"),
        ] {
            let error = Tokens::parse(&text).expect_err("refused");
            assert!(error.message().contains(what), "{error}");
        }
        for name in ["", "a b", "a#", &"n".repeat(300)] {
            assert!(NewToken::make(Role::Engine, name).is_err(), "{name}");
        }
    }

    #[test]
    fn the_file_is_its_owners_alone() {
        let at = tempfile::tempdir().expect("a directory");
        let path = at.path().join("tokens");
        std::fs::write(&path, NewToken::make(Role::Engine, "e").expect("made").line).expect("written");
        for (mode, is_good) in [(0o600, true), (0o400, true), (0o640, false), (0o602, false)] {
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).expect("ours");
            let read = Tokens::read(&path).map(|tokens| tokens.len()).map_err(|error| error.kind());
            assert_eq!(read, if is_good { Ok(1) } else { Err(ErrorKind::PermissionDenied) }, "{mode:o}");
        }
    }
}
