//! The keys of an open store: which namespace has which, which number is which. Owns the two files of keys and the numbers
//! from which nonces come.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::{Mutex, RwLock};
use ring::aead::{Aad, LessSafeKey, Nonce};
use zeroize::Zeroizing;

use super::data_key::{DataKey, Names, Seal, SealedAs, Subject};
use super::key_file::{Entry, KEY_FILES, KeyFile, KeyState};
use super::{EncryptionKey, KEY_BYTES, NONCE_BYTES, TAG_BYTES, cipher, random};
use crate::block::{NamespaceDescriptor, NamespaceId};
use crate::error::{Error, ErrorKind, Result};
use crate::nvme::backing::{Backing, SmallFile};
use crate::nvme::directory::Directory;
use crate::nvme::superblock::Superblock;
use crate::nvme::version::StoreUuid;

const HEADER_CONTEXT: &str = "pegaflow 2026-11-23 headers of records v1";
const NOTE_CONTEXT: &str = "pegaflow 2026-11-23 notes v1";

/// The key with which headers of records are authenticated: the store's own, so that a log can be followed and an index
/// rebuilt whatever became of the keys of namespaces.
#[derive(Clone)]
pub(in crate::nvme) struct HeaderKey(Arc<Zeroizing<[u8; KEY_BYTES]>>);

impl HeaderKey {
    /// The key that follows from the secret of a store.
    pub(in crate::nvme) fn from_secret(secret: &[u8; KEY_BYTES]) -> Self {
        Self(Arc::new(Zeroizing::new(blake3::derive_key(HEADER_CONTEXT, secret))))
    }

    /// The code for these bytes; comparing two takes the same time wherever they differ.
    pub(in crate::nvme) fn code(&self, parts: &[&[u8]]) -> blake3::Hash {
        let mut hasher = blake3::Hasher::new_keyed(&self.0);
        for part in parts {
            hasher.update(part);
        }
        hasher.finalize()
    }
}

/// The keys of an open store.
pub(in crate::nvme) struct Keyring {
    header: HeaderKey,
    notes: LessSafeKey,
    objects: NamespaceId,
    /// The part of this open in every nonce, and the next number; see [`super::data_key`].
    salt: [u8; 16],
    opens: u32,
    next_number: AtomicU64,
    keys: RwLock<Keys>,
    /// Held while a key is made or destroyed: lookups never wait for the files.
    file: Mutex<KeyFile>,
}

#[derive(Default)]
struct Keys {
    by_namespace: HashMap<NamespaceId, Arc<DataKey>>,
    by_number: HashMap<u32, Arc<DataKey>>,
    destroyed: HashSet<u32>,
}

impl Keyring {
    /// Whether the store in a directory has files of keys.
    fn is_in(directory: &Directory) -> bool {
        KEY_FILES.iter().any(|name| directory.file(name).exists())
    }

    /// The keys of a store that is opened or made: none if it is not encrypted. Changes nothing of one that is there.
    ///
    /// # Errors
    /// `PermissionDenied` for an encrypted store without a key or with a wrong one, `InvalidInput` for a key to a store that is
    /// not encrypted, `Corrupt` if its keys are lost, and what the file system reports.
    pub(in crate::nvme) fn prepare(
        backing: &dyn Backing,
        key: Option<&EncryptionKey>,
        directory: &Directory,
        superblock: &Superblock,
    ) -> Result<Option<Self>> {
        match (superblock.is_encrypted, key) {
            (false, None) => Ok(None),
            (true, Some(key)) if directory.is_new() => {
                Self::create(backing, directory, superblock.store, key).map(Some)
            }
            (true, Some(_)) if !Self::is_in(directory) => {
                let message = "the store is encrypted and its files of keys, keys.0 and keys.1, are missing: put one of them back, or give an empty directory";
                Err(Error::new(ErrorKind::Corrupt, message))
            }
            (true, Some(key)) => Self::open(backing, directory, superblock.store, key).map(Some),
            (true, None) => {
                let message = "the store is encrypted; give its key (--encryption-key-file or --encryption-key-command), or an empty directory";
                Err(Error::new(ErrorKind::PermissionDenied, message))
            }
            (false, Some(_)) => {
                let message = "the store is not encrypted, and a key is configured; give an empty directory for an encrypted one, or no key";
                Err(Error::new(ErrorKind::InvalidInput, message))
            }
        }
    }

    /// Makes the keys of a new store.
    ///
    /// # Errors
    /// What the file system reports.
    fn create(backing: &dyn Backing, directory: &Directory, store: StoreUuid, key: &EncryptionKey) -> Result<Self> {
        Self::new(KeyFile::create(copies(backing, directory)?, store, key)?)
    }

    /// Reads the keys of a store. Changes nothing.
    ///
    /// # Errors
    /// `PermissionDenied` if it is another key's, `Corrupt` if the store's secret is lost, and what the file system
    /// reports.
    fn open(backing: &dyn Backing, directory: &Directory, store: StoreUuid, key: &EncryptionKey) -> Result<Self> {
        Self::new(KeyFile::open(copies(backing, directory)?, store, key)?)
    }

    /// New keys in a directory.
    #[cfg(test)]
    pub(in crate::nvme) fn for_test(directory: &Directory, key: &EncryptionKey) -> Self {
        let made = Self::create(&crate::nvme::backing::System, directory, StoreUuid::from_bytes([3; 16]), key);
        made.unwrap_or_else(|error| panic!("{error}"))
    }

    fn new(file: KeyFile) -> Result<Self> {
        let secret = file.secret()?;
        let salt = random()?;
        let mut keys = Keys::default();
        for entry in file.data() {
            match entry.state {
                KeyState::Destroyed => {
                    keys.destroyed.insert(entry.number);
                }
                _ => match file.unwrap(entry) {
                    Ok(root) => drop(keys.insert(entry.namespace, DataKey::new(entry.number, &root, salt)?)),
                    Err(error) => {
                        let number = entry.number;
                        tracing::warn!(number, %error, "a data key can not be unwrapped; what it sealed is lost");
                    }
                },
            }
        }
        Ok(Self {
            header: HeaderKey::from_secret(&secret),
            notes: cipher(&Zeroizing::new(blake3::derive_key(NOTE_CONTEXT, &*secret)))?,
            objects: NamespaceDescriptor::objects().id(),
            salt,
            opens: 0,
            next_number: AtomicU64::new(1),
            keys: RwLock::new(keys),
            file: Mutex::new(file),
        })
    }

    /// Gets ready to seal in the open with this number, which becomes durable before anything is sealed: mends the files,
    /// and makes the key for objects.
    ///
    /// # Errors
    /// What the file system reports.
    pub(in crate::nvme) fn begin(&mut self, opens: u64) -> Result<()> {
        // The salt keeps two opens apart whose numbers are the same in 32 bits.
        self.opens = opens as u32;
        self.file.get_mut().mend()?;
        self.key_for(self.objects).map(drop)
    }

    /// The key of headers.
    pub(in crate::nvme) fn header(&self) -> &HeaderKey {
        &self.header
    }

    /// The data key of a namespace, if it has one.
    pub(in crate::nvme) fn live(&self, namespace: &NamespaceId) -> Option<Arc<DataKey>> {
        self.keys.read().by_namespace.get(namespace).cloned()
    }

    /// The data key of a namespace; a new one is durable when this returns.
    ///
    /// # Errors
    /// `Busy` when the store had too many, and what the file system reports.
    pub(in crate::nvme) fn key_for(&self, namespace: NamespaceId) -> Result<Arc<DataKey>> {
        if let Some(key) = self.live(&namespace) {
            return Ok(key);
        }
        let mut file = self.file.lock();
        // Another thread may have made it meanwhile.
        if let Some(key) = self.live(&namespace) {
            return Ok(key);
        }
        let (number, root) = file.append(KeyState::Data, namespace)?;
        let key = DataKey::new(number, &root, self.salt)?;
        Ok(self.keys.write().insert(namespace, key))
    }

    /// Destroys the data key of a namespace; whether it had one. Nothing that was sealed with it can be decrypted from
    /// here on, in memory at once and on the drive when this returns.
    ///
    /// # Errors
    /// What the file system reports: the key may then come back with the next open. Try again.
    pub(in crate::nvme) fn destroy(&self, namespace: &NamespaceId) -> Result<bool> {
        let mut file = self.file.lock();
        let is_meant = |entry: &&Entry| entry.namespace == *namespace && entry.state == KeyState::Data;
        let numbers: Vec<u32> = file.data().filter(is_meant).map(|entry| entry.number).collect();
        self.keys.write().remove(namespace, &numbers);
        numbers.iter().try_for_each(|number| file.destroy(*number))?;
        Ok(!numbers.is_empty())
    }

    /// The data key with a number.
    ///
    /// # Errors
    /// `NotFound` if it was destroyed, `Corrupt` if it was lost.
    pub(in crate::nvme) fn numbered(&self, number: u32) -> Result<Arc<DataKey>> {
        let keys = self.keys.read();
        if let Some(key) = keys.by_number.get(&number) {
            return Ok(Arc::clone(key));
        }
        if keys.destroyed.contains(&number) {
            return Err(Error::new(ErrorKind::NotFound, "the key of the record was destroyed"));
        }
        Err(Error::new(ErrorKind::Corrupt, format!("a record is sealed with key {number}, which the store has not")))
    }

    /// Seals the payload in `image` with a nonce that was never used; see [`DataKey::seal`].
    ///
    /// # Errors
    /// As there.
    pub(in crate::nvme) fn seal(
        &self,
        key: &DataKey,
        subject: &Subject,
        form: &SealedAs,
        names: &Names,
        image: &mut [u8],
    ) -> Result<Seal> {
        let number = self.next_number.fetch_add(1, Ordering::Relaxed);
        key.seal(subject, form, names, (self.opens, number), image)
    }

    /// Encrypts a small value that is kept under a name: nonce, value, tag.
    ///
    /// # Errors
    /// `Io` if there are no random numbers, `InvalidInput` for a value that is too long.
    pub(in crate::nvme) fn seal_note(&self, name: &str, value: &[u8]) -> Result<Vec<u8>> {
        // A few notes a minute: 96 random bits do not come twice.
        let nonce: [u8; NONCE_BYTES] = random()?;
        let mut sealed = nonce.to_vec();
        sealed.extend_from_slice(value);
        let (nonce, associated) = (Nonce::assume_unique_for_key(nonce), Aad::from(name.as_bytes()));
        let tag = self.notes.seal_in_place_separate_tag(nonce, associated, &mut sealed[NONCE_BYTES..]);
        let tag = tag.map_err(|_| Error::new(ErrorKind::InvalidInput, "a note is too long to be encrypted"))?;
        sealed.extend_from_slice(tag.as_ref());
        Ok(sealed)
    }

    /// The reverse of [`Keyring::seal_note`]; `None` for what it did not write.
    pub(in crate::nvme) fn open_note(&self, name: &str, mut sealed: Vec<u8>) -> Option<Vec<u8>> {
        let nonce = *sealed.first_chunk::<NONCE_BYTES>()?;
        let nonce = Nonce::assume_unique_for_key(nonce);
        let opened = self.notes.open_in_place(nonce, Aad::from(name.as_bytes()), sealed.get_mut(NONCE_BYTES..)?);
        let bytes = opened.ok()?.len();
        sealed.drain(..NONCE_BYTES);
        sealed.truncate(bytes);
        Some(sealed)
    }

    /// What a note is longer by when it is encrypted.
    pub(in crate::nvme) const NOTE_EXTRA_BYTES: usize = NONCE_BYTES + TAG_BYTES;
}

impl Keys {
    /// The one with the highest number is the namespace's.
    fn insert(&mut self, namespace: NamespaceId, key: DataKey) -> Arc<DataKey> {
        let key = Arc::new(key);
        self.by_number.insert(key.number(), Arc::clone(&key));
        self.by_namespace.insert(namespace, Arc::clone(&key));
        key
    }

    fn remove(&mut self, namespace: &NamespaceId, numbers: &[u32]) {
        self.by_namespace.remove(namespace);
        for number in numbers {
            self.by_number.remove(number);
            self.destroyed.insert(*number);
        }
    }
}

impl std::fmt::Debug for Keyring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Keyring").field("keys", &self.keys.read().by_number.len()).finish_non_exhaustive()
    }
}

fn copies(backing: &dyn Backing, directory: &Directory) -> Result<[Box<dyn SmallFile>; 2]> {
    let [first, second] = KEY_FILES.map(|name| backing.small_file(&directory.file(name)));
    Ok([first?, second?])
}
