//! Opening a file past the page cache.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use rustix::fs::{AtFlags, StatxFlags, statx};

use super::{IO_ALIGN, IoBuffer, Pages};
use crate::error::{Error, ErrorKind, Result};

/// The smallest alignment of a drive.
const ALIGN_MIN: usize = 512;

/// Opens an existing file for reading and writing with `O_DIRECT`, and without it, after a warning, where the file
/// system has no direct I/O. Returns the file, the alignment in bytes that the drive asks for (512 to 4096; requests
/// use 4096 always) and whether I/O is direct.
///
/// # Errors
/// `Unsupported` for a drive that asks for more than 4096 bytes of alignment, otherwise what opening reports.
pub fn open_direct(path: &Path) -> Result<(File, usize, bool)> {
    let open = |flags| OpenOptions::new().read(true).write(true).custom_flags(flags).open(path);
    let failed = |source| Error::from_io(format!("opening '{}' for reading and writing", path.display()), source);
    match open(libc::O_DIRECT) {
        Ok(file) => match alignment_of(&file).map_err(failed)? {
            Some(alignment) if alignment > IO_ALIGN => {
                let message = format!(
                    "the drive of '{}' asks for direct I/O in multiples of {alignment} bytes, the limit is {IO_ALIGN}; \
                     choose another drive",
                    path.display()
                );
                return Err(Error::new(ErrorKind::Unsupported, message));
            }
            Some(alignment) => return Ok((file, alignment.max(ALIGN_MIN), true)),
            None => {}
        },
        Err(error) if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::EOPNOTSUPP)) => {}
        Err(error) => return Err(failed(error)),
    }
    let file = open(0).map_err(failed)?;
    tracing::warn!(path = %path.display(), "the file system has no direct I/O: data goes through the page cache");
    Ok((file, ALIGN_MIN, false))
}

/// The alignment that direct I/O on a file needs; `None` where it does not work. Without word from the kernel a read
/// shows whether ours is enough.
fn alignment_of(file: &File) -> io::Result<Option<usize>> {
    let mask = StatxFlags::DIOALIGN;
    if let Ok(found) = statx(file, "", AtFlags::EMPTY_PATH, mask)
        && found.stx_mask & mask.bits() != 0
    {
        let (memory, offset) = (found.stx_dio_mem_align as usize, found.stx_dio_offset_align as usize);
        return Ok((offset > 0).then(|| memory.max(offset)));
    }
    let mut page = IoBuffer::Pages(Pages::new(IO_ALIGN));
    loop {
        match page.read_at(file.as_fd(), 0, 0, IO_ALIGN) {
            Ok(_) => return Ok(Some(IO_ALIGN)),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => return Ok(None),
            Err(error) => return Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;

    use super::super::tests::directory;
    use super::*;

    #[test]
    fn a_file_on_a_drive_is_opened_past_the_page_cache() {
        let directory = directory();
        let path = directory.path().join("region");
        std::fs::write(&path, [7; 8192]).expect("a file");
        let (file, alignment, is_direct) = open_direct(&path).expect("opened");
        assert!(is_direct && (512..=4096).contains(&alignment) && alignment.is_power_of_two());
        let flags = rustix::fs::fcntl_getfl(&file).expect("flags");
        assert!(flags.contains(rustix::fs::OFlags::DIRECT), "descriptor {}", file.as_raw_fd());
        let mut page = IoBuffer::Pages(Pages::new(4096));
        assert_eq!(page.read_at(file.as_fd(), 4096, 0, 4096).expect("read"), 4096);
        let IoBuffer::Pages(page) = page else { unreachable!("pages went in") };
        assert!(page.as_slice().iter().all(|&byte| byte == 7));
    }

    #[test]
    fn without_direct_io_the_page_cache_is_used() {
        // Files of procfs refuse O_DIRECT.
        let (_, alignment, is_direct) = open_direct(Path::new("/proc/self/comm")).expect("opened");
        assert_eq!((alignment, is_direct), (512, false));
    }

    #[test]
    fn a_missing_file_is_not_created() {
        let directory = directory();
        let path = directory.path().join("missing");
        assert_eq!(open_direct(&path).err().map(|error| error.kind()), Some(ErrorKind::Io));
        assert!(!path.exists());
    }
}
