//! Long jobs of the server that an operator starts and looks at: they go on in the server, whoever asked for them. And the
//! opposite of one of them.

use std::time::Duration;

use pegaflow_engine::{
    BlockChoice, ByteSize, Error, ErrorKind, EvictOutcome, KeyPrefix, NamespaceId, Result, ScrubProgress, WarmRun,
};
use prost::bytes::Bytes;
use serde::de::DeserializeOwned;

use super::Client;
use crate::proto::{EvictReply, EvictRequest, JobAction, ScrubRequest, WarmRequest};

impl Client {
    /// Starts a scrub of the server's store now, at most so many bytes a second, 64 KiB to 16 GiB. It goes on by itself.
    ///
    /// # Errors
    /// `Busy` while another one runs, `InvalidInput`, `NotFound` if the server has no store, `Poisoned` while it is out of use,
    /// `Closed` at once without a server, `Timeout`.
    pub fn start_scrub(&self, bytes_per_second: ByteSize) -> Result<ScrubProgress> {
        self.scrub(JobAction::Start, bytes_per_second)
    }

    /// Ends the scrub that was asked for, after the piece that it reads. That none runs is no error.
    ///
    /// # Errors
    /// `NotFound` if the server has no store, `Closed` at once without a server, `Timeout`.
    pub fn stop_scrub(&self) -> Result<ScrubProgress> {
        self.scrub(JobAction::Stop, ByteSize(0))
    }

    /// How far the latest scrub is that was asked for since the server was started.
    ///
    /// # Errors
    /// As [`Client::stop_scrub`].
    pub fn scrub_progress(&self) -> Result<ScrubProgress> {
        self.scrub(JobAction::Look, ByteSize(0))
    }

    fn scrub(&self, action: JobAction, bytes_per_second: ByteSize) -> Result<ScrubProgress> {
        let (mut rpc, _) = self.inner.shared.session()?;
        let request = ScrubRequest { action: action.into(), bytes_per_second: bytes_per_second.0 };
        let reply = self.call(self.inner.config.rpc_timeout, async move { rpc.scrub(request).await })?;
        understood(&reply.progress_json)
    }

    /// Has the server bring to DRAM what its store has of these namespaces, or of all if none is given, as far as there is free
    /// room. It goes on by itself.
    ///
    /// # Errors
    /// `NotFound` if the server has no store, or not that namespace; `Busy` while another run goes on, `Poisoned` while the
    /// store is out of use, `Unsupported` if it is encrypted; `InvalidInput`; `Closed` at once without a server, `Timeout`.
    pub fn start_warming(&self, namespaces: &[NamespaceId]) -> Result<WarmRun> {
        self.warm(JobAction::Start, namespaces)
    }

    /// Ends the run that was asked for; what is in DRAM stays. That none goes on is no error.
    ///
    /// # Errors
    /// `Closed` at once without a server, `Timeout`.
    pub fn stop_warming(&self) -> Result<WarmRun> {
        self.warm(JobAction::Stop, &[])
    }

    /// How far the latest run is that was asked for since the server was started.
    ///
    /// # Errors
    /// As [`Client::stop_warming`].
    pub fn warming(&self) -> Result<WarmRun> {
        self.warm(JobAction::Look, &[])
    }

    /// Has the blocks that are meant leave the server's DRAM but for those that its store does not have yet and those that somebody
    /// holds or has pinned.
    ///
    /// # Errors
    /// `NotFound` for a namespace that it does not know and a prefix that is not in DRAM, `InvalidInput` for one that is not clear,
    /// `Busy` if too many requests wait, `Closed` at once without a server, `Timeout` after `timeout`: it goes on.
    pub fn evict(&self, choice: &BlockChoice, timeout: Duration) -> Result<EvictOutcome> {
        let (mut rpc, _) = self.inner.shared.session()?;
        let request = EvictRequest {
            namespaces: wire_ids(&choice.namespaces),
            prefix: choice.prefix.as_ref().map(KeyPrefix::to_string).unwrap_or_default(),
            unused_for_ms: choice.unused_for.map_or(0, wire_ms),
        };
        let reply = self.call(timeout, async move { rpc.evict(request).await })?;
        let EvictReply { namespaces, dram_blocks, dram_bytes, kept_blocks } = reply;
        Ok(EvictOutcome { namespaces, dram_blocks, dram_bytes, kept_blocks })
    }

    fn warm(&self, action: JobAction, namespaces: &[NamespaceId]) -> Result<WarmRun> {
        let (mut rpc, _) = self.inner.shared.session()?;
        let request = WarmRequest { action: action.into(), namespaces: wire_ids(namespaces) };
        let reply = self.call(self.inner.config.rpc_timeout, async move { rpc.warm(request).await })?;
        understood(&reply.progress_json)
    }
}

/// Namespaces as they are sent.
pub(super) fn wire_ids(namespaces: &[NamespaceId]) -> Vec<Bytes> {
    namespaces.iter().map(|id| id.as_bytes().to_vec().into()).collect()
}

/// A time as it is sent; none is 0.
pub(super) fn wire_ms(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX).max(1)
}

pub(super) fn understood<T: DeserializeOwned>(json: &str) -> Result<T> {
    serde_json::from_str(json)
        .map_err(|error| Error::new(ErrorKind::Io, format!("the server's answer is not understood: {error}")))
}
