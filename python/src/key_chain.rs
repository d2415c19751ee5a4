//! Block keys for Python: one chain for each request, extended as its tokens become known.

use parking_lot::Mutex;
use pegaflow_engine::{BlockKey, KeyChain as Chain};
use pyo3::buffer::PyBuffer;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyBytes;

const TOKENS_PER_BLOCK_MAX: usize = 1 << 20;

/// Computes the keys of one sequence, block after block.
#[pyclass(module = "pegaflow._native", frozen)]
pub(crate) struct KeyChain(Mutex<Chain>);

#[pymethods]
impl KeyChain {
    #[new]
    #[pyo3(signature = (parent = None))]
    fn new(parent: Option<&[u8]>) -> PyResult<Self> {
        let parent = match parent {
            None => BlockKey::ROOT,
            Some(bytes) => BlockKey::from_bytes(bytes.try_into().map_err(|_| {
                PyValueError::new_err(format!("a key has 32 bytes; the parent given has {}", bytes.len()))
            })?),
        };
        Ok(Self(Mutex::new(Chain::resume(parent))))
    }

    /// The key of the last block; 32 zero bytes before the first.
    #[getter]
    fn parent<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        PyBytes::new(py, self.0.lock().parent().as_bytes())
    }

    /// Appends the complete blocks of `tokens` and returns their keys, 32 bytes each. Tokens after the last complete
    /// block are left out: give them again when their block is complete.
    #[pyo3(signature = (tokens, block_size, extras = None))]
    fn extend<'py>(
        &self,
        py: Python<'py>,
        tokens: &Bound<'py, PyAny>,
        block_size: usize,
        extras: Option<Vec<Vec<u8>>>,
    ) -> PyResult<Bound<'py, PyBytes>> {
        if block_size == 0 || block_size > TOKENS_PER_BLOCK_MAX {
            return Err(PyValueError::new_err(format!("block_size is {block_size}; give 1 to {TOKENS_PER_BLOCK_MAX}")));
        }
        let tokens = tokens_of(py, tokens)?;
        let blocks = tokens.len() / block_size;
        let extras = extras.unwrap_or_default();
        if !extras.is_empty() && extras.len() != blocks {
            return Err(PyValueError::new_err(format!(
                "{} extras for {blocks} complete blocks; give one for each, or none",
                extras.len()
            )));
        }
        let keys = py.detach(|| {
            let mut chain = self.0.lock();
            let mut keys = Vec::with_capacity(blocks * 32);
            for (index, block) in tokens.chunks_exact(block_size).enumerate() {
                let extra = extras.get(index).map_or(&[][..], Vec::as_slice);
                keys.extend_from_slice(chain.next(block, extra).as_bytes());
            }
            keys
        });
        Ok(PyBytes::new(py, &keys))
    }
}

/// Token ids from a list or from a buffer of 32- or 64-bit integers.
fn tokens_of(py: Python<'_>, tokens: &Bound<'_, PyAny>) -> PyResult<Vec<u32>> {
    if let Ok(buffer) = PyBuffer::<u32>::get(tokens) {
        return buffer.to_vec(py);
    }
    if let Ok(buffer) = PyBuffer::<i32>::get(tokens) {
        return buffer.to_vec(py)?.into_iter().map(token).collect();
    }
    if let Ok(buffer) = PyBuffer::<i64>::get(tokens) {
        return buffer.to_vec(py)?.into_iter().map(token).collect();
    }
    tokens.extract()
}

fn token<T: Copy + std::fmt::Display + TryInto<u32>>(value: T) -> PyResult<u32> {
    value.try_into().map_err(|_| PyValueError::new_err(format!("token {value} is not a 32-bit id; give 0 to 2^32-1")))
}

/// The tenant of requests with a cache salt.
#[pyfunction]
pub(crate) fn tenant_of_cache_salt(salt: &str) -> String {
    pegaflow_engine::TenantId::of_cache_salt(salt).to_string()
}
