//! The row of one record. Key, 40 bytes: namespace u32, group u16, shard u16, all big-endian, key 32. Value, 80 bytes:
//! version u8, reserved u8, kind u16, depth u32, region u32, page u32, pages u32, reserved u32, generation u64,
//! payload bytes u64, sequence u64, parent 32.

use super::Fields;
use crate::block::{BlockKey, NamespaceHandle, RecordId, RecordKind};
use crate::error::Result;
use crate::index::Location;

const VERSION: u8 = 1;
const KEY_BYTES: usize = 40;
const VALUE_BYTES: usize = 80;

/// What the durable index knows of one record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IndexRow {
    /// Which record.
    pub id: RecordId,
    /// The key of the block before it, [`BlockKey::ROOT`] for none.
    pub parent: BlockKey,
    /// Its place in the chain, from 0.
    pub depth: u32,
    /// Where it lies, with the full generation.
    pub location: Location,
    /// The length of its payload in bytes.
    pub payload_bytes: u64,
    /// Its number in the order of all appends to the store.
    pub sequence: u64,
    /// What it is for.
    pub kind: RecordKind,
}

/// The key under which a record's row stands.
pub(in crate::index) fn encode_id(id: &RecordId) -> [u8; KEY_BYTES] {
    let mut key = [0; KEY_BYTES];
    key[0..4].copy_from_slice(&id.namespace.0.to_be_bytes());
    key[4..6].copy_from_slice(&id.group.to_be_bytes());
    key[6..8].copy_from_slice(&id.shard.to_be_bytes());
    key[8..40].copy_from_slice(id.key.as_bytes());
    key
}

/// The reverse of [`encode_id`].
pub(in crate::index) fn decode_id(bytes: &[u8]) -> Result<RecordId> {
    let mut fields = Fields::of_key("record key", bytes);
    let id = RecordId {
        namespace: NamespaceHandle(u32::from_be_bytes(fields.array()?)),
        group: u16::from_be_bytes(fields.array()?),
        shard: u16::from_be_bytes(fields.array()?),
        key: BlockKey::from_bytes(fields.array()?),
    };
    fields.end()?;
    Ok(id)
}

impl IndexRow {
    pub(in crate::index) fn encode(&self) -> [u8; VALUE_BYTES] {
        let mut value = [0; VALUE_BYTES];
        value[0] = VERSION;
        value[2..4].copy_from_slice(&(self.kind as u16).to_le_bytes());
        value[4..8].copy_from_slice(&self.depth.to_le_bytes());
        value[8..12].copy_from_slice(&self.location.region.to_le_bytes());
        value[12..16].copy_from_slice(&self.location.page.to_le_bytes());
        value[16..20].copy_from_slice(&self.location.pages.to_le_bytes());
        value[24..32].copy_from_slice(&self.location.generation.to_le_bytes());
        value[32..40].copy_from_slice(&self.payload_bytes.to_le_bytes());
        value[40..48].copy_from_slice(&self.sequence.to_le_bytes());
        value[48..80].copy_from_slice(self.parent.as_bytes());
        value
    }

    /// Reads the value that stands under the key of `id`.
    ///
    /// # Errors
    /// `NewerFormat` for a later version, `Corrupt` for everything that [`IndexRow::encode`] does not write.
    pub(in crate::index) fn decode(id: RecordId, bytes: &[u8]) -> Result<Self> {
        let mut fields = Fields::of_value("record row", bytes, VERSION)?;
        fields.zeros::<1>()?;
        let kind = fields.u16()?;
        let kind = RecordKind::from_u16(kind).ok_or_else(|| fields.corrupt(format!("kind {kind} is not known")))?;
        let depth = fields.u32()?;
        let (region, page, pages) = (fields.u32()?, fields.u32()?, fields.u32()?);
        fields.zeros::<4>()?;
        let location = Location { region, page, pages, generation: fields.u64()? };
        if !location.is_valid() {
            return Err(fields.corrupt(format!("{location:?} is outside its limits")));
        }
        let (payload_bytes, sequence) = (fields.u64()?, fields.u64()?);
        let parent = BlockKey::from_bytes(fields.array()?);
        fields.end()?;
        Ok(Self { id, parent, depth, location, payload_bytes, sequence, kind })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;
    use proptest::prelude::*;

    fn sample() -> IndexRow {
        IndexRow {
            id: RecordId {
                namespace: NamespaceHandle(0x0102_0304),
                group: 0x0506,
                shard: 0x0708,
                key: BlockKey::from_bytes([0xaa; 32]),
            },
            parent: BlockKey::from_bytes([0xbb; 32]),
            depth: 0x1112_1314,
            location: Location { region: 0x2_1222, generation: 0x3132_3334_3536_3738, page: 0x4142, pages: 0x5152 },
            payload_bytes: 0x6162_6364_6566_6768,
            sequence: 0x7172_7374_7576_7778,
            kind: RecordKind::Object,
        }
    }

    fn kind_of(bytes: &[u8]) -> Option<ErrorKind> {
        IndexRow::decode(sample().id, bytes).err().map(|error| error.kind())
    }

    /// The bytes are part of the on-disk format: they may only change with the version byte.
    #[test]
    fn the_bytes_are_frozen() {
        let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
        assert_eq!(hex(&encode_id(&sample().id)), format!("0102030405060708{}", "aa".repeat(32)));
        let expected = [
            "01000200",
            "14131211",
            "22120200",
            "42410000",
            "52510000",
            "00000000",
            "3837363534333231",
            "6867666564636261",
            "7877767574737271",
        ];
        assert_eq!(hex(&sample().encode()), format!("{}{}", expected.concat(), "bb".repeat(32)));
    }

    #[test]
    fn what_was_never_written_is_refused() {
        let good = sample().encode();
        assert_eq!(kind_of(&good), None);
        let with = |at: usize, byte: u8| {
            let mut bytes = good;
            bytes[at] = byte;
            kind_of(&bytes)
        };
        assert_eq!(with(0, 2), Some(ErrorKind::NewerFormat));
        assert_eq!(with(0, 0), Some(ErrorKind::Corrupt));
        assert_eq!(with(1, 1), Some(ErrorKind::Corrupt));
        assert_eq!(with(2, 9), Some(ErrorKind::Corrupt));
        assert_eq!(with(11, 1), Some(ErrorKind::Corrupt));
        assert_eq!(with(20, 1), Some(ErrorKind::Corrupt));
        assert_eq!(kind_of(&good[..79]), Some(ErrorKind::Corrupt));
        assert_eq!(kind_of(&[good.as_slice(), &[0]].concat()), Some(ErrorKind::Corrupt));
        assert_eq!(kind_of(&[]), Some(ErrorKind::Corrupt));
        assert_eq!(decode_id(&[0; 39]).err().map(|error| error.kind()), Some(ErrorKind::Corrupt));
    }

    proptest! {
        #[test]
        fn it_round_trips(
            namespace: u32, group: u16, shard: u16, key: [u8; 32], parent: [u8; 32], depth: u32,
            region in 0..Location::REGIONS_MAX, page in 0..Location::PAGES_MAX, pages in 0..Location::PAGES_MAX,
            generation: u64, payload_bytes: u64, sequence: u64, kind in 1u16..=3,
        ) {
            let key = BlockKey::from_bytes(key);
            let row = IndexRow {
                id: RecordId { namespace: NamespaceHandle(namespace), group, shard, key },
                parent: BlockKey::from_bytes(parent),
                depth,
                location: Location { region, generation, page, pages },
                payload_bytes,
                sequence,
                kind: RecordKind::from_u16(kind).expect("a kind"),
            };
            let id = decode_id(&encode_id(&row.id)).expect("a key");
            prop_assert_eq!(IndexRow::decode(id, &row.encode()).expect("a row"), row);
        }

        #[test]
        fn no_bytes_make_it_panic(bytes: Vec<u8>) {
            let _ = IndexRow::decode(sample().id, &bytes);
            let _ = decode_id(&bytes);
        }
    }
}
