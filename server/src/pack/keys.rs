//! Who signs a pack, and whose signature counts. A key file has the 32 bytes of an Ed25519 seed as 64 hexadecimal digits.

use std::fs::OpenOptions;
use std::io::Write;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

use pegaflow_engine::{Error, ErrorKind, Result};
use ring::rand::{SecureRandom, SystemRandom};
use ring::signature::{ED25519, Ed25519KeyPair, KeyPair, UnparsedPublicKey};

use super::format::{CONTEXT, Footer};

/// Makes a key, readable by its owner only; its public half.
///
/// # Errors
/// `InvalidInput` if there is a file already, `Io`.
pub fn make(path: &Path) -> Result<String> {
    let mut seed = [0; 32];
    let no_random = |_| Error::new(ErrorKind::Io, "the system gives no random numbers");
    SystemRandom::new().fill(&mut seed).map_err(no_random)?;
    let io = |error| Error::from_io(format!("the key {}", path.display()), error);
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path).map_err(io)?;
    file.write_all(format!("{}\n", hex(&seed)).as_bytes()).and_then(|()| file.sync_all()).map_err(io)?;
    Ok(hex(pair_of(&seed)?.public_key().as_ref()))
}

/// Reads a key.
///
/// # Errors
/// `PermissionDenied` if others may read it, `InvalidInput` if it is no key, `NotFound`, `Io`.
pub fn read(path: &Path) -> Result<Ed25519KeyPair> {
    let io = |error| super::cannot_read(path, error);
    let mode = std::fs::metadata(path).map_err(io)?.mode();
    if mode & 0o077 != 0 {
        let message = format!("others may read the key {} (mode {:o}); chmod 600 it", path.display(), mode & 0o777);
        return Err(Error::new(ErrorKind::PermissionDenied, message));
    }
    let text = std::fs::read_to_string(path).map_err(io)?;
    let bad = || {
        let message = format!("{} is no key: make one with `pegaflow pack key FILE`", path.display());
        Error::new(ErrorKind::InvalidInput, message)
    };
    pair_of(&unhex(text.trim()).ok_or_else(bad)?)
}

fn pair_of(seed: &[u8; 32]) -> Result<Ed25519KeyPair> {
    Ed25519KeyPair::from_seed_unchecked(seed).map_err(|_| Error::new(ErrorKind::InvalidInput, "this is no key"))
}

/// Signs what the footer's digest stands for.
pub fn sign(footer: &mut Footer, key: &Ed25519KeyPair) {
    let signature = key.sign(&[CONTEXT, &footer.digest].concat());
    footer.signer.iter_mut().zip(key.public_key().as_ref()).for_each(|(to, from)| *to = *from);
    footer.signature.iter_mut().zip(signature.as_ref()).for_each(|(to, from)| *to = *from);
}

/// Whether the signature of a signed footer is its signer's.
pub fn is_right(footer: &Footer) -> bool {
    let key = UnparsedPublicKey::new(&ED25519, &footer.signer);
    key.verify(&[CONTEXT, &footer.digest].concat(), &footer.signature).is_ok()
}

pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// 64 hexadecimal digits.
pub fn unhex(text: &str) -> Option<[u8; 32]> {
    let mut bytes = [0; 32];
    if text.len() != 64 || !text.is_ascii() {
        return None;
    }
    for (at, byte) in bytes.iter_mut().enumerate() {
        *byte = u8::from_str_radix(text.get(2 * at..2 * at + 2)?, 16).ok()?;
    }
    Some(bytes)
}
