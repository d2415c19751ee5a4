//! The end of one namespace, in the index: the second copy of what the file of namespaces says. Key: `ended/` and the
//! handle as text, among the named values. Value, 48 bytes: version u8, zero 7, id 32, sequence u64.

use super::Fields;
use crate::block::{NamespaceHandle, NamespaceId};
use crate::error::Result;

const VERSION: u8 = 1;
const VALUE_BYTES: usize = 48;
const PREFIX: &str = "ended/";

/// The end of a namespace that was purged: nothing that was saved under its number is found any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NamespaceEnd {
    /// Its number, which is never given again.
    pub handle: NamespaceHandle,
    /// The digest of its descriptor, which may be registered again and then has another number.
    pub id: NamespaceId,
    /// Records of this digest up to this sequence are dead, wherever they still lie.
    pub sequence: u64,
}

impl NamespaceEnd {
    /// What the names of all ends begin with.
    pub(in crate::index) const NAMES: &[u8] = PREFIX.as_bytes();

    pub(in crate::index) fn encode_key(&self) -> Vec<u8> {
        format!("{PREFIX}{}", self.handle.0).into_bytes()
    }

    pub(in crate::index) fn encode(&self) -> [u8; VALUE_BYTES] {
        let mut value = [0; VALUE_BYTES];
        value[0] = VERSION;
        value[8..40].copy_from_slice(self.id.as_bytes());
        value[40..48].copy_from_slice(&self.sequence.to_le_bytes());
        value
    }

    /// Reads one.
    ///
    /// # Errors
    /// `NewerFormat` for a later version, `Corrupt` for everything that [`NamespaceEnd::encode`] does not write.
    pub(in crate::index) fn decode(key: &[u8], value: &[u8]) -> Result<Self> {
        let mut fields = Fields::of_value("end of a namespace", value, VERSION)?;
        fields.zeros::<7>()?;
        let (id, sequence) = (NamespaceId::from_bytes(fields.array()?), fields.u64()?);
        fields.end()?;
        let handle = std::str::from_utf8(key).ok().and_then(|key| key.strip_prefix(PREFIX)?.parse().ok());
        let handle = handle.map(NamespaceHandle).ok_or_else(|| fields.corrupt("its name has no number".into()))?;
        Ok(Self { handle, id, sequence })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;

    /// The bytes are part of the on-disk format: they may only change with the version byte.
    #[test]
    fn the_bytes_are_frozen() {
        let end = NamespaceEnd { handle: NamespaceHandle(300), id: NamespaceId::from_bytes([9; 32]), sequence: 0x0102 };
        let mut expected = vec![1, 0, 0, 0, 0, 0, 0, 0];
        expected.extend([9; 32]);
        expected.extend([2, 1, 0, 0, 0, 0, 0, 0]);
        assert_eq!((end.encode_key(), end.encode().to_vec()), (b"ended/300".to_vec(), expected.clone()));
        assert_eq!(NamespaceEnd::decode(b"ended/300", &expected).map_err(|e| e.to_string()), Ok(end));
        let kind = |key: &[u8], value: &[u8]| NamespaceEnd::decode(key, value).err().map(|error| error.kind());
        assert_eq!(kind(b"ended/x", &expected), Some(ErrorKind::Corrupt));
        assert_eq!(kind(b"ended/300", &expected[..47]), Some(ErrorKind::Corrupt));
        expected[0] = 2;
        assert_eq!(kind(b"ended/300", &expected), Some(ErrorKind::NewerFormat));
    }
}
