//! Encryption at rest: who can read what is on the drives. Owns the keys of a store (`keys.0`, `keys.1`), the sealing of
//! payloads, the names under which records stand in headers and in the index, and the authentication of headers.
//! Never does I/O on regions. A store without a key has none of it.
//!
//! One key-encryption key, which the store never keeps, wraps a secret of the store and one data key for each namespace.
//! Destroying a data key makes all that was sealed with it noise. `docs/format.md` draws it, `docs/security.md` says what
//! it is good for.

mod data_key;
mod key;
mod key_file;
mod keyring;

pub(super) use data_key::{DataKey, Names, SEALED_AT, Seal, SealedAs, SealedNames, Subject};
pub use key::EncryptionKey;
pub(super) use key_file::KEY_FILES;
#[cfg(any(test, feature = "fault-injection"))]
pub(super) use key_file::fuzz_key_entry;
pub(super) use keyring::{HeaderKey, Keyring};

use ring::aead::{AES_256_GCM, LessSafeKey, UnboundKey};
use ring::rand::{SecureRandom, SystemRandom};

use crate::error::{Error, ErrorKind, Result};

/// Bytes of every key.
const KEY_BYTES: usize = 32;
/// Bytes of a nonce of AES-GCM.
const NONCE_BYTES: usize = 12;
/// Bytes of a tag of AES-GCM.
const TAG_BYTES: usize = 16;

/// AES-256-GCM with this key.
fn cipher(key: &[u8; KEY_BYTES]) -> Result<LessSafeKey> {
    let key = UnboundKey::new(&AES_256_GCM, key);
    key.map(LessSafeKey::new).map_err(|_| Error::new(ErrorKind::Unsupported, "AES-256-GCM can not be used"))
}

/// Random bytes of the system's.
fn random<const N: usize>() -> Result<[u8; N]> {
    let mut bytes = [0; N];
    let filled = SystemRandom::new().fill(&mut bytes);
    filled.map(|()| bytes).map_err(|_| Error::new(ErrorKind::Io, "the system gives no random numbers"))
}
