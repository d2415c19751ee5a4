//! The module `pegaflow._native`: a thin shell around the engine and the server's client. It turns Python values into
//! ours and back, releases the GIL while anything waits, and keeps what Python lent alive until the last copy has
//! ended. It decides nothing.

mod cache;
mod copy_loop;
mod embedded;
mod engine;
mod error;
mod key_chain;
mod logs;
mod remote;
mod weights;

use pyo3::prelude::*;

/// The native half of the package `pegaflow`.
#[pymodule]
mod _native {
    #[pymodule_export]
    use crate::cache::{Cache, Completion};
    #[pymodule_export]
    use crate::copy_loop::CopyLoop;
    #[pymodule_export]
    use crate::engine::{Engine, Object};
    #[pymodule_export]
    use crate::key_chain::{KeyChain, tenant_of_cache_salt};
    #[pymodule_export]
    use crate::weights::{content_digest, digest_weights, full_digest};

    use pyo3::prelude::*;

    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        module.add("__version__", env!("CARGO_PKG_VERSION"))?;
        module.add("KEY_CHAIN_VERSION", pegaflow_engine::KEY_CHAIN_VERSION)?;
        module.add("KEY_BYTES", 32)
    }
}
