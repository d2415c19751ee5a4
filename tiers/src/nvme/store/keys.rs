//! What an encrypted store does before everything else: finds its keys, and gives records the names under which the rest
//! of the store knows them.

use std::sync::Arc;

use super::Store;
use crate::block::{BlockKey, KEY_CHAIN_VERSION, NamespaceHandle, RecordId, RecordKind};
use crate::error::{Error, ErrorKind, Result};
use crate::nvme::append::{Append, Sealing};
use crate::nvme::encryption::{Keyring, Names, Subject};
use crate::nvme::record_header::DiskIdentity;

/// A note of the user's has at most so many bytes.
const NOTE_BYTES_MAX: usize = 1 << 20;

/// Names in place of a record's own, and what it is sealed with if it has a payload.
type Renamed = (RecordId, BlockKey, Option<Arc<Sealing>>);

impl Store {
    /// Destroys the data key of a namespace, so that nothing of it that was ever written can be decrypted, and gives it a
    /// new one. Durable when it returns. From then on nothing that was there is found; what is on its way to the drive is
    /// written all the same, and can not be read. Whether the store is encrypted and the namespace had a key; without that
    /// nothing was done.
    ///
    /// The old key is written over in its files. A drive may keep old sectors where nobody but its maker reads them, and
    /// a file system or a backup may keep old copies: who has such a copy *and* the key-encryption key has the data.
    ///
    /// # Errors
    /// `NotFound` for an unknown namespace, `Closed`, and what the file system reports: then it may come back with the
    /// next open; try again.
    pub fn destroy_key(&self, namespace: NamespaceHandle) -> Result<bool> {
        drop(self.index()?);
        let Some(keyring) = &self.shared.keyring else { return Ok(false) };
        let digest = self.shared.namespaces.digest(namespace).ok_or_else(|| {
            Error::new(ErrorKind::NotFound, format!("namespace {} is not known to the store", namespace.0))
        })?;
        let had_one = keyring.destroy(&digest)?;
        keyring.key_for(digest)?;
        Ok(had_one)
    }

    /// Whether payloads are encrypted.
    pub fn is_encrypted(&self) -> bool {
        self.shared.keyring.is_some()
    }

    /// The fingerprint by which [`RecordInfo`](crate::RecordInfo) and [`Store::has_fingerprint`] know the record in the
    /// place of `id` whose key has this [`BlockKey::prefix`]: [`RecordId::fingerprint_of`], but in an encrypted store one
    /// that only its keys can tell. 0, which no record has, for a namespace without a key.
    pub fn fingerprint_of(&self, id: &RecordId, prefix: u64) -> u64 {
        match self.shared.data_key(id.namespace) {
            Ok(None) => id.fingerprint_of(prefix),
            Ok(Some(key)) => id.fingerprint_of(key.prefix(prefix)),
            Err(_) => 0,
        }
    }

    /// The identity of a record on disk, and if the store is encrypted its names and what it is sealed with.
    pub(super) fn seal_as(
        &self,
        append: &Append,
        identity: DiskIdentity,
        shards: u16,
    ) -> Result<(DiskIdentity, Option<Renamed>)> {
        let Some(key) = self.shared.data_key(append.id.namespace)? else { return Ok((identity, None)) };
        let (id, parent) = (key.rename(&append.id), key.name(append.parent));
        let identity = DiskIdentity { key: id.key, ..identity };
        let names = Names { key: append.id.key, parent: append.parent };
        let kind = append.kind.into();
        let (store, key_version, depth) = (self.shared.uuid, KEY_CHAIN_VERSION, append.depth);
        let subject = Subject { store, kind, identity, shards, key_version, parent, depth };
        let sealing = Arc::new(Sealing { key, subject, names, raw_bytes: append.payload_bytes });
        let sealing = (append.kind != RecordKind::Tombstone).then_some(sealing);
        Ok((identity, Some((id, parent, sealing))))
    }

    /// As the store knows these records, up to the first that it can not have; `None` if that is as they are.
    pub(super) fn named_all(&self, ids: &[RecordId]) -> Option<Vec<RecordId>> {
        self.shared.keyring.as_ref()?;
        let mut key = None;
        let rename = |id: &RecordId| {
            if key.as_ref().is_none_or(|(of, _)| *of != id.namespace) {
                key = Some((id.namespace, self.shared.data_key(id.namespace).ok().flatten()?));
            }
            key.as_ref().map(|(_, key)| key.rename(id))
        };
        Some(ids.iter().map_while(rename).collect())
    }

    /// Encrypts a note if the store is.
    pub(super) fn seal_note(&self, name: &str, value: &[u8], put: impl FnOnce(&[u8]) -> Result<()>) -> Result<()> {
        match &self.shared.keyring {
            None => put(value),
            Some(_) if value.len() > NOTE_BYTES_MAX - Keyring::NOTE_EXTRA_BYTES => {
                let most = NOTE_BYTES_MAX - Keyring::NOTE_EXTRA_BYTES;
                let message = format!("a note of {} bytes; an encrypted store takes at most {most}", value.len());
                Err(Error::new(ErrorKind::InvalidInput, message))
            }
            Some(keyring) => put(&keyring.seal_note(name, value)?),
        }
    }

    /// Decrypts a note if the store is encrypted; what can not be decrypted is not there.
    pub(super) fn open_note(&self, name: &str, value: Vec<u8>) -> Option<Vec<u8>> {
        let Some(keyring) = &self.shared.keyring else { return Some(value) };
        let opened = keyring.open_note(name, value);
        if opened.is_none() {
            tracing::warn!(name, "a note can not be decrypted; it counts as missing");
        }
        opened
    }
}
