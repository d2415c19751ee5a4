//! Writes a pack: beside its name first, so that a pack under its name is whole.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use pegaflow_engine::{Error, ErrorKind, ExportedRecord, Result};
use ring::signature::Ed25519KeyPair;

use super::format::{ENTRY_BYTES, Entry, Footer, HEADER_BYTES, Head, header};
use super::keys;

const LEVEL: i32 = 3;

/// A pack that is being written.
pub struct PackWriter {
    path: PathBuf,
    partial: PathBuf,
    file: BufWriter<File>,
    offset: u64,
    /// The manifest's entries, as they will be written.
    entries: Vec<u8>,
    compressor: zstd::bulk::Compressor<'static>,
    frame: Vec<u8>,
    pub payload_bytes: u64,
}

impl PackWriter {
    /// # Errors
    /// `InvalidInput` if there is a file already, `Io`.
    pub fn create(path: &Path) -> Result<Self> {
        if path.exists() {
            let message = format!("{} exists already; remove it, or give another name", path.display());
            return Err(Error::new(ErrorKind::InvalidInput, message));
        }
        let mut partial = path.as_os_str().to_owned();
        partial.push(".partial");
        let partial = PathBuf::from(partial);
        let io = |error| Error::from_io(format!("cannot write {}", partial.display()), error);
        let file = File::create(&partial).map_err(io)?;
        let mut file = BufWriter::with_capacity(1 << 20, file);
        file.write_all(&header()).map_err(io)?;
        let mut compressor = zstd::bulk::Compressor::new(LEVEL).map_err(io)?;
        compressor.include_checksum(true).map_err(io)?;
        let path = path.to_owned();
        let (offset, entries, frame) = (HEADER_BYTES as u64, Vec::new(), Vec::new());
        Ok(Self { path, partial, file, offset, entries, compressor, frame, payload_bytes: 0 })
    }

    fn io(&self, error: std::io::Error) -> Error {
        Error::from_io(format!("cannot write {}", self.partial.display()), error)
    }

    /// How many blocks it has.
    pub fn blocks(&self) -> u64 {
        (self.entries.len() / ENTRY_BYTES) as u64
    }

    /// Appends a block.
    ///
    /// # Errors
    /// `Io`, `NoSpace`.
    pub fn add(&mut self, record: &ExportedRecord<'_>) -> Result<()> {
        let payload = record.payload;
        self.frame.resize(zstd::zstd_safe::compress_bound(payload.len()), 0);
        let compressed = self.compressor.compress_to_buffer(payload, &mut self.frame).ok();
        let frame = compressed.filter(|bytes| *bytes < payload.len()).and_then(|bytes| self.frame.get(..bytes));
        let stored = frame.unwrap_or(payload);
        let entry = Entry {
            key: record.key,
            parent: record.parent,
            digest: *blake3::hash(stored).as_bytes(),
            offset: self.offset,
            stored_bytes: stored.len() as u32,
            payload_bytes: payload.len() as u32,
            depth: record.depth,
            group: record.group,
            shard: record.shard,
            is_zstd: frame.is_some(),
        };
        self.file.write_all(stored).map_err(|error| Error::from_io("cannot write the pack", error))?;
        self.offset += stored.len() as u64;
        self.payload_bytes += payload.len() as u64;
        self.entries.extend_from_slice(&entry.encode());
        Ok(())
    }

    /// Writes manifest and footer, and gives the file its name; its length.
    ///
    /// # Errors
    /// `Io`, `NoSpace`.
    pub fn finish(mut self, head: &Head, key: Option<&Ed25519KeyPair>) -> Result<u64> {
        let head = head.encode();
        let mut hasher = blake3::Hasher::new();
        hasher.update(&header()).update(&head).update(&self.entries);
        let mut footer = Footer {
            manifest_offset: self.offset,
            manifest_bytes: (head.len() + self.entries.len()) as u64,
            entries: self.blocks(),
            digest: *hasher.finalize().as_bytes(),
            signer: [0; 32],
            signature: [0; 64],
        };
        if let Some(key) = key {
            keys::sign(&mut footer, key);
        }
        let footer = footer.encode();
        let parts = [&head[..], &self.entries, &footer];
        let written = parts.iter().try_for_each(|part| self.file.write_all(part)).and_then(|()| self.file.flush());
        let synced = written.and_then(|()| self.file.get_ref().sync_all());
        synced.and_then(|()| std::fs::rename(&self.partial, &self.path)).map_err(|error| self.io(error))?;
        Ok(self.offset + (head.len() + self.entries.len() + footer.len()) as u64)
    }
}

impl Drop for PackWriter {
    fn drop(&mut self) {
        // It is not there if the pack was finished.
        std::fs::remove_file(&self.partial).ok();
    }
}
