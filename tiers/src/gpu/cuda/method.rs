//! Which way a copy takes. The one place where that is decided; measured reasons stand beside the figures.

use super::super::CopyDirection;

/// A way between the device and an arena.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Method {
    /// The copy engines move every fragment by itself.
    Batch,
    /// A kernel gathers blocks in a buffer on the device (or scatters them from there), the copy engines move whole
    /// blocks between it and the arena. The fastest.
    Staged,
    /// A kernel moves the fragments straight over the link. Takes few SMs and no buffer.
    Kernel,
}

/// What of a layout matters.
#[derive(Debug, Clone, Copy)]
pub(super) struct Shape {
    pub(super) fragments: usize,
    /// Of the smallest.
    pub(super) fragment_bytes: u64,
}

/// How many CTAs copies take; calibrated once per GPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Tuning {
    /// Over the link, for fragments of 16 KiB and more.
    pub(super) load_ctas: u32,
    /// Within the device.
    pub(super) staging_ctas: u32,
}

impl Tuning {
    /// What an H200 wants.
    pub(super) const DEFAULT: Self = Self { load_ctas: 8, staging_ctas: 32 };
}

/// Below it a CTA has too few bytes in flight to hide the link's latency; twice as many make up for that.
const FRAGMENT_BYTES_SMALL: u64 = 16 << 10;
/// Bytes of a staging buffer. With a quarter of it staged copies lose 2 % of the link.
pub(super) const STAGING_BYTES: u64 = 16 << 20;
/// Bytes that the device has of background copies of one direction: two staged pieces, or one of another kind. A copy
/// engine that always has something to do serves no other stream, so that a model's own small copies, and with them its
/// steps, would stand still as long as blocks are copied. With so little it has nothing to do now and then.
pub(super) const BACKGROUND_BYTES_MAX: u64 = 16 << 20;

impl Method {
    /// The way of a copy.
    ///
    /// Nothing takes the kernel over the link where there is memory for staging. While writes to host memory are in flight,
    /// every kernel that ends on the device waits for them, and decoding slows down by a fifth and more. Loads keep CTAs
    /// busy that the model's own kernels count on: a decode batch takes a quarter longer, with staging an eighth.
    pub(super) fn choose(shape: Shape) -> Self {
        if shape.fragments == 1 { Self::Batch } else { Self::Staged }
    }

    /// What to do instead where there is no memory for staging.
    pub(super) fn without_staging(self, direction: CopyDirection) -> Self {
        match (self, direction) {
            (Self::Staged, CopyDirection::ToDevice) => Self::Kernel,
            (Self::Staged, CopyDirection::ToSlots) => Self::Batch,
            (other, _) => other,
        }
    }

    /// The most that is queued at once. Of a copy that nobody's stream waits for less: what the model itself copies beside
    /// it waits until the copy engine has ended a piece.
    pub(super) fn piece_bytes(self, is_urgent: bool) -> u64 {
        match self {
            Self::Staged if !is_urgent => BACKGROUND_BYTES_MAX / 2,
            Self::Batch | Self::Staged => STAGING_BYTES,
            // The end of a launch is slow: some CTAs have nothing left to do.
            Self::Kernel => 4 * STAGING_BYTES,
        }
    }

    /// The CTAs of the kernel, in the ways that have one.
    pub(super) fn ctas(self, shape: Shape, tuning: Tuning) -> u32 {
        match self {
            Self::Kernel if shape.fragment_bytes < FRAGMENT_BYTES_SMALL => tuning.load_ctas * 2,
            Self::Kernel => tuning.load_ctas,
            Self::Batch | Self::Staged => tuning.staging_ctas,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_copy_takes_its_way() {
        let one = Shape { fragments: 1, fragment_bytes: 4 << 20 };
        let many = Shape { fragments: 64, fragment_bytes: 64 << 10 };
        assert_eq!((Method::choose(one), Method::choose(many)), (Method::Batch, Method::Staged));
    }

    #[test]
    fn of_a_background_copy_the_copy_engine_never_has_two_large_pieces() {
        for method in [Method::Batch, Method::Staged, Method::Kernel] {
            let piece = method.piece_bytes(false);
            assert!(piece >= BACKGROUND_BYTES_MAX || method == Method::Staged && 2 * piece <= BACKGROUND_BYTES_MAX);
        }
        assert_eq!(Method::Staged.piece_bytes(true), STAGING_BYTES);
    }

    #[test]
    fn without_memory_for_staging_saves_still_avoid_the_kernel() {
        for method in [Method::Batch, Method::Staged] {
            assert_eq!(method.without_staging(CopyDirection::ToSlots), Method::Batch);
        }
        assert_eq!(Method::Staged.without_staging(CopyDirection::ToDevice), Method::Kernel);
    }

    #[test]
    fn small_fragments_take_more_ctas() {
        let shape = |fragment_bytes| Shape { fragments: 2, fragment_bytes };
        let ctas = |bytes| Method::Kernel.ctas(shape(bytes), Tuning::DEFAULT);
        assert_eq!((ctas(8 << 10), ctas(16 << 10), ctas(2 << 20)), (16, 8, 8));
        assert_eq!(Method::Staged.ctas(shape(8 << 10), Tuning::DEFAULT), 32);
    }
}
