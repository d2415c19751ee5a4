//! Reads a pack: the manifest is checked as a whole before any block is believed, and each block against it.

use std::fs::File;
use std::io::{BufReader, Read};
use std::os::unix::fs::FileExt;
use std::path::Path;

use pegaflow_engine::{Error, ErrorKind, ImportBlock, Result};

use super::format::{ENTRY_BYTES, Entry, FOOTER_BYTES, Footer, HEADER_BYTES, Head, check_header, corrupt};
use super::keys;

/// The largest block of a store.
const PAYLOAD_BYTES_MAX: u32 = 1 << 30;

/// A pack whose manifest is what was written, and if it is signed, what was signed.
pub struct Pack {
    file: File,
    pub head: Head,
    pub footer: Footer,
    pub file_bytes: u64,
    entries_offset: u64,
}

impl Pack {
    /// Opens a pack and checks header, manifest and signature.
    ///
    /// # Errors
    /// `ForeignFormat`, `NewerFormat`, `Corrupt`, `NotFound`, `Io`.
    pub fn open(path: &Path) -> Result<Self> {
        let io = |error| super::cannot_read(path, error);
        let file = File::open(path).map_err(io)?;
        let file_bytes = file.metadata().map_err(io)?.len();
        let mut first = [0; HEADER_BYTES];
        if file_bytes < (HEADER_BYTES + FOOTER_BYTES) as u64 {
            return Err(Error::new(ErrorKind::ForeignFormat, "this is no pack of PegaFlow: it is too short"));
        }
        file.read_exact_at(&mut first, 0).map_err(io)?;
        check_header(&first)?;
        let mut last = [0; FOOTER_BYTES];
        file.read_exact_at(&mut last, file_bytes - FOOTER_BYTES as u64).map_err(io)?;
        let footer = Footer::decode(&last, file_bytes)?;
        let mut hasher = blake3::Hasher::new();
        hasher.update(&first);
        let mut manifest = At { file: &file, offset: footer.manifest_offset }.take(footer.manifest_bytes);
        let mut head = vec![0; footer.head_bytes()?];
        manifest.read_exact(&mut head).map_err(io)?;
        hasher.update(&head);
        std::io::copy(&mut BufReader::with_capacity(1 << 20, manifest), &mut hasher).map_err(io)?;
        if hasher.finalize().as_bytes() != &footer.digest {
            return Err(corrupt("the manifest is not what was written: the pack was changed or damaged"));
        }
        if footer.is_signed() && !keys::is_right(&footer) {
            return Err(corrupt("the signature is not the signer's: the pack was changed"));
        }
        let (length, text) = head.split_at(4);
        if length != (text.len() as u32).to_le_bytes() {
            return Err(corrupt("the manifest's head has another length than it says"));
        }
        let head = Head::decode(text)?;
        let entries_offset = footer.manifest_offset + footer.head_bytes()? as u64;
        Ok(Self { file, head, footer, file_bytes, entries_offset })
    }

    /// The blocks in their order.
    pub fn blocks(&self) -> Blocks<'_> {
        let entries = At { file: &self.file, offset: self.entries_offset };
        let entries = BufReader::with_capacity(1 << 20, entries.take(self.footer.entries * ENTRY_BYTES as u64));
        Blocks { pack: self, entries, left: self.footer.entries, stored: Vec::new() }
    }
}

/// Goes through the blocks of a pack.
pub struct Blocks<'a> {
    pack: &'a Pack,
    entries: BufReader<std::io::Take<At<'a>>>,
    left: u64,
    stored: Vec<u8>,
}

impl Blocks<'_> {
    /// The next block, checked against the manifest; `None` after the last.
    ///
    /// # Errors
    /// `Corrupt`, `Io`.
    pub fn next_block(&mut self) -> Result<Option<ImportBlock>> {
        if self.left == 0 {
            return Ok(None);
        }
        let io = |error| Error::from_io("cannot read the pack", error);
        let mut bytes = [0; ENTRY_BYTES];
        self.entries.read_exact(&mut bytes).map_err(io)?;
        self.left -= 1;
        let entry = Entry::decode(&bytes, self.pack.footer.manifest_offset)?;
        let is_of_group = |it: &&pegaflow_engine::GroupGeometry| {
            it.group == entry.group && it.block_bytes == u64::from(entry.payload_bytes)
        };
        if entry.payload_bytes > PAYLOAD_BYTES_MAX || !self.pack.head.groups.iter().any(|it| is_of_group(&it)) {
            return Err(corrupt("the manifest has a block of a size that its group does not have"));
        }
        // At most what the file has, and a block.
        self.stored.resize(entry.stored_bytes as usize, 0);
        self.pack.file.read_exact_at(&mut self.stored, entry.offset).map_err(io)?;
        let number = self.pack.footer.entries - self.left;
        // Before anything looks into them.
        if blake3::hash(&self.stored).as_bytes() != &entry.digest {
            return Err(corrupt(format!("block {number} is not what was packed: the pack was changed or damaged")));
        }
        let payload = match entry.is_zstd {
            false => self.stored.clone(),
            true => zstd::bulk::decompress(&self.stored, entry.payload_bytes as usize)
                .map_err(|error| corrupt(format!("a block can not be decompressed ({error})")))?,
        };
        if payload.len() as u64 != u64::from(entry.payload_bytes) {
            return Err(corrupt(format!("block {number} decompresses to another length than it says")));
        }
        Ok(Some(ImportBlock {
            group: entry.group,
            shard: entry.shard,
            key: entry.key,
            parent: entry.parent,
            depth: entry.depth,
            payload,
        }))
    }
}

/// Reads a file from a place on without a cursor of its own.
struct At<'a> {
    file: &'a File,
    offset: u64,
}

impl Read for At<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let read = self.file.read_at(buffer, self.offset)?;
        self.offset += read as u64;
        Ok(read)
    }
}

#[cfg(feature = "fuzzing")]
pub(crate) mod fuzzing {
    //! Manifests that are made of any bytes.

    use std::path::Path;

    use pegaflow_engine::Result;

    use super::super::format::{ENTRY_BYTES, Footer, HEADER_BYTES, Head, header};
    use super::Pack;

    /// Writes a file with these bytes as manifest, as long a head as the first two of them say, and a footer that has all
    /// digests right; then reads it to its end. How many blocks were good.
    ///
    /// # Errors
    /// As of [`Pack::open`] and reading the blocks.
    pub(crate) fn read_manifest(scratch: &Path, bytes: &[u8]) -> Result<u64> {
        let io = |error| super::super::cannot_read(scratch, error);
        let (head_bytes, manifest) = bytes.split_at_checked(2).unwrap_or((&[0, 0], bytes));
        let head_bytes = head_bytes.iter().fold(0, |number, byte| (number << 8) + usize::from(*byte));
        let entries = manifest.len().saturating_sub(head_bytes) / ENTRY_BYTES;
        // Blocks are read from there: the manifest stands for them too.
        let mut file = [&header()[..], manifest, manifest].concat();
        let mut footer = Footer {
            manifest_offset: (HEADER_BYTES + manifest.len()) as u64,
            manifest_bytes: manifest.len() as u64,
            entries: entries as u64,
            digest: [0; 32],
            signer: [0; 32],
            signature: [0; 64],
        };
        footer.digest = *blake3::Hasher::new().update(&header()).update(manifest).finalize().as_bytes();
        file.extend_from_slice(&footer.encode());
        std::fs::write(scratch, &file).map_err(io)?;
        let pack = Pack::open(scratch)?;
        let (mut blocks, mut good) = (pack.blocks(), 0);
        while blocks.next_block()?.is_some() {
            good += 1;
        }
        Ok(good)
    }

    /// Manifests to begin with: none, and one block.
    pub(crate) fn examples() -> Vec<Vec<u8>> {
        let head = Head::example().encode();
        let mut entry = [0; ENTRY_BYTES];
        let stored = &head[..head.len().min(64)];
        entry[64..96].copy_from_slice(blake3::hash(stored).as_bytes());
        entry[96..104].copy_from_slice(&(HEADER_BYTES as u64).to_le_bytes());
        entry[104..108].copy_from_slice(&64_u32.to_le_bytes());
        entry[108..112].copy_from_slice(&64_u32.to_le_bytes());
        let length = (head.len() as u16).to_be_bytes();
        vec![[&length[..], &head].concat(), [&length[..], &head, &entry].concat()]
    }
}
