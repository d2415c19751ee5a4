//! Lossless compression of the payloads of records. Owns the encoded form (a *frame* of chunks, drawn in
//! `docs/format.md`), the choice between forms, and nothing of drives or records: bytes in, bytes out.
//!
//! Floats hardly repeat, so searching them for matches costs time and brings nothing. What they have is an exponent that
//! takes few values. Therefore a chunk is split into a plane of exponents and a plane of everything else; the first is
//! entropy-coded (zstd's Huffman coder alone, without its search for matches), the second is kept as it is.

mod decoder;
mod encoder;
mod frame;
mod lane;
mod planes;
#[cfg(test)]
mod tests;

use serde::{Deserialize, Serialize};

use crate::block::NamespaceDescriptor;

pub use decoder::Decoder;
pub use encoder::{Encoded, Encoder};
pub use frame::CHUNK_BYTES;
pub(crate) use lane::{Lane, Skip};

/// Whether blocks are compressed on their way to the drive. What is on the drive is readable with any.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CodecChoice {
    /// By the type of a namespace's numbers, as long as it saves at least a twentieth and this machine decodes at least as
    /// fast as the drive reads.
    #[default]
    Auto,
    /// The same, however fast the drive reads: more fits on it and less is written, and blocks may come back more slowly.
    Always,
    /// Blocks are stored as they are.
    None,
}

/// The form of a payload on the drive, by its number in record headers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u16)]
pub enum Codec {
    /// As it is.
    Stored = 0,
    /// Chunks compressed by zstd.
    Zstd = 1,
    /// Chunks of bfloat16: the exponents compressed, sign and mantissa as they are.
    Bf16 = 2,
    /// Chunks of IEEE half floats: the upper bytes (sign, exponent, two bits of the mantissa) compressed, the lower as they
    /// are.
    F16 = 3,
    /// Chunks of 8-bit floats with 4 bits of exponent: the exponents compressed, sign and mantissa as they are.
    F8E4m3 = 4,
}

impl Codec {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::Stored, Self::Zstd, Self::Bf16, Self::F16, Self::F8E4m3];

    /// The number in record headers.
    pub const fn number(self) -> u16 {
        self as u16
    }

    /// The codec with this number; `None` if this build knows none.
    pub fn from_number(number: u16) -> Option<Self> {
        Self::ALL.into_iter().find(|codec| codec.number() == number)
    }

    /// Whether a chunk is split into planes.
    pub(crate) const fn has_planes(self) -> bool {
        matches!(self, Self::Bf16 | Self::F16 | Self::F8E4m3)
    }
}

/// What the numbers of a namespace are, as far as its descriptor says: the field [`CodecHint::FIELD`] with the value
/// `bf16`, `f16` or `fp8`. Anything else, and no such field, is unknown. A wrong hint costs compression, never a byte.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum CodecHint {
    /// bfloat16.
    Bf16,
    /// IEEE half floats.
    F16,
    /// 8-bit floats.
    Fp8,
    /// Not known.
    #[default]
    Unknown,
}

impl CodecHint {
    /// The field of a namespace's descriptor that says what its numbers are.
    pub const FIELD: &'static str = "kv_dtype";

    /// What a namespace's descriptor says.
    pub fn of(descriptor: &NamespaceDescriptor) -> Self {
        match descriptor.fields().get(Self::FIELD).map(String::as_str) {
            Some("bf16") => Self::Bf16,
            Some("f16") => Self::F16,
            Some("fp8") => Self::Fp8,
            _ => Self::Unknown,
        }
    }

    /// The codec to try.
    pub const fn codec(self) -> Codec {
        match self {
            Self::Bf16 => Codec::Bf16,
            Self::F16 => Codec::F16,
            Self::Fp8 => Codec::F8E4m3,
            Self::Unknown => Codec::Zstd,
        }
    }
}
