//! Proof that a file was not read or written through the page cache.
#![expect(unsafe_code, reason = "maps a file to ask the kernel what of it is in memory")]

use std::fs::File;
use std::os::fd::AsRawFd;

use anyhow::{Context, Result, ensure};

/// Bytes of `file` that are in the page cache. Only for a file that this user owns: of others the kernel tells nothing.
///
/// # Errors
/// What the kernel reports.
pub fn cached_bytes(file: &File) -> Result<u64> {
    const PAGE: usize = 4096;
    let bytes = usize::try_from(file.metadata()?.len())?;
    ensure!(bytes > 0, "an empty file");
    // SAFETY: a new mapping at an address of the kernel's choice; it is never accessed.
    let start =
        unsafe { libc::mmap(std::ptr::null_mut(), bytes, libc::PROT_READ, libc::MAP_SHARED, file.as_raw_fd(), 0) };
    ensure!(start != libc::MAP_FAILED, "mapping a file: {}", std::io::Error::last_os_error());
    let mut pages = vec![0_u8; bytes.div_ceil(PAGE)];
    // SAFETY: the mapping made above, and a byte for each of its pages.
    let asked = unsafe { libc::mincore(start, bytes, pages.as_mut_ptr()) };
    let error = std::io::Error::last_os_error();
    // SAFETY: the mapping made above.
    unsafe { libc::munmap(start, bytes) };
    ensure!(asked == 0, "mincore: {error}");
    Ok(pages.iter().filter(|page| **page & 1 == 1).count() as u64 * PAGE as u64)
}

/// Bytes that this process has made drives read and write: what the page cache serves is not among them.
///
/// # Errors
/// Where `/proc/self/io` is not there.
pub fn drive_bytes() -> Result<(u64, u64)> {
    let text = std::fs::read_to_string("/proc/self/io").context("reading /proc/self/io")?;
    let field = |name: &str| -> Result<u64> {
        let line = text.lines().find_map(|line| line.strip_prefix(name)).context("an unknown /proc/self/io")?;
        Ok(line.trim().parse()?)
    };
    Ok((field("read_bytes:")?, field("write_bytes:")?))
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;

    #[test]
    fn what_went_through_the_page_cache_is_seen() {
        let mut file = tempfile::tempfile_in(".").expect("a file");
        file.write_all(&[1; 64 << 10]).expect("written");
        assert_eq!(cached_bytes(&file).expect("asked"), 64 << 10);
        file.sync_all().expect("synced");
        rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).expect("dropped");
        assert_eq!(cached_bytes(&file).expect("asked"), 0);
        std::io::Seek::rewind(&mut file).expect("rewound");
        file.read_exact(&mut [0; 4096]).expect("read");
        assert!(cached_bytes(&file).expect("asked") >= 4096);
    }

    #[test]
    fn the_process_knows_its_drive_bytes() {
        assert!(drive_bytes().is_ok());
    }
}
