//! The files `keys.0` and `keys.1`: a store's keys, wrapped. Both hold the same; an entry that is damaged in one is taken
//! from the other, and one that says *destroyed* in either is. Entries have 512 bytes, what a drive writes as a whole, and
//! stand at their number. `docs/format.md` draws them.

use std::time::{SystemTime, UNIX_EPOCH};

use ring::aead::{Aad, LessSafeKey, Nonce};
use zeroize::Zeroizing;

use super::{EncryptionKey, KEY_BYTES, NONCE_BYTES, TAG_BYTES, cipher, random};
use crate::block::NamespaceId;
use crate::error::{Error, ErrorKind, Result};
use crate::nvme::backing::SmallFile;
use crate::nvme::page::{get, get_u16, get_u32, get_u64, is_sealed, put, seal};
use crate::nvme::switches::is_off;
use crate::nvme::version::{FORMAT_VERSION, StoreUuid};

/// Their names.
pub(in crate::nvme) const KEY_FILES: [&str; 2] = ["keys.0", "keys.1"];

const MAGIC: &[u8; 8] = b"PEGAKEYS";
const ENTRY_BYTES: usize = 512;
const WRAPPED_BYTES: usize = KEY_BYTES + TAG_BYTES;
/// The most data keys that a store ever has, destroyed ones included: files of 128 MiB.
const KEYS_MAX: u32 = 262_144;
const WRAPPING_CONTEXT: &str = "pegaflow 2026-11-23 wrapping of keys v1";

/// What an entry is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub(super) enum KeyState {
    /// The secret of the store; entry 0 alone.
    Store = 1,
    /// The data key of a namespace.
    Data = 2,
    /// It was the data key of a namespace.
    Destroyed = 3,
}

/// One entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) state: KeyState,
    pub(super) number: u32,
    /// Zero in entry 0.
    pub(super) namespace: NamespaceId,
    nonce: [u8; NONCE_BYTES],
    wrapped: [u8; WRAPPED_BYTES],
    created_unix_ms: u64,
}

impl Entry {
    fn encode(&self, store: StoreUuid) -> [u8; ENTRY_BYTES] {
        let mut bytes = [0; ENTRY_BYTES];
        put(&mut bytes, 0, MAGIC);
        put(&mut bytes, 16, &FORMAT_VERSION.to_le_bytes());
        put(&mut bytes, 18, &(self.state as u16).to_le_bytes());
        put(&mut bytes, 20, &self.number.to_le_bytes());
        put(&mut bytes, 24, store.as_bytes());
        put(&mut bytes, 40, self.namespace.as_bytes());
        put(&mut bytes, 72, &self.nonce);
        put(&mut bytes, 88, &self.wrapped);
        put(&mut bytes, 136, &self.created_unix_ms.to_le_bytes());
        seal(&mut bytes);
        assert_eq!(Self::decode(&bytes, self.number, store).as_ref(), Some(self), "a key reads as it was written");
        bytes
    }

    /// The entry with a number, if it is intact.
    fn decode(bytes: &[u8], number: u32, store: StoreUuid) -> Option<Self> {
        let is_ours = get::<8>(bytes, 0) == *MAGIC && get::<16>(bytes, 24) == *store.as_bytes();
        let is_whole = is_sealed(bytes) && get_u16(bytes, 16) == FORMAT_VERSION;
        let states = [KeyState::Store, KeyState::Data, KeyState::Destroyed];
        let state = states.into_iter().find(|state| *state as u16 == get_u16(bytes, 18))?;
        let is_here = get_u32(bytes, 20) == number && (state == KeyState::Store) == (number == 0);
        (is_ours && is_whole && is_here).then(|| Self {
            state,
            number,
            namespace: NamespaceId::from_bytes(get(bytes, 40)),
            nonce: get(bytes, 72),
            wrapped: get(bytes, 88),
            created_unix_ms: get_u64(bytes, 136),
        })
    }
}

/// Reads any bytes as an entry, with its checksum made right; whether there was one.
#[cfg(any(test, feature = "fault-injection"))]
pub(in crate::nvme) fn fuzz_key_entry(bytes: &[u8]) -> bool {
    let mut entry = [0; ENTRY_BYTES];
    let length = bytes.len().min(ENTRY_BYTES);
    entry[..length].copy_from_slice(&bytes[..length]);
    seal(&mut entry);
    let store = StoreUuid::from_bytes(get(&entry, 24));
    let found = Entry::decode(&entry, get_u32(&entry, 20), store);
    found.map(|found| found.encode(store)).is_some()
}

/// The two files, and the cipher that wraps.
pub(super) struct KeyFile {
    copies: [Box<dyn SmallFile>; 2],
    store: StoreUuid,
    wrapping: LessSafeKey,
    /// By number; `None` for one that can not be read in either file.
    entries: Vec<Option<Entry>>,
    /// Numbers of entries that only one of the files has, or that are not the same in both.
    differing: Vec<u32>,
}

impl KeyFile {
    /// Makes the files, with a new secret of the store, durable.
    ///
    /// # Errors
    /// What the file system reports.
    pub(super) fn create(copies: [Box<dyn SmallFile>; 2], store: StoreUuid, key: &EncryptionKey) -> Result<Self> {
        let mut made = Self { copies, store, wrapping: wrapping(key)?, entries: Vec::new(), differing: Vec::new() };
        made.append(KeyState::Store, NamespaceId::from_bytes([0; 32]))?;
        Ok(made)
    }

    /// Reads the files. Changes nothing.
    ///
    /// # Errors
    /// `PermissionDenied` if they were wrapped with another key, `Corrupt` if neither has an intact secret of the store,
    /// and what the file system reports.
    pub(super) fn open(mut copies: [Box<dyn SmallFile>; 2], store: StoreUuid, key: &EncryptionKey) -> Result<Self> {
        let mut read = Vec::new();
        for copy in &mut copies {
            read.push(copy.read_all().map_err(|source| Error::from_io("reading the keys of the store", source))?);
        }
        let count = read.iter().map(|bytes| bytes.len() / ENTRY_BYTES).max().unwrap_or(0);
        let (mut entries, mut differing) = (Vec::with_capacity(count), Vec::new());
        for number in 0..u32::try_from(count).unwrap_or(u32::MAX) {
            let at = number as usize * ENTRY_BYTES;
            let found = |bytes: &Vec<u8>| Entry::decode(bytes.get(at..at + ENTRY_BYTES)?, number, store);
            let (first, second) = (found(&read[0]), found(&read[1]));
            if first != second {
                differing.push(number);
            }
            let is_destroyed =
                |entry: &Option<Entry>| entry.as_ref().is_some_and(|entry| entry.state == KeyState::Destroyed);
            entries.push(if is_destroyed(&second) { second } else { first.or(second) });
        }
        let opened = Self { copies, store, wrapping: wrapping(key)?, entries, differing };
        match opened.entries.first() {
            Some(Some(entry)) => drop(opened.unwrap(entry)?),
            _ => {
                let message = "both copies of the store's secret (keys.0, keys.1) are missing or unreadable: nothing in it can be decrypted; put them back, or give an empty directory";
                return Err(Error::new(ErrorKind::Corrupt, message));
            }
        }
        Ok(opened)
    }

    /// The secret of the store.
    ///
    /// # Errors
    /// As [`KeyFile::open`].
    pub(super) fn secret(&self) -> Result<Zeroizing<[u8; KEY_BYTES]>> {
        let entry = self.entries.first().and_then(Option::as_ref);
        entry.map_or_else(|| Err(Error::new(ErrorKind::Corrupt, "the store has no secret")), |entry| self.unwrap(entry))
    }

    /// All entries that can be read but the store's own.
    pub(super) fn data(&self) -> impl Iterator<Item = &Entry> {
        self.entries.iter().skip(1).flatten()
    }

    /// Makes both files the same again.
    ///
    /// # Errors
    /// What the file system reports.
    pub(super) fn mend(&mut self) -> Result<()> {
        for number in std::mem::take(&mut self.differing) {
            if let Some(entry) = self.entries.get(number as usize).cloned().flatten() {
                tracing::warn!(
                    number,
                    "a key of the store was damaged in one of its two files; restored from the other"
                );
                self.write(&entry)?;
            }
        }
        Ok(())
    }

    /// A new random key under the next number, durable; also with what it is in clear.
    ///
    /// # Errors
    /// `Busy` when there were 262,144 already, and what the file system reports.
    pub(super) fn append(
        &mut self,
        state: KeyState,
        namespace: NamespaceId,
    ) -> Result<(u32, Zeroizing<[u8; KEY_BYTES]>)> {
        let number = u32::try_from(self.entries.len()).ok().filter(|number| *number <= KEYS_MAX).ok_or_else(|| {
            let message = format!("the store has had {KEYS_MAX} data keys, the limit; give an empty directory");
            Error::new(ErrorKind::Busy, message)
        })?;
        let root = Zeroizing::new(random()?);
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64);
        let (nonce, wrapped) = (random()?, [0; WRAPPED_BYTES]);
        let mut entry = Entry { state, number, namespace, nonce, wrapped, created_unix_ms: now };
        put(&mut entry.wrapped, 0, &*root);
        let associated = Aad::from(self.associated(&entry));
        let sealed = &mut entry.wrapped[..KEY_BYTES];
        // The wrapping key wraps at most 262,144 keys in a store: a random nonce of 96 bits does not come twice.
        let tag = self.wrapping.seal_in_place_separate_tag(Nonce::assume_unique_for_key(nonce), associated, sealed);
        let tag = tag.map_err(|_| Error::new(ErrorKind::Unsupported, "a key can not be wrapped"))?;
        put(&mut entry.wrapped, KEY_BYTES, tag.as_ref());
        // The number is taken even if a write fails: what it left may be found by the next open.
        self.entries.push(None);
        self.write(&entry)?;
        self.entries[number as usize] = Some(entry);
        Ok((number, root))
    }

    /// Writes over a data key, in both files, durably. Afterwards nothing that it sealed can be decrypted. If this fails it
    /// may be destroyed already.
    ///
    /// # Errors
    /// What the file system reports.
    pub(super) fn destroy(&mut self, number: u32) -> Result<()> {
        let Some(entry) = self.entries.get(number as usize).cloned().flatten() else { return Ok(()) };
        let over = (KeyState::Destroyed, [0; NONCE_BYTES], [0; WRAPPED_BYTES]);
        let (state, nonce, wrapped) = over;
        let entry = Entry { state, nonce, wrapped, ..entry };
        self.entries[number as usize] = Some(entry.clone());
        self.write(&entry)
    }

    /// What is wrapped in an entry.
    ///
    /// # Errors
    /// `PermissionDenied` if it was wrapped with another key.
    pub(super) fn unwrap(&self, entry: &Entry) -> Result<Zeroizing<[u8; KEY_BYTES]>> {
        let mut wrapped = Zeroizing::new(entry.wrapped);
        let (nonce, associated) = (Nonce::assume_unique_for_key(entry.nonce), Aad::from(self.associated(entry)));
        let opened = self.wrapping.open_in_place(nonce, associated, &mut *wrapped).map_err(|_| {
            let message = "the store was encrypted with another key; give the one that it was made with (--encryption-key-file or --encryption-key-command)";
            Error::new(ErrorKind::PermissionDenied, message)
        })?;
        Ok(Zeroizing::new(get(opened, 0)))
    }

    /// A key is wrapped as this one of this store and this namespace.
    fn associated(&self, entry: &Entry) -> [u8; 56] {
        let mut bytes = [0; 56];
        put(&mut bytes, 0, &(entry.state as u16).to_le_bytes());
        put(&mut bytes, 4, &entry.number.to_le_bytes());
        put(&mut bytes, 8, self.store.as_bytes());
        put(&mut bytes, 24, entry.namespace.as_bytes());
        bytes
    }

    /// One file after the other, each durable: a crash leaves one of them whole.
    fn write(&mut self, entry: &Entry) -> Result<()> {
        let bytes = entry.encode(self.store);
        let at = u64::from(entry.number) * ENTRY_BYTES as u64;
        for copy in &mut self.copies {
            let written = copy.write_at(at, &bytes);
            let written = written.and_then(|()| if is_off!(SkipKeySync) { Ok(()) } else { copy.sync() });
            written.map_err(|source| Error::from_io("writing the keys of the store", source))?;
        }
        Ok(())
    }
}

fn wrapping(key: &EncryptionKey) -> Result<LessSafeKey> {
    cipher(&Zeroizing::new(blake3::derive_key(WRAPPING_CONTEXT, key.bytes())))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nvme::backing::{Backing, System};
    use crate::nvme::page::assert_every_flip_is_found;
    use std::path::Path;

    const STORE: StoreUuid = StoreUuid::from_bytes(*b"0123456789abcdef");

    fn copies(at: &Path) -> [Box<dyn SmallFile>; 2] {
        KEY_FILES.map(|name| System.small_file(&at.join(name)).expect("a file"))
    }

    fn key(byte: u8) -> EncryptionKey {
        EncryptionKey::from_bytes([byte; 32])
    }

    fn namespace(byte: u8) -> NamespaceId {
        NamespaceId::from_bytes([byte; 32])
    }

    #[test]
    fn keys_come_back_with_the_right_key_alone() {
        let at = tempfile::tempdir().expect("a directory");
        let mut file = KeyFile::create(copies(at.path()), STORE, &key(1)).expect("made");
        let (number, root) = file.append(KeyState::Data, namespace(5)).expect("room");
        let secret = file.secret().expect("there");
        let again = KeyFile::open(copies(at.path()), STORE, &key(1)).expect("the same key");
        assert_eq!(*again.secret().expect("there"), *secret);
        let entry = again.data().next().expect("there");
        assert_eq!((entry.number, entry.namespace), (number, namespace(5)));
        assert_eq!(*again.unwrap(entry).expect("there"), *root);
        let before = KEY_FILES.map(|name| std::fs::read(at.path().join(name)).expect("there"));
        let wrong = KeyFile::open(copies(at.path()), STORE, &key(2)).err().map(|error| error.kind());
        assert_eq!(wrong, Some(ErrorKind::PermissionDenied));
        assert_eq!(before, KEY_FILES.map(|name| std::fs::read(at.path().join(name)).expect("there")));
        assert!(!before[0].windows(8).any(|bytes| root.starts_with(bytes)), "a key in clear");
    }

    #[test]
    fn a_damaged_entry_is_taken_from_the_other_file() {
        for damaged in KEY_FILES {
            let at = tempfile::tempdir().expect("a directory");
            let mut file = KeyFile::create(copies(at.path()), STORE, &key(1)).expect("made");
            let (_, root) = file.append(KeyState::Data, namespace(5)).expect("room");
            let path = at.path().join(damaged);
            let good = std::fs::read(&path).expect("there");
            std::fs::write(&path, vec![0xee; good.len()]).expect("damaged");
            let mut again = KeyFile::open(copies(at.path()), STORE, &key(1)).expect("one is left");
            let entry = again.data().next().expect("there").clone();
            assert_eq!(*again.unwrap(&entry).expect("there"), *root);
            again.mend().expect("written");
            assert_eq!(std::fs::read(&path).expect("there"), good);
        }
    }

    #[test]
    fn one_that_is_destroyed_in_either_file_stays_so() {
        for older in KEY_FILES {
            let at = tempfile::tempdir().expect("a directory");
            let mut file = KeyFile::create(copies(at.path()), STORE, &key(1)).expect("made");
            let (number, root) = file.append(KeyState::Data, namespace(5)).expect("room");
            let path = at.path().join(older);
            let before = std::fs::read(&path).expect("there");
            file.destroy(number).expect("written");
            // As a crash between the two leaves it.
            std::fs::write(&path, &before).expect("written");
            let mut again = KeyFile::open(copies(at.path()), STORE, &key(1)).expect("opened");
            assert_eq!(again.data().next().map(|entry| entry.state), Some(KeyState::Destroyed));
            again.mend().expect("written");
            assert_ne!(std::fs::read(&path).expect("there"), before);
            assert_eq!(again.append(KeyState::Data, namespace(5)).expect("room").0, number + 1);
            drop(root);
        }
    }

    #[test]
    fn every_flipped_bit_is_found() {
        let at = tempfile::tempdir().expect("a directory");
        drop(KeyFile::create(copies(at.path()), STORE, &key(1)).expect("made"));
        let bytes = std::fs::read(at.path().join(KEY_FILES[0])).expect("there");
        assert_eq!(bytes.len(), ENTRY_BYTES);
        assert_every_flip_is_found(&bytes, |bytes| Entry::decode(bytes, 0, STORE).is_some());
    }

    #[test]
    fn a_key_of_one_namespace_is_none_of_another() {
        let at = tempfile::tempdir().expect("a directory");
        let mut file = KeyFile::create(copies(at.path()), STORE, &key(1)).expect("made");
        file.append(KeyState::Data, namespace(5)).expect("room");
        let entry = file.data().next().expect("there").clone();
        let moved = Entry { namespace: namespace(6), ..entry.clone() };
        assert!(file.unwrap(&moved).is_err() && file.unwrap(&entry).is_ok());
    }
}
