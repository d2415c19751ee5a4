//! Decodes the payloads of a region's records, piece by piece: a checksum says that the bytes are those that were written,
//! not that they were right when they were.

use std::collections::HashMap;

use super::Check;
use crate::codec::{Codec, Decoder};
use crate::error::{Error, ErrorKind, Result};
use crate::nvme::drive::Drive;
use crate::nvme::encryption::{Keyring, Seal};
use crate::nvme::page::PAGE_BYTES;
use crate::nvme::record_header::RecordHeader;
use crate::nvme::scan::Found;

impl Check {
    /// Decodes every intact record that is encoded; by its page, why one can not be. Such a one is not intact afterwards.
    pub(super) fn decode_all<'a>(
        &mut self,
        found: impl Iterator<Item = &'a mut Found>,
    ) -> Result<HashMap<u32, String>> {
        let mut undecodable = HashMap::new();
        let is_encoded = |header: &RecordHeader| header.codec != Codec::Stored.number() || header.seal.is_some();
        for found in found.filter(|found| found.is_intact && is_encoded(&found.header)) {
            let decoded = match (&self.keyring, &found.header.seal) {
                (Some(keyring), Some(seal)) => unseal(&self.drive, keyring, seal, &mut self.decoder, &found.header),
                _ => decode(&self.drive, &mut self.decoder, &found.header),
            };
            match decoded {
                // Its key was destroyed: nobody can read it, and nothing is wrong with it.
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                Ok(()) => {}
                Err(error) if matches!(error.kind(), ErrorKind::Corrupt | ErrorKind::Io) => {
                    found.is_intact = false;
                    undecodable.insert(found.header.location.page, error.to_string());
                }
                Err(error) => return Err(error),
            }
        }
        Ok(undecodable)
    }
}

/// Decrypts a record, and decodes what comes out.
fn unseal(drive: &Drive, keyring: &Keyring, seal: &Seal, decoder: &mut Decoder, header: &RecordHeader) -> Result<()> {
    let key = keyring.numbered(seal.key)?;
    let mut image = drive.read(header.location.region, header.location.page, header.location.pages)?;
    let (_, raw_xxh3) = key.open(&header.subject(), &header.sealed_as(), seal, image.as_mut_slice())?;
    let codec = Codec::from_number(header.codec).ok_or_else(|| {
        Error::new(ErrorKind::Corrupt, format!("the record has codec {}, which is not known", header.codec))
    })?;
    if codec == Codec::Stored {
        return Ok(());
    }
    let frame = image.as_slice().get(PAGE_BYTES..PAGE_BYTES + header.stored_bytes as usize).unwrap_or_default();
    match decoder.decode_each(codec, frame, header.raw_bytes, &mut |_| ())? {
        checksum if checksum == raw_xxh3 => Ok(()),
        checksum => {
            let what = format!("the payload decodes to checksum {checksum:#x}, the record says {raw_xxh3:#x}");
            Err(Error::new(ErrorKind::Corrupt, what))
        }
    }
}

fn decode(drive: &Drive, decoder: &mut Decoder, header: &RecordHeader) -> Result<()> {
    let corrupt = |what: String| Err(Error::new(ErrorKind::Corrupt, what));
    let Some(codec) = Codec::from_number(header.codec) else {
        return corrupt(format!("the record has codec {}, which is not known", header.codec));
    };
    let location = header.location;
    let mut read = |at: usize, out: &mut [u8]| {
        let (first, end) = (at / PAGE_BYTES, (at + out.len()).div_ceil(PAGE_BYTES));
        let pages = drive.read(location.region, location.page + 1 + first as u32, (end - first) as u32)?;
        let from = at - first * PAGE_BYTES;
        out.copy_from_slice(&pages.as_slice()[from..from + out.len()]);
        Ok(())
    };
    match decoder.decode_from(codec, header.stored_bytes as usize, header.raw_bytes, &mut read)? {
        checksum if checksum == header.raw_xxh3 => Ok(()),
        checksum => {
            corrupt(format!("the payload decodes to checksum {checksum:#x}, the record says {:#x}", header.raw_xxh3))
        }
    }
}
