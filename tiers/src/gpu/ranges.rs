//! Several memories as one: their bytes are numbered one after the other, and no fragment leaves its own.

use crate::block::{Fragment, MemoryLayout};
use crate::error::{Error, ErrorKind, Result};

/// A fragment of every block in one of several allocations: vLLM has one for each layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RangeFragment {
    /// Which of the ranges it lies in, from 0.
    pub range: u32,
    /// Where it lies; the offset counts from the start of the range.
    pub fragment: Fragment,
}

/// Checked fragments of several ranges.
#[derive(Debug)]
pub(super) struct Ranges {
    /// The layout of the bytes of all ranges.
    pub(super) layout: MemoryLayout,
    /// For every fragment: the index of its range, and the number of that range's first byte in the layout.
    pub(super) places: Vec<(usize, u64)>,
}

impl Ranges {
    /// Numbers the bytes of ranges of these lengths.
    ///
    /// # Errors
    /// `InvalidInput` if a fragment leaves its range or names none.
    pub(super) fn new(lengths: &[u64], fragments: Vec<RangeFragment>, blocks: u32) -> Result<Self> {
        let bad = |message: String| Error::new(ErrorKind::InvalidInput, message);
        let mut bases = Vec::with_capacity(lengths.len());
        let mut total = 0u64;
        for bytes in lengths {
            bases.push((total, *bytes));
            total = total.checked_add(*bytes).ok_or_else(|| bad("the ranges are larger than 2^64 bytes".into()))?;
        }
        let mut places = Vec::with_capacity(fragments.len());
        let mut flat = Vec::with_capacity(fragments.len());
        for RangeFragment { range, fragment } in fragments {
            let index = usize::try_from(range).unwrap_or(usize::MAX);
            let (base, bytes) = *bases
                .get(index)
                .ok_or_else(|| bad(format!("a fragment names range {range}; there are {}", lengths.len())))?;
            // Inside its own range, not only inside the sum of them.
            MemoryLayout::new(vec![fragment], blocks, bytes)?;
            places.push((index, base));
            flat.push(Fragment { offset: base + fragment.offset, ..fragment });
        }
        Ok(Self { layout: MemoryLayout::new(flat, blocks, total)?, places })
    }
}
