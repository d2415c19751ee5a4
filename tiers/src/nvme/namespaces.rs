//! The namespaces of a store: which number stands for which identity, and which have ended. Kept in the append-only file
//! `namespaces`, because record headers carry only the digest and the index may be wiped. Each entry is checksummed and
//! starts at a multiple of 512 bytes, so a damaged one costs itself and not those behind it. `docs/format.md` draws it.

use std::collections::HashMap;
use std::time::Instant;

use parking_lot::{Mutex, RwLock};

use super::backing::SmallFile;
use super::namespace_end;
use super::page::{get, get_u16, get_u32, get_u64, is_sealed, put, seal};
use super::record_header::DiskIdentity;
use super::switches::is_off;
use super::version::{FORMAT_VERSION, StoreUuid};
use crate::block::{GroupGeometry, NamespaceDescriptor, NamespaceHandle, NamespaceId, RecordId};
use crate::error::{Error, ErrorKind, Result};
use crate::index::{NamespaceEnd, NamespaceRow};

const MAGIC: &[u8; 8] = b"PEGANAME";
/// Entries start at and are multiples of this: the unit that a drive writes as a whole.
const UNIT: usize = 512;
const FIXED_BYTES: usize = 80;
const GROUP_BYTES: usize = 16;
/// The most namespaces of a store.
const NAMESPACES_MAX: usize = 65_536;
/// The highest number of a namespace: as many are registered at most, in the whole life of a store.
const HANDLE_MAX: u32 = 1 << 20;
/// The most groups of a namespace.
const GROUPS_MAX: usize = 1024;

/// All namespaces: in memory for everybody, and in the file for the next open.
pub(super) struct Namespaces {
    known: RwLock<Known>,
    /// Held while a new one is written, by nobody else: lookups never wait for the file.
    file: Mutex<NamespaceFile>,
    objects: NamespaceId,
}

#[derive(Default)]
struct Known {
    by_handle: HashMap<NamespaceHandle, NamespaceRow>,
    by_id: HashMap<NamespaceId, NamespaceHandle>,
    /// Those that nobody finds any more, and whose end is not durable yet.
    ending: HashMap<NamespaceId, NamespaceRow>,
    /// Those that have ended.
    ended: HashMap<NamespaceHandle, NamespaceEnd>,
    /// The last end of each digest.
    last_end: HashMap<NamespaceId, NamespaceEnd>,
}

struct NamespaceFile {
    file: Box<dyn SmallFile>,
    store: StoreUuid,
    /// Where the next entry goes.
    end: u64,
}

impl Namespaces {
    /// Reads the file.
    ///
    /// # Errors
    /// What the file system reports.
    pub(super) fn open(mut file: Box<dyn SmallFile>, store: StoreUuid) -> Result<Self> {
        let bytes = file.read_all().map_err(|source| Error::from_io("reading the file of namespaces", source))?;
        let (mut known, mut at, mut end) = (Known::default(), 0, 0);
        while at < bytes.len() {
            if let Some((row, length)) = decode(&bytes[at..], store) {
                known.insert(row);
                at += length;
                end = at as u64;
            } else if let Some(ended) = namespace_end::decode(&bytes[at..], store) {
                known.end(ended);
                at += namespace_end::END_BYTES;
                end = at as u64;
            } else {
                at += UNIT;
            }
        }
        let file = Mutex::new(NamespaceFile { file, store, end });
        Ok(Self { known: RwLock::new(known), file, objects: NamespaceDescriptor::objects().id() })
    }

    /// The number of a namespace, which is known afterwards, also after a power loss; with its row if it is new.
    ///
    /// # Errors
    /// `GeometryMismatch` if it is known with other groups, `InvalidInput` for groups outside their limits, `Busy` when
    /// there are 65,536 already, were a million, or its purge has begun and not ended; otherwise what the file system
    /// reports.
    pub(super) fn register(
        &self,
        descriptor: &NamespaceDescriptor,
        groups: &[GroupGeometry],
    ) -> Result<(NamespaceHandle, Option<NamespaceRow>)> {
        let id = descriptor.id();
        if id == self.objects {
            return Ok((NamespaceHandle(0), None));
        }
        let groups = checked_groups(groups)?;
        let mut file = self.file.lock();
        let handle = {
            let known = self.known.read();
            if let Some(row) = known.by_id.get(&id).and_then(|handle| known.by_handle.get(handle)) {
                let is_same = row.groups == groups;
                return if is_same {
                    Ok((row.handle, None))
                } else {
                    Err(GroupGeometry::mismatch(id, &row.groups, &groups))
                };
            }
            if known.ending.contains_key(&id) {
                let message = format!("the purge of namespace {id} has not ended; purge it again, then register it");
                return Err(Error::new(ErrorKind::Busy, message));
            }
            if known.by_handle.len() >= NAMESPACES_MAX {
                let message = format!("the store has {NAMESPACES_MAX} namespaces, the limit; give an empty directory");
                return Err(Error::new(ErrorKind::Busy, message));
            }
            known.next_handle()?
        };
        let row = NamespaceRow { handle, id, descriptor: descriptor.clone(), groups };
        // What ended before is said once more: if that entry decays, what was purged must not come back under this one.
        let mut bytes =
            self.last_end(&id).map(|end| namespace_end::encode(&end, file.store).to_vec()).unwrap_or_default();
        bytes.extend(encode(&row, file.store)?);
        file.append(&bytes)?;
        self.known.write().insert(row.clone());
        Ok((handle, Some(row)))
    }

    /// Ends a namespace: at once nobody finds it, and when this returns that is durable. `last_sequence` is asked then: no
    /// record of it may get a higher one. `destroy_key` is called when the end is durable, and nobody registers the
    /// namespace anew before it has returned well. `None` if there is no such namespace. If this fails the
    /// namespace stays hidden until the store is opened again, and it can be called again.
    ///
    /// # Errors
    /// `InvalidInput` for the namespace of objects, `Timeout` at `deadline` while another one is written, what the two
    /// return, and what the file system reports.
    pub(super) fn end(
        &self,
        id: &NamespaceId,
        deadline: Instant,
        last_sequence: impl FnOnce() -> Result<u64>,
        destroy_key: impl FnOnce() -> Result<bool>,
    ) -> Result<Option<(NamespaceEnd, bool)>> {
        if *id == self.objects {
            let message = "named objects are not purged as a namespace; remove them one by one";
            return Err(Error::new(ErrorKind::InvalidInput, message));
        }
        let mut file = self.file.try_lock_until(deadline).ok_or_else(|| {
            Error::new(ErrorKind::Timeout, "another namespace is being registered or purged; try again")
        })?;
        let Some(handle) = self.known.write().begin_end(id) else { return Ok(None) };
        let end = NamespaceEnd { handle, id: *id, sequence: last_sequence()? };
        let entry = namespace_end::encode(&end, file.store);
        file.append(&entry)?;
        let had_key = destroy_key()?;
        self.known.write().end(end);
        Ok(Some((end, had_key)))
    }

    /// Takes over the end of a namespace that the index knows and this file has lost; durable unless `is_read_only`.
    ///
    /// # Errors
    /// What the file system reports.
    pub(super) fn adopt_end(&self, end: NamespaceEnd, is_read_only: bool) -> Result<()> {
        let mut file = self.file.lock();
        if !self.is_ended(end.handle) {
            if !is_read_only {
                tracing::warn!(namespace = %end.id, "the end of a namespace was missing in its file; restored from the index");
                let entry = namespace_end::encode(&end, file.store);
                file.append(&entry)?;
            }
            self.known.write().end(end);
        }
        Ok(())
    }

    /// Takes over a namespace that the index knows and this file has lost.
    ///
    /// # Errors
    /// What the file system reports.
    pub(super) fn adopt(&self, row: NamespaceRow) -> Result<()> {
        let mut file = self.file.lock();
        let is_known = {
            let known = self.known.read();
            let is_over = known.ended.contains_key(&row.handle);
            is_over || known.by_id.contains_key(&row.id) || known.by_handle.contains_key(&row.handle)
        };
        if !is_known {
            tracing::warn!(namespace = %row.id, "a namespace was missing in its file; restored from the index");
            let bytes = encode(&row, file.store)?;
            file.append(&bytes)?;
            self.known.write().insert(row);
        }
        Ok(())
    }

    /// All of them; also those whose end has begun and is not durable: somebody has to end them.
    pub(super) fn rows(&self) -> Vec<NamespaceRow> {
        let known = self.known.read();
        known.by_handle.values().chain(known.ending.values()).cloned().collect()
    }

    /// How many there are of a kind.
    pub(super) fn count(&self, is_counted: &dyn Fn(&NamespaceDescriptor) -> bool) -> usize {
        self.known.read().by_handle.values().filter(|row| is_counted(&row.descriptor)).count()
    }

    /// The number of a namespace, if it is known.
    pub(super) fn handle_of(&self, id: &NamespaceId) -> Option<NamespaceHandle> {
        if *id == self.objects { Some(NamespaceHandle(0)) } else { self.known.read().by_id.get(id).copied() }
    }

    /// The number of the namespace that a record of this digest and sequence is of: of none if it was purged since.
    pub(super) fn handle_at(&self, id: &NamespaceId, sequence: u64) -> Option<NamespaceHandle> {
        if *id == self.objects {
            return Some(NamespaceHandle(0));
        }
        let known = self.known.read();
        let is_dead = known.last_end.get(id).is_some_and(|end| sequence <= end.sequence) && !is_off!(BelievePurged);
        known.by_id.get(id).copied().filter(|_| !is_dead)
    }

    /// Whether a number is given: its namespace is known and was not purged.
    pub(super) fn is_live(&self, handle: NamespaceHandle) -> bool {
        handle == NamespaceHandle(0) || self.known.read().by_handle.contains_key(&handle)
    }

    /// Whether a namespace has ended, durably.
    pub(super) fn is_ended(&self, handle: NamespaceHandle) -> bool {
        handle != NamespaceHandle(0) && self.known.read().ended.contains_key(&handle)
    }

    /// The last end of a digest, if it ever ended.
    fn last_end(&self, id: &NamespaceId) -> Option<NamespaceEnd> {
        self.known.read().last_end.get(id).copied()
    }

    /// All that have ended.
    pub(super) fn ends(&self) -> Vec<NamespaceEnd> {
        self.known.read().ended.values().copied().collect()
    }

    /// The digests that have ended and were not registered again.
    pub(super) fn purged(&self) -> Vec<NamespaceId> {
        let known = self.known.read();
        known.last_end.keys().filter(|id| !known.by_id.contains_key(id)).copied().collect()
    }

    /// The digest of a namespace; `None` for one that is not known.
    pub(super) fn digest(&self, handle: NamespaceHandle) -> Option<NamespaceId> {
        match handle {
            NamespaceHandle(0) => Some(self.objects),
            handle => Some(self.known.read().by_handle.get(&handle)?.id),
        }
    }

    /// The geometry of a group; `None` for objects and for what is not known.
    pub(super) fn group(&self, handle: NamespaceHandle, group: u16) -> Option<GroupGeometry> {
        let known = self.known.read();
        known.by_handle.get(&handle)?.groups.iter().find(|geometry| geometry.group == group).copied()
    }

    /// The descriptor of a namespace; `None` for objects and for what is not known.
    pub(super) fn descriptor(&self, handle: NamespaceHandle) -> Option<NamespaceDescriptor> {
        self.known.read().by_handle.get(&handle).map(|row| row.descriptor.clone())
    }

    /// A record's identity in the terms of the disk; `None` if its namespace is not known.
    pub(super) fn identity(&self, id: &RecordId) -> Option<DiskIdentity> {
        let namespace = self.digest(id.namespace)?;
        Some(DiskIdentity { namespace, group: id.group, shard: id.shard, key: id.key })
    }
}

impl Known {
    fn insert(&mut self, row: NamespaceRow) {
        if !self.ended.contains_key(&row.handle) {
            self.by_id.insert(row.id, row.handle);
            self.by_handle.insert(row.handle, row);
        }
    }

    /// A number that was never given.
    fn next_handle(&self) -> Result<NamespaceHandle> {
        let given = self.by_handle.keys().chain(self.ended.keys()).chain(self.ending.values().map(|row| &row.handle));
        match given.map(|handle| handle.0).max().unwrap_or(0) {
            last if last < HANDLE_MAX => Ok(NamespaceHandle(last + 1)),
            _ => {
                let message = format!("the store has had {HANDLE_MAX} namespaces, the limit; give an empty directory");
                Err(Error::new(ErrorKind::Busy, message))
            }
        }
    }

    /// Nobody finds a namespace any more; its number, if there is one.
    fn begin_end(&mut self, id: &NamespaceId) -> Option<NamespaceHandle> {
        if let Some(row) = self.by_id.remove(id).and_then(|handle| self.by_handle.remove(&handle)) {
            self.ending.insert(*id, row);
        }
        self.ending.get(id).map(|row| row.handle)
    }

    fn end(&mut self, end: NamespaceEnd) {
        self.by_handle.remove(&end.handle);
        if self.by_id.get(&end.id) == Some(&end.handle) {
            self.by_id.remove(&end.id);
        }
        self.ending.remove(&end.id);
        self.ended.insert(end.handle, end);
        let last = self.last_end.entry(end.id).or_insert(end);
        if last.sequence < end.sequence {
            *last = end;
        }
    }
}

impl NamespaceFile {
    fn append(&mut self, bytes: &[u8]) -> Result<()> {
        let written = self.file.write_at(self.end, bytes);
        let written = written.and_then(|()| if is_off!(SkipNamespaceSync) { Ok(()) } else { self.file.sync() });
        written.map_err(|source| Error::from_io("writing the file of namespaces", source))?;
        self.end += bytes.len() as u64;
        Ok(())
    }
}

fn checked_groups(groups: &[GroupGeometry]) -> Result<Vec<GroupGeometry>> {
    if groups.is_empty() || groups.len() > GROUPS_MAX {
        let message = format!("a namespace has {} groups; it must have 1 to {GROUPS_MAX}", groups.len());
        return Err(Error::new(ErrorKind::InvalidInput, message));
    }
    groups.iter().try_for_each(GroupGeometry::validate)?;
    let mut sorted = groups.to_vec();
    sorted.sort_by_key(|geometry| geometry.group);
    match sorted.windows(2).find(|pair| pair[0].group == pair[1].group) {
        None => Ok(sorted),
        Some(pair) => {
            Err(Error::new(ErrorKind::InvalidInput, format!("group {} is given twice; give it once", pair[0].group)))
        }
    }
}

fn encode(row: &NamespaceRow, store: StoreUuid) -> Result<Vec<u8>> {
    let json = row.descriptor.to_json();
    NamespaceDescriptor::from_json(&json)?;
    let groups_end = FIXED_BYTES + row.groups.len() * GROUP_BYTES;
    let length = (groups_end + json.len()).next_multiple_of(UNIT);
    let too_large = |_| Error::new(ErrorKind::InvalidInput, format!("a namespace of {length} bytes is too large"));
    let mut bytes = vec![0; length];
    put(&mut bytes, 0, MAGIC);
    put(&mut bytes, 16, &FORMAT_VERSION.to_le_bytes());
    put(&mut bytes, 18, &u16::try_from(row.groups.len()).map_err(too_large)?.to_le_bytes());
    put(&mut bytes, 20, &row.handle.0.to_le_bytes());
    put(&mut bytes, 24, store.as_bytes());
    put(&mut bytes, 40, row.id.as_bytes());
    put(&mut bytes, 72, &u32::try_from(length).map_err(too_large)?.to_le_bytes());
    put(&mut bytes, 76, &u32::try_from(json.len()).map_err(too_large)?.to_le_bytes());
    for (index, geometry) in row.groups.iter().enumerate() {
        let at = FIXED_BYTES + index * GROUP_BYTES;
        put(&mut bytes, at, &geometry.group.to_le_bytes());
        put(&mut bytes, at + 2, &geometry.shards.to_le_bytes());
        put(&mut bytes, at + 8, &geometry.block_bytes.to_le_bytes());
    }
    put(&mut bytes, groups_end, json.as_bytes());
    seal(&mut bytes);
    assert_eq!(
        decode(&bytes, store).map(|(read, length)| (read.id, read.groups, length)),
        Some((row.id, row.groups.clone(), length)),
        "a namespace reads as it was written"
    );
    Ok(bytes)
}

/// The entry at the start of `bytes` and its length, if there is an intact one.
fn decode(bytes: &[u8], store: StoreUuid) -> Option<(NamespaceRow, usize)> {
    if bytes.len() < UNIT || get::<8>(bytes, 0) != *MAGIC || get::<16>(bytes, 24) != *store.as_bytes() {
        return None;
    }
    let length = get_u32(bytes, 72) as usize;
    let entry = bytes.get(..length).filter(|entry| entry.len() >= UNIT && entry.len().is_multiple_of(UNIT))?;
    if !(is_sealed(entry) || is_off!(SkipNamespaceChecksum)) || get_u16(entry, 16) != FORMAT_VERSION {
        return None;
    }
    let groups_end = FIXED_BYTES + usize::from(get_u16(entry, 18)) * GROUP_BYTES;
    let json = entry.get(groups_end..groups_end.checked_add(get_u32(entry, 76) as usize)?)?;
    let descriptor = NamespaceDescriptor::from_json(std::str::from_utf8(json).ok()?).ok()?;
    let groups = entry[FIXED_BYTES..groups_end]
        .chunks_exact(GROUP_BYTES)
        .map(|group| GroupGeometry {
            group: get_u16(group, 0),
            shards: get_u16(group, 2),
            block_bytes: get_u64(group, 8),
        })
        .collect();
    let id = NamespaceId::from_bytes(get(entry, 40));
    let row = NamespaceRow { handle: NamespaceHandle(get_u32(entry, 20)), id, descriptor, groups };
    (row.id == row.descriptor.id()).then_some((row, length))
}

/// Reads any bytes as an entry, with its checksum made right; its length, if there was one.
#[cfg(any(test, feature = "fault-injection"))]
pub(super) fn fuzz_entry(bytes: &[u8]) -> Option<usize> {
    let mut bytes = bytes.to_vec();
    bytes.resize(bytes.len().next_multiple_of(UNIT).max(UNIT), 0);
    let store = StoreUuid::from_bytes(get(&bytes, 24));
    let length = (get_u32(&bytes, 72) as usize).clamp(UNIT, bytes.len());
    seal(&mut bytes[..length]);
    let (row, length) = decode(&bytes, store)?;
    // What was read can be written.
    encode(&row, store).ok().map(|_| length)
}

#[cfg(test)]
mod tests {
    use super::super::backing::{Backing, System};
    use super::super::page::assert_every_flip_is_found;
    use super::*;

    const STORE: StoreUuid = StoreUuid::from_bytes(*b"0123456789abcdef");

    fn open(path: &std::path::Path) -> Result<Namespaces> {
        Namespaces::open(System.small_file(path)?, STORE)
    }

    fn descriptor(model: usize) -> NamespaceDescriptor {
        NamespaceDescriptor::new().with("model", format!("m{model}")).with("padding", "x".repeat(model * 100))
    }

    fn groups(block_bytes: u64) -> Vec<GroupGeometry> {
        (0..3).map(|group| GroupGeometry { group, block_bytes, shards: 2 }).collect()
    }

    fn register(namespaces: &Namespaces, model: usize, block_bytes: u64) -> Result<u32> {
        namespaces.register(&descriptor(model), &groups(block_bytes)).map(|(handle, _)| handle.0)
    }

    #[test]
    fn numbers_are_kept_across_opens() {
        let at = tempfile::tempdir().expect("a directory");
        let path = at.path().join("namespaces");
        let first = open(&path).expect("made");
        let handles: Vec<u32> = (0..20).map(|model| register(&first, model, 4096).expect("new")).collect();
        assert_eq!(handles, (1..=20).collect::<Vec<_>>());
        drop(first);
        let again = open(&path).expect("opened");
        for (model, handle) in handles.iter().enumerate() {
            assert_eq!(register(&again, model, 4096).map_err(|e| e.to_string()), Ok(*handle));
        }
        let mismatch = register(&again, 3, 8192).expect_err("another geometry");
        assert_eq!(mismatch.kind(), ErrorKind::GeometryMismatch);
        assert!(mismatch.message().contains("4096") && mismatch.message().contains("8192"), "{mismatch}");
        let id = RecordId { namespace: NamespaceHandle(5), group: 1, shard: 0, key: crate::BlockKey::ROOT };
        assert_eq!(again.identity(&id).map(|identity| identity.namespace), Some(descriptor(4).id()));
        assert_eq!(again.handle_at(&NamespaceDescriptor::objects().id(), 1), Some(NamespaceHandle(0)));
    }

    #[test]
    fn a_damaged_entry_costs_itself_and_a_torn_one_is_overwritten() {
        let at = tempfile::tempdir().expect("a directory");
        let path = at.path().join("namespaces");
        let first = open(&path).expect("made");
        for model in 0..10 {
            register(&first, model, 4096).expect("new");
        }
        drop(first);
        let mut bytes = std::fs::read(&path).expect("there");
        bytes[600] ^= 1;
        bytes.extend_from_slice(b"PEGANAME torn");
        std::fs::write(&path, &bytes).expect("written");
        let damaged = open(&path).expect("opened");
        assert_eq!(damaged.rows().len(), 9);
        assert_eq!(register(&damaged, 1, 4096).map_err(|e| e.to_string()), Ok(11), "a new number, never a reused one");
        drop(damaged);
        assert_eq!(open(&path).expect("opened").rows().len(), 10);
    }

    #[test]
    fn every_flipped_bit_is_found() {
        let row = NamespaceRow {
            handle: NamespaceHandle(1),
            id: descriptor(1).id(),
            descriptor: descriptor(1),
            groups: groups(4096),
        };
        let bytes = encode(&row, STORE).expect("fits");
        assert_eq!(bytes.len(), 512);
        assert_every_flip_is_found(&bytes, |bytes| decode(bytes, STORE).is_some());
    }

    #[test]
    fn bad_groups_are_refused() {
        let at = tempfile::tempdir().expect("a directory");
        let namespaces = open(&at.path().join("namespaces")).expect("made");
        let kind =
            |groups: &[GroupGeometry]| namespaces.register(&descriptor(1), groups).err().map(|error| error.kind());
        let good = groups(4096);
        assert_eq!(kind(&[]), Some(ErrorKind::InvalidInput));
        assert_eq!(kind(&[good[0], good[0]]), Some(ErrorKind::InvalidInput));
        assert_eq!(kind(&[GroupGeometry { block_bytes: 0, ..good[0] }]), Some(ErrorKind::InvalidInput));
        assert_eq!(kind(&[GroupGeometry { block_bytes: 17, ..good[0] }]), Some(ErrorKind::InvalidInput));
        assert_eq!(kind(&good), None);
    }
}
