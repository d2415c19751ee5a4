//! Which blocks an operator means.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use pegaflow_tiers::{BlockKey, Error, ErrorKind, NamespaceId, Result};

/// The fewest hexadecimal digits that name a key.
const DIGITS_MIN: usize = 8;
/// All of them.
const DIGITS_MAX: usize = 64;

/// The beginning of a block's key, 8 to 64 hexadecimal digits. It names a prefix: the key of a block is a hash of all
/// tokens up to the block's end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyPrefix(String);

impl KeyPrefix {
    /// Whether the key begins so.
    pub fn begins(&self, key: &BlockKey) -> bool {
        let digits = key.as_bytes().iter().flat_map(|byte| [byte >> 4, byte & 15]);
        self.0.chars().zip(digits).all(|(own, digit)| own.to_digit(16) == Some(digit.into()))
    }
}

impl FromStr for KeyPrefix {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let is_good = (DIGITS_MIN..=DIGITS_MAX).contains(&text.len()) && text.chars().all(|c| c.is_ascii_hexdigit());
        if !is_good {
            let shown: String = text.chars().take(DIGITS_MAX).collect();
            let message =
                format!("'{shown}' is no beginning of a key; give {DIGITS_MIN} to {DIGITS_MAX} hexadecimal digits");
            return Err(Error::new(ErrorKind::InvalidInput, message));
        }
        Ok(Self(text.to_ascii_lowercase()))
    }
}

impl fmt::Display for KeyPrefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Blocks in DRAM: those that every field of it means.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct BlockChoice {
    /// Those of these namespaces; of all if none is given.
    pub namespaces: Vec<NamespaceId>,
    /// The block with this key and all that continue it, if given.
    pub prefix: Option<KeyPrefix>,
    /// Those that were neither saved, loaded nor brought to DRAM for so long, if given; to the second.
    pub unused_for: Option<Duration>,
}

impl BlockChoice {
    /// All blocks of these namespaces; of all if none is given.
    pub fn of(namespaces: &[NamespaceId]) -> Self {
        Self { namespaces: namespaces.to_vec(), ..Self::default() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_named_by_its_first_digits() {
        let key = BlockKey::from_bytes(std::array::from_fn(|at| (at * 37) as u8));
        let text = key.to_string();
        for digits in DIGITS_MIN..=DIGITS_MAX {
            let prefix: KeyPrefix = text[..digits].to_uppercase().parse().expect("digits");
            assert!(prefix.begins(&key) && !prefix.begins(&BlockKey::ROOT), "{digits}");
        }
        for bad in ["", "0123456", "0123456g", "ä0123456", &"0".repeat(65)] {
            let error = bad.parse::<KeyPrefix>().expect_err(bad);
            assert!(error.kind() == ErrorKind::InvalidInput && error.to_string().contains("8 to 64"), "{error}");
        }
    }
}
