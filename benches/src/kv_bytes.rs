//! Bytes like those of a KV cache: normally distributed numbers, each channel with a scale of its own, as keys and values of
//! a model have them. The same seed gives the same bytes.

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

/// Numbers after which the channels repeat: 8 heads of 128.
const CHANNELS: usize = 1024;
/// How far the scales of channels lie apart: the standard deviation of their natural logarithm.
const SCALE_SPREAD: f32 = 0.5;
/// The scale at which 8-bit floats use their range well.
const FP8_SCALE: f32 = 8.0;

/// What bytes to make.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KvBytes {
    /// bfloat16.
    Bf16,
    /// 8-bit floats with 4 bits of exponent: rounded from the same numbers.
    Fp8,
    /// Nothing but zeros.
    Zeros,
    /// Any bytes: nothing shrinks them.
    Random,
}

impl KvBytes {
    /// The value of a namespace's field [`pegaflow_tiers::CodecHint::FIELD`] for such bytes.
    pub fn hint(self) -> &'static str {
        match self {
            Self::Bf16 => "bf16",
            Self::Fp8 => "fp8",
            Self::Zeros | Self::Random => "unknown",
        }
    }

    /// `bytes` of them; rounded down to an even number.
    pub fn make(self, bytes: usize, seed: u64) -> Vec<u8> {
        let mut random = StdRng::seed_from_u64(seed);
        let scales: Vec<f32> = (0..CHANNELS).map(|_| (normal(&mut random) * SCALE_SPREAD).exp()).collect();
        let bytes = bytes / 2 * 2;
        let mut number = |index: usize| normal(&mut random) * scales.get(index % CHANNELS).copied().unwrap_or(1.0);
        match self {
            Self::Bf16 => (0..bytes / 2).flat_map(|index| to_bf16(number(index)).to_le_bytes()).collect(),
            Self::Fp8 => (0..bytes).map(|index| to_e4m3(number(index) * FP8_SCALE)).collect(),
            Self::Zeros => vec![0; bytes],
            Self::Random => (0..bytes).map(|_| random.random()).collect(),
        }
    }
}

/// One normally distributed number (Box and Muller).
fn normal(random: &mut StdRng) -> f32 {
    let radius = (-2.0 * (1.0 - random.random::<f32>()).ln()).sqrt();
    radius * (std::f32::consts::TAU * random.random::<f32>()).cos()
}

/// To the nearest, ties to even.
fn to_bf16(number: f32) -> u16 {
    let bits = number.to_bits();
    (bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16) as u16
}

/// To the nearest number with 4 bits of exponent and 3 of mantissa; what is too large becomes the largest.
fn to_e4m3(number: f32) -> u8 {
    const BIAS: i32 = 7;
    let sign = if number.is_sign_negative() { 0x80 } else { 0 };
    let exponent = (number.abs().max(f32::MIN_POSITIVE).log2().floor() as i32).max(1 - BIAS);
    let eighths = (number.abs() / 2f32.powi(exponent - 3)).round() as i32;
    // A subnormal has no implicit bit and exponent 0; rounding up carries into the exponent by itself.
    let magnitude = eighths + (exponent + BIAS - 1) * 8;
    sign | magnitude.clamp(0, 0x7e) as u8
}

#[cfg(test)]
mod tests {
    use pegaflow_tiers::CodecHint;

    use super::*;

    fn from_e4m3(byte: u8) -> f32 {
        let (exponent, mantissa) = (i32::from(byte >> 3 & 0xf), f32::from(byte & 7));
        let magnitude = if exponent == 0 {
            mantissa / 8.0 * 2f32.powi(-6)
        } else {
            (1.0 + mantissa / 8.0) * 2f32.powi(exponent - 7)
        };
        if byte >= 0x80 { -magnitude } else { magnitude }
    }

    #[test]
    fn every_8_bit_float_is_rounded_to_itself() {
        for byte in (0..=0x7e).chain(0x80..=0xfe) {
            assert_eq!(to_e4m3(from_e4m3(byte)), byte, "{byte:#x}");
        }
        assert_eq!(to_e4m3(1e9), 0x7e);
    }

    #[test]
    fn hints_are_understood() {
        for (bytes, hint) in
            [(KvBytes::Bf16, CodecHint::Bf16), (KvBytes::Fp8, CodecHint::Fp8), (KvBytes::Random, CodecHint::Unknown)]
        {
            let descriptor = pegaflow_tiers::NamespaceDescriptor::new().with(CodecHint::FIELD, bytes.hint());
            assert_eq!(CodecHint::of(&descriptor), hint);
        }
        assert_eq!(KvBytes::Bf16.make(100, 1), KvBytes::Bf16.make(100, 1));
    }
}
