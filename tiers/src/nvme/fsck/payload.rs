//! Decodes the payloads of a region's records, piece by piece: a checksum says that the bytes are those that were written,
//! not that they were right when they were.

use std::collections::HashMap;

use super::Check;
use crate::codec::{Codec, Decoder};
use crate::error::{Error, ErrorKind, Result};
use crate::nvme::drive::Drive;
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
        for found in found.filter(|found| found.is_intact && found.header.codec != Codec::Stored.number()) {
            match decode(&self.drive, &mut self.decoder, &found.header) {
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
