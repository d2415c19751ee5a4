//! remote.
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use pegaflow_engine::*;
use pegaflow_tiers::HostMemory;
use crate::embedded::Ended;
fn no<T>() -> Result<T> { Err(Error::new(ErrorKind::Closed, "not built yet")) }
pub(crate) struct Remote;
impl Remote {
    pub(crate) fn start(_e: Result<SocketAddr, PathBuf>, _n: &str, _l: Duration, _r: Duration, _s: u64) -> Result<Self> { no() }
    pub(crate) fn is_connected(&self) -> bool { false }
    pub(crate) fn wait_connected(&self, _t: Duration) -> bool { false }
    pub(crate) fn register(&self, _s: InstanceSpec, _m: Arc<HostMemory>) -> Result<()> { no() }
    pub(crate) fn lookup(&self, _r: &LookupRequest) -> Result<LookupReply> { no() }
    pub(crate) fn release(&self, _l: LeaseId) {}
    pub(crate) fn load(&self, _o: OperationId, _l: LeaseId, _s: u16, _b: Vec<LoadBlock>) -> Result<()> { no() }
    pub(crate) fn save(&self, _o: OperationId, _i: InstanceId, _g: u16, _s: u16, _b: Vec<BlockSave>) -> Result<()> { no() }
    pub(crate) fn cancel(&self, _o: OperationId) {}
    pub(crate) fn poll(&self, _w: Duration) -> Vec<Ended> { vec![] }
    pub(crate) fn flush(&self, _t: Duration) -> Result<()> { no() }
    pub(crate) fn stats(&self) -> Result<Stats> { no() }
    pub(crate) fn close(&self, _t: Duration) -> Result<()> { no() }
}
