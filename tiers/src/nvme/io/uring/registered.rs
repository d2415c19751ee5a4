//! The arena as registered with a ring: one buffer for each GiB, from its start, as many as the kernel takes. Memory
//! inside one of them spares the kernel the work of pinning it for every transfer.

use std::io;
use std::ptr::NonNull;

/// Which memory is registered; the number of a buffer is its place in `bytes / buffer_bytes`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Registered {
    start: usize,
    /// Registered bytes, from `start` on.
    bytes: usize,
    buffer_bytes: usize,
}

impl Registered {
    /// The first `buffers` buffers of a memory.
    pub(super) fn new(memory: (NonNull<u8>, usize), buffer_bytes: usize, buffers: usize) -> Self {
        let bytes = memory.1.min(buffers.saturating_mul(buffer_bytes));
        Self { start: memory.0.as_ptr() as usize, bytes, buffer_bytes }
    }

    /// The number of the buffer that holds all of a range, or `None` if none does.
    pub(super) fn buffer_of(&self, start: NonNull<u8>, bytes: usize) -> Option<u16> {
        let first = (start.as_ptr() as usize).checked_sub(self.start)?;
        let last = first.checked_add(bytes.checked_sub(1)?)?;
        let buffer = first / self.buffer_bytes;
        (last < self.bytes && last / self.buffer_bytes == buffer).then(|| u16::try_from(buffer).ok()).flatten()
    }

    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }
}

/// The memory in parts of `buffer_bytes`, as the kernel wants it.
pub(super) fn parts(memory: (NonNull<u8>, usize), buffer_bytes: usize, buffers_max: usize) -> Vec<libc::iovec> {
    let starts = (0..memory.1).step_by(buffer_bytes).take(buffers_max);
    let part = |from: usize| libc::iovec {
        iov_base: memory.0.as_ptr().wrapping_add(from).cast(),
        iov_len: buffer_bytes.min(memory.1 - from),
    };
    starts.map(part).collect()
}

/// Registers as many of `total` buffers as the kernel takes, from the first on: all, or by bisection what fits its
/// limit on locked memory. Returns how many, and why not all. `register` takes all or nothing; `unregister` undoes it.
pub(super) fn register_most(
    total: usize,
    mut register: impl FnMut(usize) -> io::Result<()>,
    mut unregister: impl FnMut() -> io::Result<()>,
) -> (usize, Option<io::Error>) {
    let reason = match register(total) {
        Ok(()) => return (total, None),
        Err(error) => error,
    };
    // Only a lack of memory may be otherwise for less memory.
    if reason.raw_os_error() != Some(libc::ENOMEM) {
        return (0, Some(reason));
    }
    let (mut fits, mut too_many) = (0, total);
    while too_many - fits > 1 {
        let middle = fits + (too_many - fits) / 2;
        match register(middle).and_then(|()| unregister()) {
            Ok(()) => fits = middle,
            Err(_) => too_many = middle,
        }
    }
    if fits > 0 && register(fits).is_err() {
        fits = 0;
    }
    (fits, Some(reason))
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    const MIB: usize = 1 << 20;

    fn at(address: usize) -> NonNull<u8> {
        NonNull::new(address as *mut u8).expect("not null")
    }

    #[test]
    fn only_memory_inside_one_registered_buffer_has_a_number() {
        let registered = Registered::new((at(MIB), 10 * MIB), 4 * MIB, 2);
        assert_eq!(registered.bytes(), 8 * MIB);
        let buffer_of = |start: usize, bytes| registered.buffer_of(at(start), bytes);
        assert_eq!(buffer_of(MIB, 4 * MIB), Some(0));
        assert_eq!(buffer_of(5 * MIB, 4096), Some(1));
        assert_eq!(buffer_of(9 * MIB - 4096, 4096), Some(1));
        assert_eq!(buffer_of(5 * MIB - 4096, 8192), None, "across two buffers");
        assert_eq!(buffer_of(9 * MIB - 4096, 8192), None, "across the end of what is registered");
        assert_eq!(buffer_of(9 * MIB, 4096), None, "past what is registered");
        assert_eq!(buffer_of(4096, 4096), None, "before the arena");
        assert_eq!(buffer_of(usize::MAX, 4096), None);
        assert_eq!(buffer_of(MIB, 0), None);
        assert_eq!(Registered::new((at(MIB), 10 * MIB), 4 * MIB, 0).buffer_of(at(MIB), 1), None);
        let all = Registered::new((at(MIB), 10 * MIB), 4 * MIB, 3);
        assert_eq!((all.bytes(), all.buffer_of(at(9 * MIB), 2 * MIB)), (10 * MIB, Some(2)));
    }

    #[test]
    fn the_parts_cover_the_memory_once() {
        let lengths = |max| parts((at(MIB), 10 * MIB), 4 * MIB, max).iter().map(|p| p.iov_len).collect::<Vec<_>>();
        assert_eq!(lengths(100), [4 * MIB, 4 * MIB, 2 * MIB]);
        assert_eq!(lengths(2), [4 * MIB, 4 * MIB]);
        let parts = parts((at(MIB), 10 * MIB), 4 * MIB, 100);
        assert!(parts.windows(2).all(|w| w[0].iov_base as usize + w[0].iov_len == w[1].iov_base as usize));
    }

    /// A kernel that takes up to `limit` buffers.
    fn registered(total: usize, limit: usize, errno: i32) -> (usize, bool) {
        let held = Cell::new(0);
        let register = |count: usize| {
            assert_eq!(held.get(), 0, "registered twice");
            if count > limit {
                return Err(io::Error::from_raw_os_error(errno));
            }
            held.set(count);
            Ok(())
        };
        let (count, reason) = register_most(total, register, || {
            held.set(0);
            Ok(())
        });
        assert_eq!(held.get(), count, "what is reported is what is registered");
        (count, reason.is_some())
    }

    #[test]
    fn as_much_as_the_kernel_takes_is_registered() {
        for total in 1..40 {
            for limit in 0..total {
                assert_eq!(registered(total, limit, libc::ENOMEM), (limit, true));
                assert_eq!(registered(total, limit, libc::EOPNOTSUPP), (0, true));
            }
            assert_eq!(registered(total, total, libc::ENOMEM), (total, false));
        }
    }
}
