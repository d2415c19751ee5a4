//! The drives of an open store as one: region numbers in, files and offsets out, and through the I/O engine what
//! recovery, reclaiming and the superblock read and write while a thread waits. Records themselves go through the engine directly. Never used on a thread of the engine.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use super::io::{
    BlockIo, FileId, IoBuffer, IoDone, IoKind, IoPriority, IoRequest, Pages, sync_blocking, transfer_blocking,
};
use super::page::{PAGE_BYTES, Page};
use super::superblock::{SUPERBLOCK_COPIES, Superblock};
use super::switches::is_off;
use crate::error::{Error, ErrorKind, Result};

/// The superblocks, among the files of the engine.
pub(super) const SUPERBLOCK_FILE: FileId = FileId(0);
/// How long a drive may take for one operation that a thread waits for.
const DRIVE_TIMEOUT: Duration = Duration::from_secs(30);

/// Where a region lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Place {
    /// The drive, by place in the configuration; 0 is the home.
    pub(super) drive: usize,
    /// Where in the drive's file it lies, in regions.
    pub(super) place: u32,
    /// Headers with a lower generation are of an earlier use of the space and do not count.
    pub(super) since: u64,
}

/// The engine with the geometry of the files of regions.
pub(super) struct Drive {
    io: Arc<dyn BlockIo>,
    region_pages: u32,
    drives: usize,
    /// By number of the region; `None` for numbers that no drive has.
    places: Vec<Option<Place>>,
}

impl Drive {
    pub(super) fn new(io: Arc<dyn BlockIo>, region_pages: u32, drives: usize, places: Vec<Option<Place>>) -> Self {
        Self { io, region_pages, drives, places }
    }

    /// How many drives there are.
    pub(super) fn drives(&self) -> usize {
        self.drives
    }

    /// Where each region lies, by number.
    pub(super) fn places(&self) -> &[Option<Place>] {
        &self.places
    }

    /// Where a region lies; `None` if no drive has it.
    pub(super) fn place(&self, region: u32) -> Option<Place> {
        self.places.get(region as usize).copied().flatten()
    }

    /// The regions of a drive, among the files of the engine.
    pub(super) fn file(drive: usize) -> FileId {
        FileId(drive as u32 + 1)
    }

    /// The engine.
    pub(super) fn io(&self) -> &dyn BlockIo {
        &*self.io
    }

    /// Pages of a region.
    pub(super) fn region_pages(&self) -> u32 {
        self.region_pages
    }

    /// The file of a page of a region and where it lies there, in bytes. A region that no drive has is in a file that no
    /// engine has: requests for it are refused.
    pub(super) fn locate(&self, region: u32, page: u32) -> (FileId, u64) {
        let Some(place) = self.place(region) else { return (FileId(u32::MAX), 0) };
        let pages = u64::from(place.place) * u64::from(self.region_pages) + u64::from(page);
        (Self::file(place.drive), pages * PAGE_BYTES as u64)
    }

    /// Reads pages of a region.
    ///
    /// # Errors
    /// What the engine reports.
    pub(super) fn read(&self, region: u32, page: u32, pages: u32) -> Result<Pages> {
        let buffer = IoBuffer::Pages(Pages::new(pages as usize * PAGE_BYTES));
        self.transfer(region, page, IoKind::Read, buffer)
    }

    /// Writes one page of a region; durable after [`Drive::sync`].
    ///
    /// # Errors
    /// What the engine reports.
    pub(super) fn write(&self, region: u32, page: u32, bytes: &Page) -> Result<()> {
        self.transfer(region, page, IoKind::Write, one_page(bytes)).map(drop)
    }

    /// Whether the drive of a region answers: its first page is read.
    pub(super) fn is_alive(&self, region: u32) -> bool {
        let Some(place) = self.place(region) else { return false };
        let buffer = IoBuffer::Pages(Pages::new(PAGE_BYTES));
        transfer_blocking(&*self.io, Self::file(place.drive), IoKind::Read, 0, buffer, DRIVE_TIMEOUT).is_ok()
    }

    /// Starts to write one page of a region, behind the records that wait for the drive; `done` is told the end.
    ///
    /// # Errors
    /// What the engine says of a request that it does not take; `done` is then not called.
    pub(super) fn start_write(&self, region: u32, page: u32, bytes: &Page, done: IoDone) -> Result<()> {
        let (file, offset) = self.locate(region, page);
        let (kind, buffer, priority) = (IoKind::Write, Some(one_page(bytes)), IoPriority::Write);
        self.io.submit(IoRequest { file, kind, offset, buffer, priority, done }).map_err(|(_, error)| error)
    }

    /// Makes durable what was written to regions of a drive and completed before.
    ///
    /// # Errors
    /// What the engine reports; then nothing written since the last success may be believed.
    pub(super) fn sync(&self, drive: usize) -> Result<()> {
        sync_blocking(&*self.io, Self::file(drive), DRIVE_TIMEOUT)
    }

    /// As [`Drive::sync`], for the drives of these regions.
    pub(super) fn sync_regions(&self, regions: impl IntoIterator<Item = u32>) -> Result<()> {
        let drives: BTreeSet<usize> =
            regions.into_iter().filter_map(|region| self.place(region)).map(|place| place.drive).collect();
        drives.into_iter().try_for_each(|drive| self.sync(drive))
    }

    /// The newest intact superblock.
    ///
    /// # Errors
    /// `Corrupt` if there is none, `NewerFormat`, and what the engine reports.
    pub(super) fn read_superblock(io: &dyn BlockIo) -> Result<Superblock> {
        let bytes = SUPERBLOCK_COPIES as usize * PAGE_BYTES;
        let buffer = IoBuffer::Pages(Pages::new(bytes));
        let buffer = transfer_blocking(io, SUPERBLOCK_FILE, IoKind::Read, 0, buffer, DRIVE_TIMEOUT)?;
        Superblock::newest(into_pages(buffer)?.as_slice().chunks_exact(PAGE_BYTES))
    }

    /// Writes a superblock to its place; durable when it returns.
    ///
    /// # Errors
    /// What the engine reports.
    pub(super) fn write_superblock(io: &dyn BlockIo, superblock: &Superblock) -> Result<()> {
        let buffer = one_page(&superblock.encode());
        transfer_blocking(io, SUPERBLOCK_FILE, IoKind::Write, superblock.offset(), buffer, DRIVE_TIMEOUT)?;
        if is_off!(SkipSuperblockSync) {
            return Ok(());
        }
        sync_blocking(io, SUPERBLOCK_FILE, DRIVE_TIMEOUT)
    }

    fn transfer(&self, region: u32, page: u32, kind: IoKind, buffer: IoBuffer) -> Result<Pages> {
        let (file, offset) = self.locate(region, page);
        into_pages(transfer_blocking(&*self.io, file, kind, offset, buffer, DRIVE_TIMEOUT)?)
    }
}

/// A page in memory that the engine may use.
pub(super) fn one_page(bytes: &Page) -> IoBuffer {
    let mut pages = Pages::new(PAGE_BYTES);
    pages.as_mut_slice().copy_from_slice(bytes);
    IoBuffer::Pages(pages)
}

fn into_pages(buffer: IoBuffer) -> Result<Pages> {
    match buffer {
        IoBuffer::Pages(pages) => Ok(pages),
        IoBuffer::Slot { .. } | IoBuffer::SlotEnd { .. } => {
            Err(Error::new(ErrorKind::Io, "the I/O engine gave another buffer back"))
        }
    }
}
