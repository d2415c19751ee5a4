//! What is to stay in the server's DRAM, and the prefixes that are there.

use std::time::Duration;

use pegaflow_engine::{BlockChoice, KeyPrefix, NamespaceId, Result, Unpinned};
use serde_json::Value;

use super::Client;
use super::jobs::{understood, wire_ids, wire_ms};
use crate::proto::{ListPinsRequest, ListPrefixesRequest, PinRequest, UnpinReply, UnpinRequest};

impl Client {
    /// Keeps the blocks that are meant and are in the server's DRAM there, for this time or until the pin is ended. The pin, as
    /// `pegaflow pin --json` prints it.
    ///
    /// # Errors
    /// `NotFound` if there are none, `InvalidInput` if more than half of DRAM would be pinned, `Busy` at the most pins; `Closed`
    /// at once without a server, `Timeout` after `timeout`: it may have been done.
    pub fn pin(&self, choice: &BlockChoice, ttl: Option<Duration>, timeout: Duration) -> Result<Value> {
        let (mut rpc, _) = self.inner.shared.session()?;
        let request = PinRequest {
            namespaces: wire_ids(&choice.namespaces),
            prefix: choice.prefix.as_ref().map(KeyPrefix::to_string).unwrap_or_default(),
            ttl_ms: ttl.map_or(0, wire_ms),
        };
        let reply = self.call(timeout, async move { rpc.pin(request).await })?;
        understood(&reply.pin_json)
    }

    /// Ends the pin of this number.
    ///
    /// # Errors
    /// `NotFound` if there is none, `Closed` at once without a server, `Timeout` after `timeout`.
    pub fn unpin(&self, number: u64, timeout: Duration) -> Result<Unpinned> {
        self.end_pins(UnpinRequest { pin: number, namespaces: Vec::new() }, timeout)
    }

    /// Ends what is pinned of these namespaces, or of all if none is given.
    ///
    /// # Errors
    /// `NotFound` for a namespace that is not known, `Closed` at once without a server, `Timeout` after `timeout`.
    pub fn unpin_namespaces(&self, namespaces: &[NamespaceId], timeout: Duration) -> Result<Unpinned> {
        self.end_pins(UnpinRequest { pin: 0, namespaces: wire_ids(namespaces) }, timeout)
    }

    /// All pins of the server, by their numbers, as `pegaflow ls --json` prints them.
    ///
    /// # Errors
    /// `PermissionDenied` without the role of an operator, `Closed` at once without a server, `Timeout`.
    pub fn pins(&self) -> Result<Vec<Value>> {
        let (mut rpc, _) = self.inner.shared.session()?;
        let reply = self.call(self.inner.config.rpc_timeout, async move { rpc.list_pins(ListPinsRequest {}).await })?;
        understood(&reply.pins_json)
    }

    /// The prefixes in the server's DRAM of these namespaces, or of all if none is given, that begin a request; or, with `under`,
    /// those in which the prefix with that key goes on. At most `limit`, 1 to 1,000, the largest ones first; as
    /// `pegaflow ls --prefixes --json` prints them.
    ///
    /// # Errors
    /// `NotFound` for a namespace or a key that is not there, `InvalidInput`, `PermissionDenied` without the role of an operator,
    /// `Closed` at once without a server, `Timeout` after `timeout`.
    pub fn list_prefixes(
        &self,
        namespaces: &[NamespaceId],
        under: Option<&KeyPrefix>,
        limit: u32,
        timeout: Duration,
    ) -> Result<Vec<Value>> {
        let (mut rpc, _) = self.inner.shared.session()?;
        let (namespaces, under) = (wire_ids(namespaces), under.map(KeyPrefix::to_string).unwrap_or_default());
        let request = ListPrefixesRequest { namespaces, under, limit };
        let reply = self.call(timeout, async move { rpc.list_prefixes(request).await })?;
        understood(&reply.prefixes_json)
    }

    fn end_pins(&self, request: UnpinRequest, timeout: Duration) -> Result<Unpinned> {
        let (mut rpc, _) = self.inner.shared.session()?;
        let UnpinReply { pins, blocks, bytes } = self.call(timeout, async move { rpc.unpin(request).await })?;
        Ok(Unpinned { pins, blocks, bytes })
    }
}
