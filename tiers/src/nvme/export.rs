//! Hands out every record of a namespace as it was given: checked, decrypted, decoded, under its own names. A long sequential
//! job beside the data plane, in the order of the drive; what is damaged or goes meanwhile is left out and counted.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;

use super::io::open_direct;
use super::read::read_whole;
use super::shared::Shared;
use super::verify::Aligned;
use crate::block::{BlockKey, NamespaceHandle, RecordId};
use crate::error::{Error, ErrorKind, Result};
use crate::index::{IndexLog, Location};

/// Records whose places are held in memory at once; a larger store is gone through in several passes.
const RECORDS_AT_ONCE: u64 = 1 << 20;

/// One record, as it was saved.
#[derive(Debug, Clone, Copy)]
pub struct ExportedRecord<'a> {
    /// The KV cache group.
    pub group: u16,
    /// The shard.
    pub shard: u16,
    /// Its key.
    pub key: BlockKey,
    /// The key of the block before it.
    pub parent: BlockKey,
    /// How many blocks come before it.
    pub depth: u32,
    /// The bytes of the block.
    pub payload: &'a [u8],
}

/// What was handed out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ExportReport {
    /// Records that were handed out.
    pub records: u64,
    /// Bytes of their payloads.
    pub bytes: u64,
    /// Records that could not be: damaged, or reclaimed meanwhile.
    pub left_out: u64,
}

/// See [`super::store::Store::export`].
pub(super) fn export(
    shared: &Arc<Shared>,
    index: &IndexLog,
    paths: &[PathBuf],
    namespace: NamespaceHandle,
    each: &mut dyn FnMut(ExportedRecord<'_>) -> Result<()>,
) -> Result<ExportReport> {
    // What is not in the table is not known to be the newest of its name.
    shared.fill.wait();
    let files: Vec<File> = paths.iter().map(|path| open_direct(path).map(|(file, ..)| file)).collect::<Result<_>>()?;
    let regions = shared.regions.count();
    let step = (u64::from(regions) / (shared.table.len() as u64 / RECORDS_AT_ONCE + 1)).max(1) as u32;
    let mut report = ExportReport::default();
    let (mut image, mut payload) = (Aligned::default(), Vec::new());
    let mut next = 0;
    while next < regions {
        let end = next.saturating_add(step).min(regions);
        let mut places: Vec<(Location, RecordId)> = Vec::new();
        index.scan(&mut |row| {
            let is_wanted = row.id.namespace == namespace
                && shared.namespaces.is_live(namespace)
                && (next..end).contains(&row.location.region);
            if is_wanted && shared.locate(&row.id) == Some(row.location) {
                places.push((row.location, row.id));
            }
            Ok(())
        })?;
        places.sort_unstable_by_key(|(location, _)| (location.region, location.page));
        next = end;
        for (location, id) in places {
            match one(shared, &files, &id, &location, &mut image, &mut payload) {
                Ok((key, parent, depth)) => {
                    report.records += 1;
                    report.bytes += payload.len() as u64;
                    each(ExportedRecord { group: id.group, shard: id.shard, key, parent, depth, payload: &payload })?;
                }
                Err(error) => {
                    tracing::warn!(?id, ?location, error = format!("{error:#}"), "a record is left out");
                    report.left_out += 1;
                }
            }
        }
    }
    Ok(report)
}

/// Reads a record; its key, parent and depth.
fn one(
    shared: &Shared,
    files: &[File],
    id: &RecordId,
    location: &Location,
    image: &mut Aligned,
    payload: &mut Vec<u8>,
) -> Result<(BlockKey, BlockKey, u32)> {
    let gone = || Error::new(ErrorKind::NotFound, "the record has gone");
    let _pins = shared.regions.pin(&[*location])?;
    let identity = shared.namespaces.identity(id).ok_or_else(gone)?;
    let place = shared.drive.place(location.region).ok_or_else(gone)?;
    let file = files.get(place.drive).ok_or_else(gone)?;
    let bytes = image.first(location.bytes() as usize);
    let offset = shared.drive.locate(location.region, location.page).1;
    file.read_exact_at(bytes, offset).map_err(|source| Error::from_io("reading a record", source))?;
    let (names, verified) = read_whole(shared, &identity, location, id.key, bytes, payload)?;
    Ok((names.key, names.parent, verified.depth))
}
