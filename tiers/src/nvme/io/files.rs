//! The files of an engine, by number, and what a request on them must look like.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use super::{FileId, IO_ALIGN, IoBuffer, IoKind, IoRequest};
use crate::error::{Error, ErrorKind, Result};

/// Descriptors of the engine's own, so that the caller may close theirs.
pub(super) struct Files(Vec<Entry>);

struct Entry {
    descriptor: OwnedFd,
    is_direct: bool,
}

impl Files {
    /// Duplicates the descriptors; [`FileId`] is the place in `files`.
    pub(super) fn adopt(files: &[impl AsFd]) -> Result<Self> {
        let adopt = |file: &_| -> std::io::Result<Entry> {
            let descriptor = AsFd::as_fd(file).try_clone_to_owned()?;
            let is_direct = rustix::fs::fcntl_getfl(&descriptor)?.contains(rustix::fs::OFlags::DIRECT);
            Ok(Entry { descriptor, is_direct })
        };
        let entries: std::io::Result<Vec<_>> = files.iter().map(adopt).collect();
        let remedy = "duplicating the descriptors of the store's files (see ulimit -n)";
        entries.map(Self).map_err(|source| Error::from_io(remedy, source))
    }

    /// The descriptor of a file that passed [`Files::check`].
    pub(super) fn get(&self, file: FileId) -> std::io::Result<BorrowedFd<'_>> {
        let entry = self.0.get(file.0 as usize);
        entry.map(|entry| entry.descriptor.as_fd()).ok_or_else(|| rustix::io::Errno::BADF.into())
    }

    /// Whether it was opened with `O_DIRECT`.
    pub(super) fn is_direct(&self, file: FileId) -> bool {
        self.0.get(file.0 as usize).is_some_and(|entry| entry.is_direct)
    }

    /// The numbers of all descriptors, in order.
    pub(super) fn raw(&self) -> Vec<RawFd> {
        self.0.iter().map(|entry| entry.descriptor.as_raw_fd()).collect()
    }

    /// Whether a request keeps the contract of [`IoRequest`].
    pub(super) fn check(&self, request: &IoRequest) -> Result<()> {
        let problem = match &request.buffer {
            _ if self.0.len() <= request.file.0 as usize => {
                format!("file {} is not one of the engine's {} files", request.file.0, self.0.len())
            }
            Some(_) if request.kind == IoKind::Sync => "a sync takes no buffer".to_owned(),
            None if request.kind != IoKind::Sync => "a read or write needs a buffer".to_owned(),
            Some(buffer) => match problem_of(buffer, request.offset) {
                None => return Ok(()),
                Some(problem) => problem,
            },
            None => return Ok(()),
        };
        Err(Error::new(ErrorKind::InvalidInput, problem).with("file", request.file.0).with("offset", request.offset))
    }
}

fn problem_of(buffer: &IoBuffer, offset: u64) -> Option<String> {
    let bytes = buffer.bytes();
    if let IoBuffer::Slot { slot, bytes } | IoBuffer::SlotEnd { slot, bytes } = buffer
        && *bytes > slot.bytes()
    {
        return Some(format!("{bytes} bytes are more than the slot's {}", slot.bytes()));
    }
    let address = buffer.as_ptr().as_ptr() as usize;
    if bytes == 0 || [bytes, address].iter().any(|n| !n.is_multiple_of(IO_ALIGN)) {
        return Some(format!("{bytes} bytes at address {address:#x} are not a positive multiple of {IO_ALIGN}"));
    }
    let end = offset.checked_add(bytes as u64).filter(|&end| end <= i64::MAX.cast_unsigned());
    if !offset.is_multiple_of(IO_ALIGN as u64) || end.is_none() {
        return Some(format!("offset {offset} is not a multiple of {IO_ALIGN} below 2^63 - {bytes}"));
    }
    None
}
