//! The port through which vLLM's connector talks to the cache: an engine in this process or a server, with the same
//! methods. Sizes of all lists are checked here, before anything is built from them.
#![expect(unsafe_code, reason = "registers memory that Python allocated")]

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::ptr::NonNull;
use std::sync::Arc;
use std::time::Duration;

use pegaflow_engine::{
    ArenaId, BlockKey, BlockSave, ComputedTokens, DeviceMemory, Error, ErrorKind, Fragment, GroupGeometry, HitTier,
    HostMemory, InstanceId, InstanceSpec, LeaseId, LoadBlock, LoadQuestion, LocateRequest, LookupRequest,
    NamespaceDescriptor, OperationId, Place, RangeFragment, Result, SaveTarget, TenantId, Whose,
};
use pegaflow_tiers::CudaMemory;
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use crate::embedded::{Embedded, Ended, PlacedLoad};
use crate::engine::{config, duration};
use crate::error::{detached, to_python};
use crate::remote::Remote;

const KEY_BYTES: usize = 32;
/// The engine's limit for one request.
const BLOCKS_MAX: usize = 65_536;

enum Port {
    Embedded(Embedded),
    Remote(Remote),
}

/// Blocks found, those in DRAM, the lease, the arena, the places, the number of the decision.
type Found<'py> = (u32, u32, Option<u128>, Option<Bound<'py, PyBytes>>, Bound<'py, PyBytes>, u64, f64);
/// The request's name, blocks that are there already, tokens of a block, load of the GPU, policy, what was computed.
type Question = (String, u32, u32, f32, Option<String>, Vec<Computed>);
/// The decision, first token, one after the last, load of the GPU, seconds.
type Computed = (u64, u32, u32, f32, f64);

/// A session with the cache: the scheduler's side or a worker's side of vLLM.
#[pyclass(module = "pegaflow._native", frozen)]
pub(crate) struct Cache(Port);

/// A load or a save that ended: none of its copies can read or write any more.
#[pyclass(module = "pegaflow._native", frozen, get_all)]
pub(crate) struct Completion {
    /// The operation's number.
    operation: u64,
    /// Whether it was a load; else it was a save.
    is_load: bool,
    /// Blocks loaded out of DRAM.
    loaded_dram: u32,
    /// Blocks loaded from the drive.
    loaded_nvme: u32,
    /// Device blocks that do not hold what was asked for.
    failed: Vec<u32>,
    /// Blocks that are now visible to lookups.
    saved: u32,
    /// Blocks that were there already.
    present: u32,
    /// Blocks that were dropped.
    dropped: u32,
}

#[pymethods]
impl Cache {
    /// An engine in this process, shared by everybody in it who names the same path.
    #[staticmethod]
    #[pyo3(signature = (path, dram, nvme = None))]
    fn embedded(
        py: Python<'_>,
        path: PathBuf,
        dram: &Bound<'_, PyAny>,
        nvme: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<Self> {
        crate::logs::start();
        let config = config(&path, dram, nvme)?;
        Ok(Self(Port::Embedded(detached(py, || Embedded::start(&path, config))?)))
    }

    /// A server, at the path of a Unix socket or at `tcp://ADDRESS:PORT`. Returns at once, connected or not: it
    /// connects when the server is there, and again when the server was started again.
    #[staticmethod]
    fn remote(py: Python<'_>, address: &str, name: &str, lookup_timeout: f64, rpc_timeout: f64) -> PyResult<Self> {
        crate::logs::start();
        let tcp = address
            .strip_prefix("tcp://")
            .map(|address| {
                address.parse::<SocketAddr>().map_err(|error| {
                    let message =
                        format!("'{address}' is no address and port ({error}); write for example tcp://127.0.0.1:7480");
                    to_python(py, &Error::new(ErrorKind::InvalidInput, message))
                })
            })
            .transpose()?;
        let (lookup, rpc) = (duration(lookup_timeout)?, duration(rpc_timeout)?);
        let remote = detached(py, || Remote::start(tcp.ok_or_else(|| PathBuf::from(address)), name, lookup, rpc))?;
        Ok(Self(Port::Remote(remote)))
    }

    /// Whether the cache can be reached now. An engine in this process always can.
    fn is_connected(&self) -> bool {
        match &self.0 {
            Port::Embedded(_) => true,
            Port::Remote(remote) => remote.is_connected(),
        }
    }

    /// Waits until the cache can be reached, at most `timeout` seconds; whether it can.
    fn wait_connected(&self, py: Python<'_>, timeout: f64) -> PyResult<bool> {
        let timeout = duration(timeout)?;
        Ok(match &self.0 {
            Port::Embedded(_) => true,
            Port::Remote(remote) => py.detach(|| remote.wait_connected(timeout)),
        })
    }

    /// Registers this worker: its identity, its group and its memory. `ranges` are (address, bytes); `fragments` are
    /// (range, offset, stride, bytes): block `b` has a piece at `offset + b * stride` of its range. `owner` is kept as
    /// long as a copy may touch the memory. With `device` the addresses are those of that CUDA device, else of the host. With `keeps_all`
    /// all that the instance saves is written to the drive, whatever the policy and the write budget say. May be called
    /// again, for another instance over the same memory.
    ///
    /// The caller promises that the ranges are memory that `owner` keeps in place.
    #[expect(clippy::too_many_arguments, reason = "keyword arguments on the Python side")]
    #[pyo3(signature = (*, instance, descriptor, group, block_bytes, shards, shard, ranges, fragments, blocks, owner, device = None, keeps_all = false))]
    fn register_worker(
        &self,
        py: Python<'_>,
        instance: &str,
        descriptor: BTreeMap<String, String>,
        group: u16,
        block_bytes: u64,
        shards: u16,
        shard: u16,
        ranges: Vec<(usize, u64)>,
        fragments: Vec<(u32, u64, u64, u64)>,
        blocks: u32,
        owner: Py<PyAny>,
        device: Option<u32>,
        keeps_all: bool,
    ) -> PyResult<()> {
        let namespace = descriptor
            .into_iter()
            .fold(NamespaceDescriptor::new(), |descriptor, (name, value)| descriptor.with(name, value));
        let spec = InstanceSpec {
            instance: InstanceId(instance.into()),
            namespace,
            groups: vec![GroupGeometry { group, block_bytes, shards }],
            shard,
            keeps_all,
        };
        let memory = detached(py, || memory_of(&ranges, &fragments, blocks, owner, device))?;
        detached(py, || match &self.0 {
            Port::Embedded(embedded) => embedded.register(spec, memory),
            Port::Remote(remote) => remote.register(spec, memory),
        })
    }

    /// How many keys (32 bytes each) from the first on are there, how many of those are in DRAM, and the lease on them.
    /// A lookup repeated with the same tag replaces the earlier lease. `lease` is in seconds; 0 takes none.
    /// With `places`, if all that was found is in DRAM: the arena's name and where the blocks lie, as little-endian u32s,
    /// shard after shard; else `None` and nothing.
    /// With `question` it is decided whether what was found is worth loading; if it is not there is no lease.
    /// With `prefetch` what is leased and on the drive is brought to DRAM until the lease ends; the last value is the seconds
    /// that this is expected to take, 0 if nothing is fetched or that is not known.
    /// Only what was saved for the same `tenant` is found.
    #[expect(clippy::too_many_arguments, reason = "the values of one request")]
    #[pyo3(signature = (instance, group, keys, lease, tag, *, places = false, question = None, prefetch = false, tenant = None))]
    fn lookup<'py>(
        &self,
        py: Python<'py>,
        instance: &str,
        group: u16,
        keys: &[u8],
        lease: f64,
        tag: u64,
        places: bool,
        question: Option<Question>,
        prefetch: bool,
        tenant: Option<&str>,
    ) -> PyResult<Found<'py>> {
        let tenant = tenant_of(py, tenant)?;
        let question = question.map(question_of).transpose().map_err(|error| to_python(py, &error))?;
        let lease = Some(duration(lease)?).filter(|lease| !lease.is_zero());
        let keys = keys_of(keys).map_err(|error| to_python(py, &error))?;
        let request = LookupRequest {
            instance: InstanceId(instance.into()),
            tenant,
            group,
            keys,
            lease,
            tag,
            with_places: places,
            question,
            prefetch,
        };
        let reply = detached(py, || match &self.0 {
            Port::Embedded(embedded) => embedded.lookup(&request),
            Port::Remote(remote) => remote.lookup(&request),
        })?;
        let lease = reply.lease.map(|lease| lease.0);
        let (arena, places) = match reply.places {
            Some(found) => {
                let bytes: Vec<u8> = found.places.iter().flat_map(|place| place.0.to_le_bytes()).collect();
                (Some(PyBytes::new(py, &found.arena.0.to_le_bytes())), PyBytes::new(py, &bytes))
            }
            None => (None, PyBytes::new(py, &[])),
        };
        Ok((reply.hit_blocks, reply.dram_blocks, lease, arena, places, reply.decision, reply.fetch_us as f64 / 1e6))
    }

    /// Where each of some blocks (keys of 32 bytes, in any order) is: a byte for each, 0 nowhere, 1 in DRAM, 2 on the drive, in
    /// all shards. Takes no lease and is no use of the blocks.
    #[pyo3(signature = (instance, group, keys, *, tenant = None))]
    fn locate<'py>(
        &self,
        py: Python<'py>,
        instance: &str,
        group: u16,
        keys: &[u8],
        tenant: Option<&str>,
    ) -> PyResult<Bound<'py, PyBytes>> {
        let tenant = tenant_of(py, tenant)?;
        let keys = keys_of(keys).map_err(|error| to_python(py, &error))?;
        let request = LocateRequest { whose: Whose::Instance(InstanceId(instance.into())), tenant, group, keys };
        let tiers = detached(py, || match &self.0 {
            Port::Embedded(embedded) => embedded.locate(&request),
            Port::Remote(remote) => remote.locate(&request),
        })?;
        let number = |tier: Option<HitTier>| match tier {
            None => 0,
            Some(HitTier::Dram) => 1,
            Some(HitTier::Nvme) => 2,
        };
        Ok(PyBytes::new(py, &tiers.into_iter().map(number).collect::<Vec<u8>>()))
    }

    /// The name of the arena that this worker's device can reach wholly by now: 16 bytes, or `None`.
    fn arena<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyBytes>>> {
        let arena = detached(py, || match &self.0 {
            Port::Embedded(embedded) => embedded.arena(),
            Port::Remote(remote) => remote.arena(),
        })?;
        Ok(arena.map(|arena| PyBytes::new(py, &arena.0.to_le_bytes())))
    }

    /// Loads blocks from the places that a lookup told: `places` has one little-endian u32 for each of `blocks`. With `before`
    /// whatever is queued on `stream` later runs after the load; the host never waits. `remaining` is what is left of the
    /// lease, in seconds.
    #[expect(clippy::too_many_arguments, reason = "the values of one request")]
    #[pyo3(signature = (operation, lease, shard, arena, places, blocks, *, remaining, stream, before))]
    fn load_placed(
        &self,
        py: Python<'_>,
        operation: u64,
        lease: u128,
        shard: u16,
        arena: [u8; 16],
        places: &[u8],
        blocks: Vec<u32>,
        remaining: f64,
        stream: u64,
        before: bool,
    ) -> PyResult<()> {
        let (places, rest) = places.as_chunks::<4>();
        same_length(&[places.len() + rest.len(), blocks.len()]).map_err(|error| to_python(py, &error))?;
        let place = |bytes: &[u8; 4]| Place(u32::from_le_bytes(*bytes));
        let load = PlacedLoad {
            operation: OperationId(operation),
            lease: LeaseId(lease),
            shard,
            arena: ArenaId(u128::from_le_bytes(arena)),
            blocks: blocks.into_iter().zip(places.iter().map(place)).collect(),
            remaining: duration(remaining.max(0.0))?,
            stream,
            before,
        };
        detached(py, || match &self.0 {
            Port::Embedded(embedded) => embedded.load_placed(load),
            Port::Remote(remote) => remote.load_placed(load),
        })
    }

    /// Gives a lease back.
    fn release(&self, py: Python<'_>, lease: u128) {
        py.detach(|| match &self.0 {
            Port::Embedded(embedded) => embedded.release(LeaseId(lease)),
            Port::Remote(remote) => remote.release(LeaseId(lease)),
        });
    }

    /// Starts a load: `indices` are places among the keys of the lookup, `blocks` where they go. It runs after what is
    /// queued on the device's stream `stream`.
    #[expect(clippy::too_many_arguments, reason = "the values of one request")]
    #[pyo3(signature = (operation, lease, shard, indices, blocks, stream = 0))]
    fn load(
        &self,
        py: Python<'_>,
        operation: u64,
        lease: u128,
        shard: u16,
        indices: Vec<u32>,
        blocks: Vec<u32>,
        stream: u64,
    ) -> PyResult<()> {
        same_length(&[indices.len(), blocks.len()]).map_err(|error| to_python(py, &error))?;
        let blocks = indices.into_iter().zip(blocks).map(|(index, block)| LoadBlock { index, block }).collect();
        detached(py, || match &self.0 {
            Port::Embedded(embedded) => embedded.load(OperationId(operation), LeaseId(lease), shard, blocks, stream),
            Port::Remote(remote) => remote.load(OperationId(operation), LeaseId(lease), shard, blocks, stream),
        })
    }

    /// Starts a save: a run of blocks of one chain. `parent` is the key before the first, `depth` the first's place in
    /// the chain, `keys` are 32 bytes for each block. It runs after what is queued on the device's stream `stream`.
    #[expect(clippy::too_many_arguments, reason = "keyword arguments on the Python side")]
    #[pyo3(signature = (operation, instance, group, shard, *, parent, depth, keys, blocks, stream = 0, tenant = None))]
    fn save(
        &self,
        py: Python<'_>,
        operation: u64,
        instance: &str,
        group: u16,
        shard: u16,
        parent: &[u8],
        depth: u32,
        keys: &[u8],
        blocks: Vec<u32>,
        stream: u64,
        tenant: Option<&str>,
    ) -> PyResult<()> {
        let blocks = run_of(parent, depth, keys, &blocks).map_err(|error| to_python(py, &error))?;
        let tenant = tenant_of(py, tenant)?;
        let (operation, target) =
            (OperationId(operation), SaveTarget { instance: InstanceId(instance.into()), tenant, group, shard });
        detached(py, || match &self.0 {
            Port::Embedded(embedded) => embedded.save(operation, target, blocks, stream),
            Port::Remote(remote) => remote.save(operation, target, blocks, stream),
        })
    }

    /// Asks for an operation to end early. Its completion still comes.
    fn cancel(&self, py: Python<'_>, operation: u64) {
        py.detach(|| match &self.0 {
            Port::Embedded(embedded) => embedded.cancel(OperationId(operation)),
            Port::Remote(remote) => remote.cancel(OperationId(operation)),
        });
    }

    /// What has ended since the last call; waits up to `wait` seconds for something if nothing has.
    #[pyo3(signature = (wait = 0.0))]
    fn poll(&self, py: Python<'_>, wait: f64) -> PyResult<Vec<Completion>> {
        let wait = duration(wait)?;
        let ended = py.detach(|| match &self.0 {
            Port::Embedded(embedded) => embedded.poll(wait),
            Port::Remote(remote) => remote.poll(wait),
        });
        Ok(ended.into_iter().map(Completion::from).collect())
    }

    /// Makes everything saved before durable, within `timeout` seconds.
    fn flush(&self, py: Python<'_>, timeout: f64) -> PyResult<()> {
        let timeout = duration(timeout)?;
        detached(py, || match &self.0 {
            Port::Embedded(embedded) => embedded.flush(timeout),
            Port::Remote(remote) => remote.flush(timeout),
        })
    }

    /// The cache's statistics as a JSON text.
    fn stats_json(&self, py: Python<'_>) -> PyResult<String> {
        detached(py, || match &self.0 {
            Port::Embedded(embedded) => Ok(serde_json::json!({ "engine": embedded.stats() }).to_string()),
            Port::Remote(remote) => remote.stats(),
        })
    }

    /// Ends the session, once its copies have ended, within `timeout` seconds.
    fn close(&self, py: Python<'_>, timeout: f64) -> PyResult<()> {
        let timeout = duration(timeout)?;
        detached(py, || match &self.0 {
            Port::Embedded(embedded) => embedded.close(timeout),
            Port::Remote(remote) => remote.close(timeout),
        })
    }
}

/// Negative and endless times count as none.
fn question_of(question: Question) -> Result<LoadQuestion> {
    let (request, first_block, block_tokens, load_share, policy, computed) = question;
    let computed = computed.into_iter().map(|(decision, first_token, end_token, load_share, took)| ComputedTokens {
        decision,
        first_token,
        end_token,
        load_share,
        took: Duration::try_from_secs_f64(took).unwrap_or_default(),
    });
    let policy = policy.map(|policy| policy.parse()).transpose()?;
    Ok(LoadQuestion { request, first_block, block_tokens, load_share, policy, computed: computed.collect() })
}

impl From<Ended> for Completion {
    fn from(ended: Ended) -> Self {
        let nothing = Self {
            operation: 0,
            is_load: false,
            loaded_dram: 0,
            loaded_nvme: 0,
            failed: Vec::new(),
            saved: 0,
            present: 0,
            dropped: 0,
        };
        match ended {
            Ended::Load(operation, outcome) => Self {
                operation: operation.0,
                is_load: true,
                loaded_dram: outcome.loaded_dram,
                loaded_nvme: outcome.loaded_nvme,
                failed: outcome.failed,
                ..nothing
            },
            Ended::Save(operation, outcome) => Self {
                operation: operation.0,
                saved: outcome.saved,
                present: outcome.present,
                dropped: outcome.dropped,
                ..nothing
            },
        }
    }
}

fn invalid(message: String) -> Error {
    Error::new(ErrorKind::InvalidInput, message)
}

fn keys_of(bytes: &[u8]) -> Result<Vec<BlockKey>> {
    let (keys, rest) = bytes.as_chunks::<KEY_BYTES>();
    if !rest.is_empty() || keys.len() > BLOCKS_MAX {
        return Err(invalid(format!(
            "{} bytes of keys; give a multiple of {KEY_BYTES}, at most {BLOCKS_MAX} keys",
            bytes.len()
        )));
    }
    Ok(keys.iter().copied().map(BlockKey::from_bytes).collect())
}

fn same_length(lengths: &[usize]) -> Result<()> {
    match lengths {
        [first, rest @ ..] if *first <= BLOCKS_MAX && rest.iter().all(|length| length == first) => Ok(()),
        _ => Err(invalid(format!("lists of {lengths:?} entries; give equal ones of at most {BLOCKS_MAX}"))),
    }
}

fn tenant_of(py: Python<'_>, name: Option<&str>) -> PyResult<Option<TenantId>> {
    name.map(TenantId::new).transpose().map_err(|error| to_python(py, &error))
}

fn run_of(parent: &[u8], depth: u32, keys: &[u8], blocks: &[u32]) -> Result<Vec<BlockSave>> {
    let parent = keys_of(parent)?;
    let [mut parent] = parent[..] else {
        return Err(invalid(format!("{} parents; give one key", parent.len())));
    };
    let keys = keys_of(keys)?;
    same_length(&[keys.len(), blocks.len()])?;
    let run = keys.into_iter().zip(blocks).enumerate().map(|(index, (key, &block))| {
        let save = BlockSave { key, parent, depth: depth.saturating_add(index as u32), block };
        parent = key;
        save
    });
    Ok(run.collect())
}

fn memory_of(
    ranges: &[(usize, u64)],
    fragments: &[(u32, u64, u64, u64)],
    blocks: u32,
    owner: Py<PyAny>,
    device: Option<u32>,
) -> Result<Arc<dyn DeviceMemory>> {
    let fragments = fragments
        .iter()
        .map(|&(range, offset, stride, bytes)| RangeFragment { range, fragment: Fragment { offset, stride, bytes } })
        .collect();
    if let Some(device) = device {
        let ranges: Vec<_> = ranges.iter().map(|&(address, bytes)| (address as u64, bytes)).collect();
        // SAFETY: the caller of `register_worker` promises that `owner` keeps the ranges in place; see below.
        return Ok(Arc::new(unsafe { CudaMemory::new(device, &ranges, fragments, blocks, Box::new(owner)) }?));
    }
    let ranges = ranges
        .iter()
        .map(|&(address, bytes)| {
            NonNull::new(address as *mut u8)
                .map(|start| (start, bytes))
                .ok_or_else(|| invalid("a range starts at address 0".into()))
        })
        .collect::<Result<Vec<_>>>()?;
    // SAFETY: the caller of `register_worker` promises that `owner` keeps the ranges in place; the memory keeps `owner`
    // until the last copy has ended. vLLM writes a block only while no copy of it runs: a loaded block is not given to
    // the model before its load has ended, a saved one is not reused before its save has.
    let memory = unsafe { HostMemory::from_ranges(&ranges, fragments, blocks, Box::new(owner)) }?;
    Ok(Arc::new(memory))
}
