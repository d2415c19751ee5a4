//! Errors on their way to Python: every kind has its class in `pegaflow.errors`.

use pegaflow_engine::Error;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;

/// The exception for an error: a subclass of `pegaflow.PegaError` with the error's kind.
pub(crate) fn to_python(py: Python<'_>, error: &Error) -> PyErr {
    static MAKE: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
    let exception = MAKE
        .get_or_try_init(py, || Ok::<_, PyErr>(py.import("pegaflow.errors")?.getattr("of_kind")?.unbind()))
        .and_then(|make| make.bind(py).call1((error.kind().as_str(), format!("{error:#}"))));
    exception.map_or_else(|failure| failure, PyErr::from_value)
}

/// Runs `work` without the GIL.
pub(crate) fn detached<T: Send>(
    py: Python<'_>,
    work: impl FnOnce() -> pegaflow_engine::Result<T> + Send,
) -> PyResult<T> {
    py.detach(work).map_err(|error| to_python(py, &error))
}
