//! `PegaEngine`'s core: named objects in an engine of its own. Bytes go in from any buffer and come out as a read-only
//! buffer that shares the cache's memory.
#![expect(unsafe_code, reason = "the buffer protocol hands out and takes in raw memory")]

use std::ffi::c_int;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use pegaflow_engine::{ByteSize, Engine as CacheEngine, EngineConfig, NvmeConfig, ObjectBytes};
use pyo3::buffer::PyBuffer;
use pyo3::exceptions::PyBufferError;
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedBytes;
use pyo3::types::PyString;

use crate::embedded::{self, SharedEngine};
use crate::error::{detached, to_python};

/// A size from Python: a number of bytes or a text such as `64GiB`.
pub(crate) fn size(value: &Bound<'_, PyAny>) -> PyResult<ByteSize> {
    if let Ok(text) = value.cast::<PyString>() {
        return text.to_str()?.parse().map_err(|error| to_python(value.py(), &error));
    }
    match value.extract() {
        Ok(bytes) => Ok(ByteSize(bytes)),
        // Negative or beyond 64 bits: refused as the same digits in a text are.
        Err(error) if error.is_instance_of::<pyo3::exceptions::PyOverflowError>(value.py()) => {
            value.str()?.to_str()?.parse().map_err(|error| to_python(value.py(), &error))
        }
        Err(error) => Err(error),
    }
}

/// The configuration for the three fields that Python gives; everything else by default.
pub(crate) fn config(path: &Path, dram: &Bound<'_, PyAny>, nvme: Option<&Bound<'_, PyAny>>) -> PyResult<EngineConfig> {
    let nvme = nvme.map(|capacity| Ok::<_, PyErr>(NvmeConfig::new(path, size(capacity)?))).transpose()?;
    Ok(EngineConfig { dram: size(dram)?, nvme, ..EngineConfig::default() })
}

/// An open cache of named objects.
#[pyclass(module = "pegaflow._native", frozen)]
pub(crate) struct Engine(SharedEngine);

impl Engine {
    fn engine(&self) -> &CacheEngine {
        self.0.engine()
    }
}

#[pymethods]
impl Engine {
    #[new]
    #[pyo3(signature = (path, dram, nvme = None))]
    fn new(py: Python<'_>, path: PathBuf, dram: &Bound<'_, PyAny>, nvme: Option<&Bound<'_, PyAny>>) -> PyResult<Self> {
        crate::logs::start();
        let config = config(&path, dram, nvme)?;
        let open = || if config.nvme.is_some() { embedded::open(&path, config) } else { embedded::open_alone(config) };
        Ok(Self(detached(py, open)?))
    }

    /// Stores a copy of the buffer's bytes under `name`.
    fn put(&self, py: Python<'_>, name: &[u8], data: &Bound<'_, PyAny>) -> PyResult<()> {
        let data = Contiguous::of(data)?;
        detached(py, || self.engine().put(name, data.bytes()))
    }

    /// The object's bytes, or `None`.
    fn get(&self, py: Python<'_>, name: &[u8]) -> PyResult<Option<Object>> {
        Ok(detached(py, || self.engine().get(name))?.map(Object))
    }

    /// Stores copies of many buffers under as many names, except those that are there: for each whether it was stored,
    /// or the kind of the error.
    fn put_new<'py>(
        &self,
        py: Python<'py>,
        names: Vec<PyBackedBytes>,
        data: Vec<Bound<'py, PyAny>>,
    ) -> PyResult<Vec<Outcome>> {
        let data = data.iter().map(Contiguous::of).collect::<PyResult<Vec<_>>>()?;
        same_number(names.len(), data.len())?;
        let put = |(name, data): (&PyBackedBytes, &Contiguous)| {
            if self.engine().contains(name) {
                return Outcome::Is(false);
            }
            self.engine().put(name, data.bytes()).map_or_else(Outcome::failed, |()| Outcome::Is(true))
        };
        Ok(py.detach(|| names.iter().zip(&data).map(put).collect()))
    }

    /// Copies many objects into as many buffers, read side by side: for each whether it is there now, or the kind of the
    /// error; `size` if the object is not as long as its buffer, which stays as it was then.
    fn get_into<'py>(
        &self,
        py: Python<'py>,
        names: Vec<PyBackedBytes>,
        into: Vec<Bound<'py, PyAny>>,
    ) -> PyResult<Vec<Outcome>> {
        let into = into.iter().map(Contiguous::writable).collect::<PyResult<Vec<_>>>()?;
        same_number(names.len(), into.len())?;
        let names: Vec<&[u8]> = names.iter().map(|name| &**name).collect();
        let mut outcomes = vec![Outcome::Is(false); names.len()];
        detached(py, || {
            self.engine().get_each(&names, &mut |place, got| {
                let (Some(outcome), Some(into)) = (outcomes.get_mut(place), into.get(place)) else { return };
                *outcome = match got {
                    Ok(Some(object)) if into.fill(&object) => Outcome::Is(true),
                    Ok(Some(_)) => Outcome::Failed("size"),
                    Ok(None) => Outcome::Is(false),
                    Err(error) => Outcome::failed(error),
                };
            })
        })?;
        Ok(outcomes)
    }

    /// For each of many names whether the object is there.
    fn contains_each(&self, py: Python<'_>, names: Vec<PyBackedBytes>) -> Vec<bool> {
        py.detach(|| names.iter().map(|name| self.engine().contains(name)).collect())
    }

    /// Removes an object; whether it was there.
    fn remove(&self, py: Python<'_>, name: &[u8]) -> PyResult<bool> {
        detached(py, || self.engine().remove(name))
    }

    /// Whether the object is there.
    fn contains(&self, py: Python<'_>, name: &[u8]) -> bool {
        py.detach(|| self.engine().contains(name))
    }

    /// Makes everything stored before durable, within `timeout` seconds.
    fn flush(&self, py: Python<'_>, timeout: f64) -> PyResult<()> {
        let deadline = deadline(timeout)?;
        detached(py, || self.engine().flush(deadline))
    }

    /// The statistics as a JSON text.
    fn stats_json(&self, py: Python<'_>) -> PyResult<String> {
        py.detach(|| serde_json::to_string(&self.engine().stats()))
            .map_err(|error| pyo3::exceptions::PyRuntimeError::new_err(error.to_string()))
    }

    /// Flushes and closes, within `timeout` seconds, unless somebody else in this process has the same store open.
    fn close(&self, py: Python<'_>, timeout: f64) -> PyResult<()> {
        let deadline = deadline(timeout)?;
        detached(py, || self.0.close(deadline))
    }
}

/// `timeout` seconds from now; refused unless it is a sane number.
pub(crate) fn deadline(timeout: f64) -> PyResult<Instant> {
    Ok(Instant::now() + duration(timeout)?)
}

/// A number of seconds from Python.
pub(crate) fn duration(seconds: f64) -> PyResult<Duration> {
    Duration::try_from_secs_f64(seconds)
        .ok()
        .filter(|duration| *duration <= Duration::from_secs(7 * 24 * 3600))
        .ok_or_else(|| {
            pyo3::exceptions::PyValueError::new_err(format!("a timeout of {seconds} seconds; give 0 to 604,800"))
        })
}

/// What became of one object among many.
#[derive(Clone, IntoPyObject)]
enum Outcome {
    Is(bool),
    /// The kind of the error.
    Failed(&'static str),
}

impl Outcome {
    fn failed(error: pegaflow_engine::Error) -> Self {
        Self::Failed(error.kind().as_str())
    }
}

fn same_number(names: usize, buffers: usize) -> PyResult<()> {
    if names == buffers {
        return Ok(());
    }
    Err(pyo3::exceptions::PyValueError::new_err(format!("{names} names for {buffers} buffers; give one for each")))
}

/// A C-contiguous buffer that Python lends for the time of a call.
struct Contiguous(PyBuffer<u8>);

impl Contiguous {
    fn of(data: &Bound<'_, PyAny>) -> PyResult<Self> {
        let view = data.py().import("builtins")?.getattr("memoryview")?.call1((data,))?;
        if !view.getattr("c_contiguous")?.extract::<bool>()? {
            return Err(PyBufferError::new_err(
                "the buffer is not C-contiguous; make it so first, for example with numpy.ascontiguousarray",
            ));
        }
        let view = if view.getattr("nbytes")?.extract::<usize>()? == 0 {
            data.py().import("builtins")?.getattr("memoryview")?.call1((pyo3::types::PyBytes::new(data.py(), b""),))?
        } else {
            view.call_method1("cast", ("B",))?
        };
        Ok(Self(PyBuffer::get(&view)?))
    }

    /// One that may be written to.
    fn writable(data: &Bound<'_, PyAny>) -> PyResult<Self> {
        let buffer = Self::of(data)?;
        if buffer.0.readonly() {
            return Err(PyBufferError::new_err("the buffer is read-only; give one that can be written to"));
        }
        Ok(buffer)
    }

    /// Copies `bytes` in, if they are as many as the buffer has; whether they were.
    fn fill(&self, bytes: &[u8]) -> bool {
        if bytes.len() != self.0.item_count() {
            return false;
        }
        // SAFETY: the view is contiguous, has one byte an item, can be written to and is as long as `bytes`; `self` holds
        // it, so the exporter keeps the memory in place. `bytes` lie in the cache's own memory, which no such buffer can
        // be over: what the cache hands out is read-only. Another thread that uses its own buffer meanwhile can see torn
        // bytes, never anything else.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.0.buf_ptr().cast(), bytes.len()) };
        true
    }

    fn bytes(&self) -> &[u8] {
        if self.0.item_count() == 0 {
            return &[];
        }
        // SAFETY: the view is contiguous, has one byte an item, and `self` holds it, so the exporter keeps the memory
        // in place until it is released. Another Python thread that writes into its own buffer during a put can tear
        // the object's bytes, never anything else: they are only copied and hashed.
        unsafe { std::slice::from_raw_parts(self.0.buf_ptr().cast(), self.0.item_count()) }
    }
}

/// The bytes of an object: a read-only buffer in the cache's own memory, which stays as long as this lives.
#[pyclass(module = "pegaflow._native", frozen)]
pub(crate) struct Object(ObjectBytes);

#[pymethods]
impl Object {
    fn __len__(&self) -> usize {
        self.0.len()
    }

    unsafe fn __getbuffer__(slf: Bound<'_, Self>, view: *mut pyo3::ffi::Py_buffer, flags: c_int) -> PyResult<()> {
        let bytes: &[u8] = &slf.get().0;
        let length = bytes.len().try_into().map_err(|_| PyBufferError::new_err("the object is too large"))?;
        // SAFETY: `view` is the request of the interpreter; the memory lies in a slot of the cache that `slf` holds, the
        // view takes a reference to `slf`, and nobody writes to a slot that is shared.
        let filled = unsafe {
            pyo3::ffi::PyBuffer_FillInfo(view, slf.as_ptr(), bytes.as_ptr().cast_mut().cast(), length, 1, flags)
        };
        if filled == 0 { Ok(()) } else { Err(PyErr::fetch(slf.py())) }
    }
}
