//! Long jobs of the server that an operator starts and looks at: they go on in the server, whoever asked for them.

use pegaflow_engine::{ByteSize, Error, ErrorKind, Result, ScrubProgress};
use serde::de::DeserializeOwned;

use super::Client;
use crate::proto::ScrubRequest;
use crate::proto::scrub_request::Action;

impl Client {
    /// Starts a scrub of the server's store now, at most so many bytes a second, 64 KiB to 16 GiB. It goes on by itself.
    ///
    /// # Errors
    /// `Busy` while another one runs, `InvalidInput`, `NotFound` if the server has no store, `Poisoned` while it is out of use,
    /// `Closed` at once without a server, `Timeout`.
    pub fn start_scrub(&self, bytes_per_second: ByteSize) -> Result<ScrubProgress> {
        self.scrub(Action::Start, bytes_per_second)
    }

    /// Ends the scrub that was asked for, after the piece that it reads. That none runs is no error.
    ///
    /// # Errors
    /// `NotFound` if the server has no store, `Closed` at once without a server, `Timeout`.
    pub fn stop_scrub(&self) -> Result<ScrubProgress> {
        self.scrub(Action::Stop, ByteSize(0))
    }

    /// How far the latest scrub is that was asked for since the server was started.
    ///
    /// # Errors
    /// As [`Client::stop_scrub`].
    pub fn scrub_progress(&self) -> Result<ScrubProgress> {
        self.scrub(Action::Look, ByteSize(0))
    }

    fn scrub(&self, action: Action, bytes_per_second: ByteSize) -> Result<ScrubProgress> {
        let (mut rpc, _) = self.inner.shared.session()?;
        let request = ScrubRequest { action: action.into(), bytes_per_second: bytes_per_second.0 };
        let reply = self.call(self.inner.config.rpc_timeout, async move { rpc.scrub(request).await })?;
        understood(&reply.progress_json)
    }
}

fn understood<T: DeserializeOwned>(json: &str) -> Result<T> {
    serde_json::from_str(json)
        .map_err(|error| Error::new(ErrorKind::Io, format!("the server's answer is not understood: {error}")))
}
