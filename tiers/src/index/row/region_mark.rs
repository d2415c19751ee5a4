//! The row of one region: how far the index covers it. Key, 4 bytes: region u32 big-endian. Value, 24 bytes: version u8,
//! 3 reserved, page u32, generation u64, sequence u64.

use super::Fields;
use crate::error::Result;
use crate::index::Location;

const VERSION: u8 = 1;
const VALUE_BYTES: usize = 24;

/// How far a region is covered by the index: the records before `page` of `generation` are all in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RegionMark {
    /// The region; below [`Location::REGIONS_MAX`].
    pub region: u32,
    /// The generation that this is said of. Rows of the region with a smaller one are dead.
    pub generation: u64,
    /// The first page, of 4096 bytes, that is not covered; at most [`Location::PAGES_MAX`].
    pub page: u32,
    /// The largest sequence among the records that are covered.
    pub sequence: u64,
}

impl RegionMark {
    pub(in crate::index) fn encode_key(&self) -> [u8; 4] {
        self.region.to_be_bytes()
    }

    pub(in crate::index) fn encode(&self) -> [u8; VALUE_BYTES] {
        let mut value = [0; VALUE_BYTES];
        value[0] = VERSION;
        value[4..8].copy_from_slice(&self.page.to_le_bytes());
        value[8..16].copy_from_slice(&self.generation.to_le_bytes());
        value[16..24].copy_from_slice(&self.sequence.to_le_bytes());
        value
    }

    /// Reads a row.
    ///
    /// # Errors
    /// `NewerFormat` for a later version, `Corrupt` for everything that [`RegionMark::encode`] does not write.
    pub(in crate::index) fn decode(key: &[u8], value: &[u8]) -> Result<Self> {
        let mut fields = Fields::of_key("region key", key);
        let region = u32::from_be_bytes(fields.array()?);
        fields.end()?;
        let mut fields = Fields::of_value("region row", value, VERSION)?;
        fields.zeros::<3>()?;
        let mark = Self { region, page: fields.u32()?, generation: fields.u64()?, sequence: fields.u64()? };
        fields.end()?;
        if mark.region >= Location::REGIONS_MAX || mark.page > Location::PAGES_MAX {
            return Err(fields.corrupt(format!("{mark:?} is outside its limits")));
        }
        Ok(mark)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;
    use proptest::prelude::*;

    const SAMPLE: RegionMark =
        RegionMark { region: 0x0002_0304, generation: 0x1112_1314_1516_1718, page: 0x2122, sequence: 0x3132 };

    fn kind_of(key: &[u8], value: &[u8]) -> Option<ErrorKind> {
        RegionMark::decode(key, value).err().map(|error| error.kind())
    }

    /// The bytes are part of the on-disk format: they may only change with the version byte.
    #[test]
    fn the_bytes_are_frozen() {
        assert_eq!(SAMPLE.encode_key(), [0, 2, 3, 4]);
        assert_eq!(
            SAMPLE.encode(),
            [
                1, 0, 0, 0, 0x22, 0x21, 0, 0, 0x18, 0x17, 0x16, 0x15, 0x14, 0x13, 0x12, 0x11, 0x32, 0x31, 0, 0, 0, 0,
                0, 0
            ]
        );
    }

    #[test]
    fn what_was_never_written_is_refused() {
        let (key, good) = (SAMPLE.encode_key(), SAMPLE.encode());
        assert_eq!(kind_of(&key, &good), None);
        let with = |at: usize, byte: u8| {
            let mut bytes = good;
            bytes[at] = byte;
            kind_of(&key, &bytes)
        };
        assert_eq!(with(0, 7), Some(ErrorKind::NewerFormat));
        assert_eq!(with(0, 0), Some(ErrorKind::Corrupt));
        assert_eq!(with(3, 1), Some(ErrorKind::Corrupt));
        assert_eq!(with(7, 1), Some(ErrorKind::Corrupt));
        assert_eq!(kind_of(&[0xff; 4], &good), Some(ErrorKind::Corrupt));
        assert_eq!(kind_of(&key[..3], &good), Some(ErrorKind::Corrupt));
        assert_eq!(kind_of(&key, &good[..23]), Some(ErrorKind::Corrupt));
    }

    proptest! {
        #[test]
        fn it_round_trips(region in 0..Location::REGIONS_MAX, generation: u64, page in 0..=Location::PAGES_MAX,
            sequence: u64)
        {
            let mark = RegionMark { region, generation, page, sequence };
            prop_assert_eq!(RegionMark::decode(&mark.encode_key(), &mark.encode()).expect("a mark"), mark);
        }
    }
}
