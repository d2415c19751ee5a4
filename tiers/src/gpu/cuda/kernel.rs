//! The copy kernel: `gather_scatter.cu`, compiled to `gather_scatter.ptx` by `make ptx`, and how it is started.

use std::ffi::CStr;
use std::sync::Arc;

use super::driver::{Context, Kernel, Stream};
use super::plan::{ArenaSpan, PIECE_BLOCKS_MAX, Piece};
use crate::dram::Place;
use crate::error::{Error, ErrorKind, Result};

const PTX: &str = concat!(include_str!("gather_scatter.ptx"), "\0");
const THREADS: u32 = 256;

/// What the other side of the device's memory is.
#[derive(Debug, Clone, Copy)]
pub(super) enum Other {
    /// Slots of an arena.
    Arena(ArenaSpan),
    /// A buffer on the device with the blocks of the piece, one after the other.
    Staging(u64),
}

#[repr(C)]
#[derive(Clone, Copy)]
struct Entry {
    block: u32,
    place: u32,
}

/// `Launch` of the kernel's source.
#[repr(C)]
struct Launch {
    slices: u64,
    other: u64,
    step: u64,
    from: u64,
    first_slice: u32,
    slice_count: u32,
    blocks: u32,
    to_device: u32,
    entries: [Entry; PIECE_BLOCKS_MAX],
}

/// Kernels take at most 4096 bytes of parameters.
const _: () = assert!(size_of::<Launch>() <= 4096);

/// The kernel, loaded.
pub(super) struct CopyKernel(Kernel);

impl CopyKernel {
    pub(super) fn load(context: &Arc<Context>) -> Result<Self> {
        let ptx = CStr::from_bytes_with_nul(PTX.as_bytes())
            .map_err(|_| Error::new(ErrorKind::Unsupported, "the PTX of the copy kernel holds a zero byte"))?;
        Kernel::load(context, ptx, c"gather_scatter").map(Self)
    }

    /// Queues the copy of a piece between the device's memory, whose slices the table at `slices` holds, and `other`.
    ///
    /// # Safety
    /// The table is that of the geometry that cut the piece; its addresses, those of the blocks and `other` stay valid
    /// until the stream has come past the kernel.
    pub(super) unsafe fn queue(
        &self,
        stream: &Stream,
        ctas: u32,
        to_device: bool,
        slices: u64,
        (blocks, piece): (&[(u32, Place)], &Piece),
        other: Other,
    ) -> Result<()> {
        let of_piece = blocks.get(piece.blocks.clone()).unwrap_or_default();
        let mut entries = [Entry { block: 0, place: 0 }; PIECE_BLOCKS_MAX];
        for (entry, (block, place)) in entries.iter_mut().zip(of_piece) {
            *entry = Entry { block: *block, place: place.0 };
        }
        let (other, step, from) = match other {
            Other::Arena(arena) => (arena.payload_of_zero(), 0, 0),
            Other::Staging(start) => (start, piece.bytes, piece.from),
        };
        let launch = Launch {
            slices,
            other,
            step,
            from,
            first_slice: piece.slices.start as u32,
            slice_count: piece.slices.len() as u32,
            blocks: of_piece.len().min(PIECE_BLOCKS_MAX) as u32,
            to_device: u32::from(to_device),
            entries,
        };
        let units = launch.blocks.saturating_mul(launch.slice_count);
        // SAFETY: the kernel's parameter is `Launch`; the addresses that it forms are those of the caller's promise.
        unsafe { self.0.launch(stream, ctas.min(units).max(1), THREADS, &launch) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ptx_was_made_from_the_source() {
        let source = include_bytes!("gather_scatter.cu");
        let hash = source
            .iter()
            .fold(0xcbf2_9ce4_8422_2325u64, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3));
        let header = format!("// source-fnv1a: {hash:016x}");
        assert_eq!(PTX.lines().next(), Some(header.as_str()), "the source has changed; run `make ptx`");
        assert!(PTX.contains("\n.version 8.0\n"), "CUDA 12.0 takes no newer PTX");
        assert!(PTX.contains("\n.target sm_80\n"));
        let entries = format!("#define ENTRIES {PIECE_BLOCKS_MAX}\n");
        assert!(include_str!("gather_scatter.cu").contains(&entries));
    }
}
