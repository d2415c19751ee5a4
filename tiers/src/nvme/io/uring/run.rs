//! A run: neighbouring operations that the kernel gets as one request. All of it succeeds, or whoever is not covered by
//! what was transferred goes again alone, so that nobody fails or is believed for the sake of a neighbour. An operation
//! on its own is a run of one, with its pieces and retries. Pure bookkeeping; the ring's thread makes the requests.

use std::io;

use super::super::operation::Operation;
use crate::error::{Error, Result};

/// See the module.
pub(super) struct Run {
    /// In the order of the file, without a gap. Never empty.
    members: Vec<Operation>,
    /// Where their memory lies, in their order; neighbours in memory are one. Empty for a run of one.
    vectors: Vec<libc::iovec>,
}

/// What comes after a transfer.
pub(super) enum Next {
    /// The same run once more, for its next piece.
    Again,
    /// The operation is through.
    Ended(Result<()>),
    /// So many bytes of a run of several were transferred; see [`Run::part`].
    Parted(usize),
}

impl Run {
    /// A run of one or more operations, each beginning where the one before it ends.
    pub(super) fn new(members: Vec<Operation>) -> Self {
        let mut vectors: Vec<libc::iovec> = Vec::new();
        for (start, bytes) in members.iter().filter(|_| members.len() > 1).map(Operation::memory) {
            match vectors.last_mut() {
                Some(last) if last.iov_base.wrapping_byte_add(last.iov_len) == start.as_ptr().cast() => {
                    last.iov_len += bytes;
                }
                _ => vectors.push(libc::iovec { iov_base: start.as_ptr().cast(), iov_len: bytes }),
            }
        }
        Self { members, vectors }
    }

    /// The operation whose next piece is to be transferred: the first one.
    pub(super) fn first(&self) -> Option<&Operation> {
        self.members.first()
    }

    /// The memory of a run of several; empty for a run of one.
    pub(super) fn vectors(&self) -> &[libc::iovec] {
        &self.vectors
    }

    /// Bytes that are still to be transferred.
    pub(super) fn bytes(&self) -> usize {
        self.members.iter().map(Operation::bytes_left).sum()
    }

    /// Takes in how a transfer ended.
    pub(super) fn advance(&mut self, outcome: io::Result<usize>) -> Next {
        match self.members.as_mut_slice() {
            [alone] => alone.advance(outcome).map_or(Next::Again, Next::Ended),
            // Whatever went wrong: each one's own transfer will tell whose it is.
            _ => Next::Parted(outcome.unwrap_or(0)),
        }
    }

    /// Ends all of it with the same result.
    pub(super) fn finish(self, result: &Result<()>) {
        self.members.into_iter().for_each(|member| member.finish(result.clone()));
    }

    /// Ends those that the first `moved` bytes cover, and returns the others, untouched.
    pub(super) fn part(self, moved: usize) -> Vec<Operation> {
        let mut end = 0;
        let mut rest = Vec::new();
        for member in self.members {
            end += member.bytes_left();
            match end <= moved {
                true => member.finish(Ok(())),
                false => rest.push(member),
            }
        }
        rest
    }

    /// Ends all of it without giving back memory that the kernel may still use.
    pub(super) fn abandon(self, error: &Error) {
        self.members.into_iter().for_each(|member| member.abandon(error.clone()));
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use parking_lot::Mutex;

    use super::super::super::{FileId, IoBuffer, IoKind, IoPriority, IoRequest, Pages};
    use super::*;
    use crate::dram::{Arena, ArenaConfig};
    use crate::error::ErrorKind;

    type Ends = Arc<Mutex<Vec<(usize, Option<ErrorKind>)>>>;

    fn operation(number: usize, offset: u64, buffer: IoBuffer, ends: &Ends) -> Operation {
        let ends = Arc::clone(ends);
        let done = Box::new(move |completion: super::super::super::IoCompletion| {
            assert!(completion.buffer.is_some());
            ends.lock().push((number, completion.result.err().map(|error| error.kind())));
        });
        let (kind, priority) = (IoKind::Read, IoPriority::Demand);
        Operation::new(IoRequest { file: FileId(0), kind, offset, buffer: Some(buffer), priority, done }, true, 1 << 20)
    }

    /// Three operations of 4, 8 and 4 KiB.
    fn three() -> (Run, Ends) {
        let ends = Ends::default();
        let sizes = [(0, 4096), (4096, 8192), (12288, 4096)];
        let members = (0..)
            .zip(sizes)
            .map(|(number, (offset, bytes))| operation(number, offset, IoBuffer::Pages(Pages::new(bytes)), &ends));
        (Run::new(members.collect()), ends)
    }

    /// Who ended well, and where the others go on, after so many bytes.
    fn parted(outcome: io::Result<usize>) -> (Vec<(usize, Option<ErrorKind>)>, Vec<u64>) {
        let (mut run, ends) = three();
        assert_eq!(run.bytes(), 16384);
        let Next::Parted(moved) = run.advance(outcome) else { unreachable!("a run of several") };
        let rest = run.part(moved);
        let offsets = rest.iter().map(|member| member.piece().offset).collect();
        let ended = ends.lock().clone();
        rest.into_iter().for_each(|member| member.finish(Ok(())));
        assert_eq!(ends.lock().len(), 3, "each ends once");
        (ended, offsets)
    }

    #[test]
    fn who_is_not_covered_goes_again_alone() {
        let good = |count| (0..count).map(|number| (number, None)).collect::<Vec<_>>();
        assert_eq!(parted(Ok(16384)), (good(3), vec![]));
        assert_eq!(parted(Ok(12288)), (good(2), vec![12288]));
        assert_eq!(parted(Ok(12287)), (good(1), vec![4096, 12288]));
        assert_eq!(parted(Ok(4096)), (good(1), vec![4096, 12288]));
        assert_eq!(parted(Ok(0)), (good(0), vec![0, 4096, 12288]));
        assert_eq!(parted(Err(io::Error::from_raw_os_error(libc::EIO))), (good(0), vec![0, 4096, 12288]));
    }

    #[test]
    fn neighbours_in_memory_are_one() {
        let arena = Arena::new(ArenaConfig { touch: false, ..ArenaConfig::new(2 << 20) }).expect("memory");
        let ends = Ends::default();
        let slots: Vec<_> = (0..4).map(|_| Arc::new(arena.alloc(4096).expect("room"))).collect();
        let run = |order: &[usize]| {
            let member = |(place, &slot): (usize, &usize)| {
                let buffer = IoBuffer::Slot { slot: Arc::clone(&slots[slot]), bytes: 8192 };
                operation(place, place as u64 * 8192, buffer, &ends)
            };
            let run = Run::new(order.iter().enumerate().map(member).collect());
            let lengths: Vec<_> = run.vectors().iter().map(|vector| vector.iov_len).collect();
            run.finish(&Ok(()));
            lengths
        };
        assert_eq!(run(&[0, 1, 2, 3]), [4 * 8192]);
        assert_eq!(run(&[2, 3, 0, 1]), [2 * 8192, 2 * 8192]);
        assert_eq!(run(&[3, 2]), [8192, 8192]);
        assert!(run(&[1]).is_empty());
    }
}
