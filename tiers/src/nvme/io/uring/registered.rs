//! The arena as registered with a ring: buffers of one size from its start on, as many as are ready and as the kernel
//! takes. Memory inside one of them spares the kernel the work of pinning it for every transfer.

use std::io;
use std::ptr::NonNull;

/// Which memory is registered; the number of a buffer is its place in `bytes / buffer_bytes`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Registered {
    start: usize,
    /// Registered bytes, from `start` on: whole buffers, or all of the memory.
    bytes: usize,
    /// Bytes that may be registered.
    bytes_max: usize,
    buffer_bytes: usize,
    has_stopped: bool,
}

impl Registered {
    /// Nothing yet, of a memory of which at most `buffers_max` buffers will be registered.
    pub(super) fn new(memory: (NonNull<u8>, usize), buffer_bytes: usize, buffers_max: usize) -> Self {
        let bytes_max = memory.1.min(buffers_max.saturating_mul(buffer_bytes));
        Self { start: memory.0.as_ptr() as usize, bytes: 0, bytes_max, buffer_bytes, has_stopped: false }
    }

    /// How many buffers there will be at most.
    pub(super) fn buffers(&self) -> usize {
        self.bytes_max.div_ceil(self.buffer_bytes)
    }

    /// The number and the memory of the buffer that is to be registered next, if all of it is ready.
    pub(super) fn next(&self, ready_bytes: usize) -> Option<(u32, libc::iovec)> {
        let end = self.end_of_next();
        let is_due = !self.has_stopped && self.bytes < end && end <= ready_bytes;
        let part = libc::iovec { iov_base: (self.start + self.bytes) as *mut libc::c_void, iov_len: end - self.bytes };
        is_due.then_some(((self.bytes / self.buffer_bytes) as u32, part))
    }

    /// The next buffer is registered.
    pub(super) fn add(&mut self) {
        self.bytes = self.end_of_next();
    }

    /// No more will be.
    pub(super) fn stop(&mut self) {
        self.has_stopped = true;
    }

    /// The buffers that are ready, as the kernel wants them.
    pub(super) fn parts(&self, ready_bytes: usize) -> Vec<libc::iovec> {
        let mut ahead = *self;
        std::iter::from_fn(|| {
            let (_, part) = ahead.next(ready_bytes)?;
            ahead.add();
            Some(part)
        })
        .collect()
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

    fn end_of_next(&self) -> usize {
        self.bytes_max.min(self.bytes + self.buffer_bytes)
    }
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

    /// `buffers` registered buffers of 4 MiB, of a memory of 10 MiB.
    fn with(buffers: usize) -> Registered {
        let mut registered = Registered::new((at(MIB), 10 * MIB), 4 * MIB, 100);
        (0..buffers).for_each(|_| registered.add());
        registered
    }

    #[test]
    fn only_memory_inside_one_registered_buffer_has_a_number() {
        let registered = with(2);
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
        assert_eq!(with(0).buffer_of(at(MIB), 1), None);
        let all = with(3);
        assert_eq!((all.bytes(), all.buffer_of(at(9 * MIB), 2 * MIB)), (10 * MIB, Some(2)));
    }

    #[test]
    fn buffers_are_registered_in_order_when_all_of_them_is_ready() {
        let mut registered = with(0);
        assert_eq!(registered.buffers(), 3);
        let mut ends = MIB;
        for (number, ready, bytes) in [(0, 4 * MIB, 4 * MIB), (1, 8 * MIB, 4 * MIB), (2, 10 * MIB, 2 * MIB)] {
            assert!(registered.next(ready - 1).is_none(), "the last byte is missing");
            assert_eq!(registered.buffer_of(at(ends), 1), None, "ready is not registered");
            let (next, part) = registered.next(ready).expect("due");
            assert_eq!((next, part.iov_base as usize, part.iov_len), (number, ends, bytes));
            registered.add();
            assert_eq!(registered.buffer_of(at(ends), 1), Some(number as u16));
            ends += bytes;
        }
        assert!(registered.next(usize::MAX).is_none(), "all is registered");
        let mut stopped = with(1);
        stopped.stop();
        assert!(stopped.next(10 * MIB).is_none());
        assert_eq!(stopped.buffer_of(at(MIB), 4096), Some(0), "what is registered stays so");
        let mut few = Registered::new((at(MIB), 10 * MIB), 4 * MIB, 1);
        few.add();
        assert!(few.buffers() == 1 && few.next(10 * MIB).is_none());
        let none = Registered::new((at(MIB), 10 * MIB), 4 * MIB, 0);
        assert!(none.buffers() == 0 && none.next(10 * MIB).is_none());
    }

    #[test]
    fn the_parts_cover_what_is_ready_once() {
        let lengths = |ready| with(0).parts(ready).iter().map(|part| part.iov_len).collect::<Vec<_>>();
        assert_eq!(lengths(10 * MIB), [4 * MIB, 4 * MIB, 2 * MIB]);
        assert_eq!(lengths(9 * MIB), [4 * MIB, 4 * MIB]);
        assert!(lengths(3 * MIB).is_empty());
        let parts = with(0).parts(10 * MIB);
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
