//! The row of one namespace. Key, 4 bytes: handle u32 big-endian. Value: version u8, reserved u8, groups u16, descriptor
//! bytes u32, id 32; then for each group 16 bytes: group u16, shards u16, reserved u32, block bytes u64; then the
//! descriptor as canonical JSON.

use super::Fields;
use crate::block::{GroupGeometry, NamespaceDescriptor, NamespaceHandle, NamespaceId};
use crate::error::{Error, ErrorKind, Result};

const VERSION: u8 = 1;
const HEAD_BYTES: usize = 40;
const GROUP_BYTES: usize = 16;
/// More groups than any model has.
const GROUPS_MAX: usize = 1024;
/// What [`NamespaceDescriptor::from_json`] reads.
const DESCRIPTOR_BYTES_MAX: usize = 64 * 1024;

/// A namespace of the store: its number, what it stands for, and the sizes of its records.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NamespaceRow {
    /// Its number in this store.
    pub handle: NamespaceHandle,
    /// The digest of the descriptor.
    pub id: NamespaceId,
    /// What decides whether bytes are exchangeable; at most 64 KiB as JSON.
    pub descriptor: NamespaceDescriptor,
    /// The geometry of each of its groups; at most 1024. None for named objects.
    pub groups: Vec<GroupGeometry>,
}

impl NamespaceRow {
    pub(in crate::index) fn encode_key(&self) -> [u8; 4] {
        self.handle.0.to_be_bytes()
    }

    /// The value.
    ///
    /// # Errors
    /// `InvalidInput` for what could not be read back: too many groups, too large a descriptor, an id of another one.
    pub(in crate::index) fn encode(&self) -> Result<Vec<u8>> {
        let refuse = |why: String| Err(Error::new(ErrorKind::InvalidInput, why));
        let descriptor = self.descriptor.to_json();
        if descriptor.len() > DESCRIPTOR_BYTES_MAX {
            return refuse(format!(
                "a namespace descriptor of {} bytes; the limit is {DESCRIPTOR_BYTES_MAX}",
                descriptor.len()
            ));
        }
        if self.groups.len() > GROUPS_MAX {
            return refuse(format!("a namespace of {} groups; the limit is {GROUPS_MAX}", self.groups.len()));
        }
        if self.id != self.descriptor.id() {
            return refuse(format!("the namespace id {} is not that of its descriptor", self.id));
        }
        // Both lengths were checked above: the casts lose nothing.
        let mut value = Vec::with_capacity(HEAD_BYTES + self.groups.len() * GROUP_BYTES + descriptor.len());
        value.extend([VERSION, 0]);
        value.extend((self.groups.len() as u16).to_le_bytes());
        value.extend((descriptor.len() as u32).to_le_bytes());
        value.extend(self.id.as_bytes());
        for group in &self.groups {
            value.extend(group.group.to_le_bytes());
            value.extend(group.shards.to_le_bytes());
            value.extend([0; 4]);
            value.extend(group.block_bytes.to_le_bytes());
        }
        value.extend(descriptor.as_bytes());
        Ok(value)
    }

    /// Reads a row.
    ///
    /// # Errors
    /// `NewerFormat` for a later version, `Corrupt` for everything that [`NamespaceRow::encode`] does not write.
    pub(in crate::index) fn decode(key: &[u8], value: &[u8]) -> Result<Self> {
        let mut fields = Fields::of_key("namespace key", key);
        let handle = NamespaceHandle(u32::from_be_bytes(fields.array()?));
        fields.end()?;
        let mut fields = Fields::of_value("namespace row", value, VERSION)?;
        fields.zeros::<1>()?;
        let count = usize::from(fields.u16()?);
        let descriptor_bytes = fields.u32()?;
        let id = NamespaceId::from_bytes(fields.array()?);
        if count > GROUPS_MAX {
            return Err(fields.corrupt(format!("{count} groups")));
        }
        let mut groups = Vec::with_capacity(count);
        for _ in 0..count {
            let (group, shards) = (fields.u16()?, fields.u16()?);
            fields.zeros::<4>()?;
            groups.push(GroupGeometry { group, shards, block_bytes: fields.u64()? });
        }
        let json = fields.rest();
        if json.len() as u64 != u64::from(descriptor_bytes) {
            return Err(fields.corrupt(format!("a descriptor of {} bytes, not {descriptor_bytes}", json.len())));
        }
        let json = std::str::from_utf8(json).map_err(|error| fields.corrupt(error.to_string()))?;
        let descriptor = NamespaceDescriptor::from_json(json).map_err(|error| fields.corrupt(error.to_string()))?;
        if descriptor.id() != id {
            return Err(fields.corrupt(format!("its id {id} is not that of its descriptor")));
        }
        Ok(Self { handle, id, descriptor, groups })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sample() -> NamespaceRow {
        let descriptor = NamespaceDescriptor::new().with("model", "m").with("dtype", "bf16");
        NamespaceRow {
            handle: NamespaceHandle(0x0102_0304),
            id: descriptor.id(),
            descriptor,
            groups: vec![GroupGeometry { group: 0x1112, block_bytes: 0x2122_2324, shards: 0x31 }],
        }
    }

    fn kind_of(value: &[u8]) -> Option<ErrorKind> {
        NamespaceRow::decode(&[0; 4], value).err().map(|error| error.kind())
    }

    /// The bytes are part of the on-disk format: they may only change with the version byte.
    #[test]
    fn the_bytes_are_frozen() {
        let json = br#"{"dtype":"bf16","model":"m"}"#;
        let mut expected = vec![1, 0, 1, 0, json.len() as u8, 0, 0, 0];
        expected.extend(sample().descriptor.id().as_bytes());
        expected.extend([0x12, 0x11, 0x31, 0, 0, 0, 0, 0, 0x24, 0x23, 0x22, 0x21, 0, 0, 0, 0]);
        expected.extend(json);
        assert_eq!(sample().encode().expect("inside the limits"), expected);
        assert_eq!(sample().encode_key(), [1, 2, 3, 4]);
    }

    #[test]
    fn what_was_never_written_is_refused() {
        let good = sample().encode().expect("inside the limits");
        assert_eq!(kind_of(&good), None);
        for at in 0..good.len() {
            let mut bytes = good.clone();
            bytes[at] ^= 0x10;
            let group = 40..44;
            let block_bytes = 48..56;
            match at {
                0 => assert_eq!(kind_of(&bytes), Some(ErrorKind::NewerFormat)),
                // The geometry has no second copy to compare with.
                _ if group.contains(&at) || block_bytes.contains(&at) => assert_eq!(kind_of(&bytes), None),
                _ => assert_eq!(kind_of(&bytes), Some(ErrorKind::Corrupt), "byte {at}"),
            }
            assert_eq!(kind_of(&good[..at]), Some(ErrorKind::Corrupt), "cut at {at}");
        }
    }

    #[test]
    fn what_could_not_be_read_back_is_not_written() {
        let refused = |row: &NamespaceRow| row.encode().err().map(|error| error.kind());
        let large = NamespaceDescriptor::new().with("model", "m".repeat(DESCRIPTOR_BYTES_MAX));
        assert_eq!(
            refused(&NamespaceRow { id: large.id(), descriptor: large, ..sample() }),
            Some(ErrorKind::InvalidInput)
        );
        let other = NamespaceDescriptor::objects().id();
        assert_eq!(refused(&NamespaceRow { id: other, ..sample() }), Some(ErrorKind::InvalidInput));
        let groups = vec![GroupGeometry { group: 0, block_bytes: 16, shards: 1 }; GROUPS_MAX + 1];
        assert_eq!(refused(&NamespaceRow { groups, ..sample() }), Some(ErrorKind::InvalidInput));
    }

    proptest! {
        #[test]
        fn it_round_trips(handle: u32, fields: Vec<(String, String)>, groups: Vec<(u16, u64, u16)>) {
            let descriptor =
                fields.into_iter().fold(NamespaceDescriptor::new(), |all, (name, value)| all.with(name, value));
            let row = NamespaceRow {
                handle: NamespaceHandle(handle),
                id: descriptor.id(),
                descriptor,
                groups: groups
                    .into_iter()
                    .map(|(group, block_bytes, shards)| GroupGeometry { group, block_bytes, shards })
                    .collect(),
            };
            let value = row.encode().expect("inside the limits");
            prop_assert_eq!(NamespaceRow::decode(&row.encode_key(), &value).expect("a row"), row);
        }

        #[test]
        fn no_bytes_make_it_panic(key: Vec<u8>, value: Vec<u8>) {
            let _ = NamespaceRow::decode(&key, &value);
        }
    }
}
