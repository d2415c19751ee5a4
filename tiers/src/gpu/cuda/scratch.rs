//! GPU memory of this process, for tests and benches that play a worker.

use std::sync::Arc;

use super::driver::{self, Context, DeviceBuffer};
use crate::error::{Error, ErrorKind, Result};

/// Some GPU memory, freed when dropped. Reads and writes wait for the GPU.
pub struct CudaScratch {
    context: Arc<Context>,
    buffer: DeviceBuffer,
    bytes: usize,
}

impl CudaScratch {
    /// Takes `bytes` bytes of the GPU `ordinal`.
    ///
    /// # Errors
    /// `Unsupported` without that GPU, those of the driver.
    pub fn new(ordinal: u32, bytes: usize) -> Result<Self> {
        let context = Context::retain(ordinal)?;
        let buffer = DeviceBuffer::new(&context, bytes)?;
        Ok(Self { context, buffer, bytes })
    }

    /// Its device address.
    pub fn address(&self) -> u64 {
        self.buffer.address()
    }

    fn check(&self, offset: usize, bytes: usize) -> Result<()> {
        match offset.checked_add(bytes) {
            Some(end) if end <= self.bytes => Ok(()),
            _ => Err(Error::new(
                ErrorKind::InvalidInput,
                format!("{bytes} bytes at {offset} lie outside the {} bytes of GPU memory", self.bytes),
            )),
        }
    }

    /// Writes `from` at `offset`.
    ///
    /// # Errors
    /// `InvalidInput` outside the memory, those of the driver.
    pub fn write(&self, offset: usize, from: &[u8]) -> Result<()> {
        self.check(offset, from.len())?;
        // SAFETY: the range lies in the buffer, as just checked.
        unsafe { driver::write(&self.context, self.address() + offset as u64, from) }
    }

    /// Reads `to.len()` bytes at `offset`.
    ///
    /// # Errors
    /// As [`CudaScratch::write`].
    pub fn read(&self, offset: usize, to: &mut [u8]) -> Result<()> {
        self.check(offset, to.len())?;
        // SAFETY: as above.
        unsafe { driver::read(&self.context, self.address() + offset as u64, to) }
    }
}
