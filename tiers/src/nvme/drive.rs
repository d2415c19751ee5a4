//! The files of an open store, through the I/O engine: what recovery, reclaiming and the superblock read and write while
//! a thread waits. Records themselves go through the engine directly. Never used on a thread of the engine.

use std::sync::Arc;
use std::time::Duration;

use super::io::{BlockIo, FileId, IoBuffer, IoKind, Pages, sync_blocking, transfer_blocking};
use super::page::{PAGE_BYTES, Page};
use super::superblock::{SUPERBLOCK_COPIES, Superblock};
use crate::error::{Error, ErrorKind, Result};

/// The superblocks, among the files of the engine.
pub(super) const SUPERBLOCK_FILE: FileId = FileId(0);
/// The regions, among the files of the engine.
pub(super) const REGION_FILE: FileId = FileId(1);
/// How long a drive may take for one operation that a thread waits for.
const DRIVE_TIMEOUT: Duration = Duration::from_secs(30);

/// The engine with the geometry of the region file.
pub(super) struct Drive {
    io: Arc<dyn BlockIo>,
    region_pages: u32,
}

impl Drive {
    pub(super) fn new(io: Arc<dyn BlockIo>, region_pages: u32) -> Self {
        Self { io, region_pages }
    }

    /// The engine.
    pub(super) fn io(&self) -> &dyn BlockIo {
        &*self.io
    }

    /// Pages of a region.
    pub(super) fn region_pages(&self) -> u32 {
        self.region_pages
    }

    /// Where a page of a region lies in the file, in bytes.
    pub(super) fn offset(&self, region: u32, page: u32) -> u64 {
        (u64::from(region) * u64::from(self.region_pages) + u64::from(page)) * PAGE_BYTES as u64
    }

    /// Reads pages of a region.
    ///
    /// # Errors
    /// What the engine reports.
    pub(super) fn read(&self, region: u32, page: u32, pages: u32) -> Result<Pages> {
        let buffer = IoBuffer::Pages(Pages::new(pages as usize * PAGE_BYTES));
        self.transfer(REGION_FILE, IoKind::Read, self.offset(region, page), buffer)
    }

    /// Writes one page of a region; durable after [`Drive::sync`].
    ///
    /// # Errors
    /// What the engine reports.
    pub(super) fn write(&self, region: u32, page: u32, bytes: &Page) -> Result<()> {
        self.transfer(REGION_FILE, IoKind::Write, self.offset(region, page), one_page(bytes)).map(drop)
    }

    /// Makes durable what was written to regions and completed before.
    ///
    /// # Errors
    /// What the engine reports; then nothing written since the last success may be believed.
    pub(super) fn sync(&self) -> Result<()> {
        sync_blocking(&*self.io, REGION_FILE, DRIVE_TIMEOUT)
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

    /// Each copy of the superblock, or what is wrong with it.
    ///
    /// # Errors
    /// What the engine reports.
    pub(super) fn superblock_copies(io: &dyn BlockIo) -> Result<Vec<Result<Superblock>>> {
        let buffer = IoBuffer::Pages(Pages::new(SUPERBLOCK_COPIES as usize * PAGE_BYTES));
        let buffer = transfer_blocking(io, SUPERBLOCK_FILE, IoKind::Read, 0, buffer, DRIVE_TIMEOUT)?;
        Ok(into_pages(buffer)?.as_slice().chunks_exact(PAGE_BYTES).map(Superblock::decode).collect())
    }

    /// Writes a superblock to its place; durable when it returns.
    ///
    /// # Errors
    /// What the engine reports.
    pub(super) fn write_superblock(io: &dyn BlockIo, superblock: &Superblock) -> Result<()> {
        let buffer = one_page(&superblock.encode());
        transfer_blocking(io, SUPERBLOCK_FILE, IoKind::Write, superblock.offset(), buffer, DRIVE_TIMEOUT)?;
        sync_blocking(io, SUPERBLOCK_FILE, DRIVE_TIMEOUT)
    }

    fn transfer(&self, file: FileId, kind: IoKind, offset: u64, buffer: IoBuffer) -> Result<Pages> {
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
        IoBuffer::Slot { .. } => Err(Error::new(ErrorKind::Io, "the I/O engine gave another buffer back")),
    }
}
