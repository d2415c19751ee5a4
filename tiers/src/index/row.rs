//! The rows of the durable index, one file for each: how they lie in RocksDB. Keys are big-endian, so that RocksDB keeps
//! them in the order of their numbers; values are fixed-width little-endian and start with a version byte. Rows carry
//! no checksum of their own: RocksDB checks every block of its files and every entry of its log.

mod index_row;
mod namespace_end;
mod namespace_row;
mod region_mark;

pub use index_row::IndexRow;
pub(super) use index_row::{decode_id, encode_id};
pub use namespace_end::NamespaceEnd;
pub use namespace_row::NamespaceRow;
pub use region_mark::RegionMark;

use crate::error::{Error, ErrorKind, Result};

/// Reads the fields of a row one after the other; the first short or wrong one ends it.
struct Fields<'a> {
    row: &'static str,
    bytes: &'a [u8],
    left: &'a [u8],
}

impl<'a> Fields<'a> {
    /// Starts on the bytes of a value, and checks its version byte.
    fn of_value(row: &'static str, bytes: &'a [u8], version: u8) -> Result<Self> {
        let mut fields = Self::of_key(row, bytes);
        match fields.u8()? {
            found if found == version => Ok(fields),
            found if found > version => Err(Error::new(
                ErrorKind::NewerFormat,
                format!("a {row} of version {found} in the index; this build reads version {version}: update it"),
            )),
            found => Err(fields.corrupt(format!("version {found}, which there never was"))),
        }
    }

    fn of_key(row: &'static str, bytes: &'a [u8]) -> Self {
        Self { row, bytes, left: bytes }
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let (taken, left) = self.left.split_first_chunk().ok_or_else(|| self.corrupt("it is too short".into()))?;
        self.left = left;
        Ok(*taken)
    }

    fn u8(&mut self) -> Result<u8> {
        Ok(u8::from_le_bytes(self.array()?))
    }

    fn u16(&mut self) -> Result<u16> {
        Ok(u16::from_le_bytes(self.array()?))
    }

    fn u32(&mut self) -> Result<u32> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    fn u64(&mut self) -> Result<u64> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    /// Bytes that are kept for later use and must be zero until then.
    fn zeros<const N: usize>(&mut self) -> Result<()> {
        if self.array::<N>()? == [0; N] { Ok(()) } else { Err(self.corrupt("a reserved byte is not zero".into())) }
    }

    /// All that is left.
    fn rest(&mut self) -> &'a [u8] {
        std::mem::take(&mut self.left)
    }

    fn end(&self) -> Result<()> {
        if self.left.is_empty() { Ok(()) } else { Err(self.corrupt(format!("{} bytes too many", self.left.len()))) }
    }

    fn corrupt(&self, why: String) -> Error {
        Error::new(ErrorKind::Corrupt, format!("a damaged {} in the index: {why}", self.row))
            .with("bytes", self.bytes.len())
    }
}
