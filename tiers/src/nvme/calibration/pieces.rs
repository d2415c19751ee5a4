//! Where a drive may be measured: pieces of its regions that were written. What was preallocated and never written reads
//! as zeros without the drive being asked, so a measurement of it would be a lie.

use std::fs::File;

use rustix::fs::SeekFrom;

use crate::nvme::drive::Drive;
use crate::nvme::page::PAGE_BYTES;
use crate::nvme::policy::{RegionInfo, RegionState};
use crate::nvme::region_header::HEADER_SLOTS;

/// The offsets of at most `count` pieces of `bytes` bytes in the file of a drive that were written, all over the regions
/// that hold records and in no order. None twice.
pub(super) fn written_pieces(
    drive: &Drive,
    number: usize,
    regions: &[RegionInfo],
    file: &File,
    bytes: u64,
    count: usize,
) -> Vec<u64> {
    let header_bytes = u64::from(HEADER_SLOTS) * PAGE_BYTES as u64;
    let holds_records = |info: &&RegionInfo| {
        info.drive as usize == number && matches!(info.state, RegionState::Open | RegionState::Sealed)
    };
    let mut ends = Vec::new();
    let mut total = 0u64;
    for info in regions.iter().filter(holds_records) {
        total += info.used_bytes.saturating_sub(header_bytes) / bytes;
        ends.push((total, info.region));
    }
    let piece = |index: u64| {
        let place = ends.partition_point(|(end, _)| *end <= index);
        let first = place.checked_sub(1).and_then(|before| ends.get(before)).map_or(0, |(end, _)| *end);
        let (_, start) = drive.locate(ends.get(place)?.1, HEADER_SLOTS);
        Some(start + (index - first) * bytes)
    };
    let step = step_through(total);
    let order = (0..total.min(count as u64)).map(|turn| (turn * step) % total);
    order.filter_map(piece).filter(|offset| is_written(file, *offset, bytes)).collect()
}

/// A step that visits each of `total` places once, far from the one before.
fn step_through(total: u64) -> u64 {
    let divides_both = |mut a: u64, mut b: u64| {
        while b > 0 {
            (a, b) = (b, a % b);
        }
        a > 1
    };
    let golden = (total as f64 * 0.618) as u64;
    (golden.max(1)..).find(|step| !divides_both(*step, total)).unwrap_or(1)
}

/// Whether all of a part of a file has blocks that were written, as far as the file system tells.
fn is_written(file: &File, offset: u64, bytes: u64) -> bool {
    let hole = rustix::fs::seek(file, SeekFrom::Data(offset))
        .and_then(|data| if data == offset { rustix::fs::seek(file, SeekFrom::Hole(offset)) } else { Ok(offset) });
    match hole {
        Ok(hole) => hole >= offset + bytes,
        // Nothing was written behind it.
        Err(rustix::io::Errno::NXIO) => false,
        // The file system has no such question; the index says that it was written.
        Err(_) => true,
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    #[test]
    fn a_step_visits_every_place_once() {
        for total in [1u64, 2, 3, 6, 7, 64, 1000, 1 << 16, 99_991] {
            let step = step_through(total);
            let visited: std::collections::HashSet<u64> = (0..total).map(|turn| (turn * step) % total).collect();
            assert_eq!(visited.len() as u64, total);
        }
    }

    #[test]
    fn preallocated_is_not_written() {
        let program = std::env::current_exe().expect("the test's own path");
        let file = tempfile::tempfile_in(program.parent().expect("a directory")).expect("a file");
        rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, 1 << 20).expect("taken");
        assert!(!is_written(&file, 0, 4096) && !is_written(&file, 1 << 19, 4096));
        file.write_all_at(&[1; 65536], 65536).expect("written");
        file.sync_all().expect("synced");
        assert!(is_written(&file, 65536, 65536) && is_written(&file, 65536 + 4096, 4096));
        assert!(!is_written(&file, 65536, 65536 + 4096) && !is_written(&file, 65536 - 4096, 8192));
        assert!(!is_written(&file, 1 << 30, 4096));
    }
}
