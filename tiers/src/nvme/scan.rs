//! Reads a region from front to back and finds its records without the index. A record counts if its header is whole,
//! says that it lies here in this generation, and has a higher sequence than the one before it in the region: what an
//! earlier run of the store left behind the end of the log can not pass all of that.

use xxhash_rust::xxh3::Xxh3Default;

use super::drive::Drive;
use super::encryption::HeaderKey;
use super::io::Pages;
use super::page::{PAGE_BYTES, pages_of};
use super::record_header::{HeaderKind, RecordHeader};
use super::switches::is_off;
use super::version::StoreUuid;
use crate::error::{Error, ErrorKind, Result};

/// Pages read at once at most.
const WINDOW_PAGES_MAX: u32 = 256;
/// Pages read first: one, since most scans find nothing.
const WINDOW_PAGES_MIN: u32 = 1;

/// What a scan does where there is no valid header, or a payload is not what its header says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum AtDamage {
    /// It ends: here the log ends, and what comes behind was never reported durable.
    Stop,
    /// It looks for the next header, page by page, to the end of the region. Records with a wrong payload are reported.
    Search,
}

/// Where to look, and for what.
#[derive(Clone)]
pub(super) struct ScanRange {
    pub(super) store: StoreUuid,
    pub(super) region: u32,
    pub(super) generation: u64,
    /// The page of the first header.
    pub(super) from_page: u32,
    /// Records have a higher sequence.
    pub(super) after_sequence: u64,
    pub(super) at_damage: AtDamage,
    /// Whether payloads are read and checked too.
    pub(super) checks_payloads: bool,
    /// The key that authenticates headers, if the store is encrypted.
    pub(super) header_key: Option<HeaderKey>,
}

/// A record that a scan found.
pub(super) struct Found {
    pub(super) header: RecordHeader,
    /// Whether the payload matches its checksum; true where it was not asked for.
    pub(super) is_intact: bool,
}

/// Where the log of a region ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct LogEnd {
    /// The page behind the last record.
    pub(super) page: u32,
    /// The sequence of the last record, or the one that the scan began after.
    pub(super) sequence: u64,
}

/// Calls `each` with every record of the range, in its order. Fences count for the order and are not reported.
///
/// # Errors
/// The first error of `each`, and what the drive reports apart from pages that it can not read: those are damage.
pub(super) fn scan(drive: &Drive, range: &ScanRange, each: &mut dyn FnMut(Found) -> Result<()>) -> Result<LogEnd> {
    let mut scan = Scan::new(drive, range.clone());
    while let Some(found) = scan.next()? {
        each(found)?;
    }
    Ok(scan.end())
}

/// A scan that goes from record to record.
pub(super) struct Scan<'a> {
    window: Window<'a>,
    range: ScanRange,
    page: u32,
    end: LogEnd,
}

impl<'a> Scan<'a> {
    /// Reads nothing yet.
    pub(super) fn new(drive: &'a Drive, range: ScanRange) -> Self {
        let window = Window { drive, region: range.region, first: 0, pages: 0, ahead: WINDOW_PAGES_MIN, bytes: None };
        let end = LogEnd { page: range.from_page, sequence: range.after_sequence };
        Self { window, page: range.from_page, range, end }
    }

    /// The next record; `None` at the end of the log.
    ///
    /// # Errors
    /// What the drive reports apart from pages that it can not read: those are damage.
    pub(super) fn next(&mut self) -> Result<Option<Found>> {
        while self.page < self.window.drive.region_pages() {
            let Some(header) = header_at(&mut self.window, &self.range, self.page, self.end.sequence)? else {
                match self.range.at_damage {
                    AtDamage::Stop => break,
                    AtDamage::Search => {
                        self.page += 1;
                        continue;
                    }
                }
            };
            let is_checked = header.kind.has_payload() && self.range.checks_payloads;
            let is_intact = !is_checked || is_payload_intact(&mut self.window, &header)?;
            if !is_intact && self.range.at_damage == AtDamage::Stop {
                break;
            }
            self.page += header.location.pages;
            self.end = LogEnd { page: self.page, sequence: header.sequence };
            if header.kind != HeaderKind::Fence {
                return Ok(Some(Found { header, is_intact }));
            }
        }
        Ok(None)
    }

    /// Where the log ends, as far as it was read.
    pub(super) fn end(&self) -> LogEnd {
        self.end
    }
}

fn header_at(window: &mut Window<'_>, range: &ScanRange, page: u32, after: u64) -> Result<Option<RecordHeader>> {
    let Some(bytes) = window.page(page)? else { return Ok(None) };
    let Ok(header) = RecordHeader::decode(bytes, range.header_key.as_ref()) else { return Ok(None) };
    let is_here = header.check_place(range.store, range.region, range.generation, page).is_ok();
    let fits = header.location.pages <= window.drive.region_pages() - page;
    Ok((is_here && fits && (header.sequence > after || is_off!(IgnoreSequenceRule))).then_some(header))
}

fn is_payload_intact(window: &mut Window<'_>, header: &RecordHeader) -> Result<bool> {
    let mut hasher = Xxh3Default::new();
    let mut left = header.stored_bytes;
    for page in 1..=pages_of(header.stored_bytes) as u32 {
        let Some(bytes) = window.page(header.location.page + page)? else { return Ok(false) };
        let used = left.min(PAGE_BYTES as u64);
        hasher.update(&bytes[..used as usize]);
        left -= used;
    }
    Ok(hasher.digest() == header.stored_xxh3)
}

/// The pages around the one that is looked at.
struct Window<'a> {
    drive: &'a Drive,
    region: u32,
    first: u32,
    pages: u32,
    ahead: u32,
    bytes: Option<Pages>,
}

impl Window<'_> {
    /// One page; `None` if the drive can not read it.
    fn page(&mut self, page: u32) -> Result<Option<&[u8]>> {
        if self.bytes.is_none() || page < self.first || page >= self.first + self.pages {
            self.load(page)?;
        }
        let at = (page - self.first) as usize * PAGE_BYTES;
        Ok(self.bytes.as_ref().and_then(|bytes| bytes.as_slice().get(at..at + PAGE_BYTES)))
    }

    fn load(&mut self, page: u32) -> Result<()> {
        let pages = self.ahead.min(self.drive.region_pages() - page);
        self.ahead = (self.ahead * 8).min(WINDOW_PAGES_MAX);
        (self.first, self.pages, self.bytes) = (page, pages, None);
        let read = match self.drive.read(self.region, page, pages) {
            // Only some of the pages may be bad: go on one at a time.
            Err(error) if pages > 1 && is_damage(&error) => {
                (self.pages, self.ahead) = (1, 1);
                self.drive.read(self.region, page, 1)
            }
            read => read,
        };
        match read {
            Ok(bytes) => self.bytes = Some(bytes),
            Err(error) if is_damage(&error) => {
                tracing::warn!(region = self.region, page, %error, "a page of the store can not be read");
                self.pages = 1;
            }
            Err(error) => return Err(error),
        }
        Ok(())
    }
}

fn is_damage(error: &Error) -> bool {
    matches!(error.kind(), ErrorKind::Io | ErrorKind::Corrupt)
}
