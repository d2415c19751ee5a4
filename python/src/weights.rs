//! Digests of model files, for the identity of a namespace: which weights made these bytes.
//!
//! The sampled digest reads a few KiB of every tensor, so it costs milliseconds and tells apart any two models that
//! differ in a name, a shape, a type or a sampled byte of any tensor. The full digest reads everything.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use pegaflow_engine::{Error, ErrorKind, Result};
use pyo3::prelude::*;

use crate::error::detached;

const SAMPLED_CONTEXT: &str = "pegaflow 2026-11-22 sampled weights v1";
const FULL_CONTEXT: &str = "pegaflow 2026-11-22 full weights v1";
const CONTENT_CONTEXT: &str = "pegaflow 2026-11-22 content v1";
const SAMPLE_BYTES: u64 = 4096;
/// Samples of a file whose inside is not known.
const SAMPLES_PER_FILE: u64 = 64;
/// The limit that the format's own library has.
const SAFETENSORS_HEADER_MAX: u64 = 100_000_000;

/// The sampled digest of the weight files: for safetensors the name, type, shape and three samples of every tensor, in
/// the order of their names; for other formats the size and 64 samples of every file.
#[pyfunction]
pub(crate) fn digest_weights(py: Python<'_>, files: Vec<PathBuf>) -> PyResult<String> {
    detached(py, || sampled(&files))
}

/// The digest of every byte of the files, and of their names. Reads everything.
#[pyfunction]
pub(crate) fn full_digest(py: Python<'_>, files: Vec<PathBuf>) -> PyResult<String> {
    detached(py, || full(&files))
}

/// The digest of some bytes.
#[pyfunction]
pub(crate) fn content_digest(data: &[u8]) -> String {
    blake3::Hasher::new_derive_key(CONTENT_CONTEXT).update(data).finalize().to_hex().to_string()
}

fn full(files: &[PathBuf]) -> Result<String> {
    let mut hasher = blake3::Hasher::new_derive_key(FULL_CONTEXT);
    for path in sorted_by_name(files)? {
        let mut contents = blake3::Hasher::new();
        let mut file = open(path)?;
        contents.update_reader(&mut file).map_err(|error| read_error(path, error))?;
        update_text(&mut hasher, &name_of(path));
        hasher.update(contents.finalize().as_bytes());
    }
    Ok(hasher.finalize().to_hex().to_string())
}

fn sampled(files: &[PathBuf]) -> Result<String> {
    let mut hasher = blake3::Hasher::new_derive_key(SAMPLED_CONTEXT);
    let mut tensors = Vec::new();
    let mut others = Vec::new();
    for path in sorted_by_name(files)? {
        if path.extension().is_some_and(|extension| extension == "safetensors") {
            tensors.extend(tensors_of(path)?);
        } else {
            others.push(path);
        }
    }
    tensors.sort_by(|a, b| (&a.name, &a.path).cmp(&(&b.name, &b.path)));
    let mut open_file: Option<(PathBuf, File)> = None;
    for tensor in &tensors {
        if open_file.as_ref().is_none_or(|(path, _)| *path != tensor.path) {
            open_file = Some((tensor.path.clone(), open(&tensor.path)?));
        }
        let Some((path, file)) = &mut open_file else { continue };
        update_text(&mut hasher, &tensor.name);
        update_text(&mut hasher, &tensor.kind);
        hasher.update(&tensor.bytes.to_le_bytes());
        let last = tensor.bytes.saturating_sub(SAMPLE_BYTES);
        for at in [0, last / 2, last] {
            sample(&mut hasher, path, file, tensor.start + at, tensor.bytes.min(SAMPLE_BYTES))?;
        }
    }
    for path in others {
        let mut file = open(path)?;
        let bytes = file.metadata().map_err(|error| read_error(path, error))?.len();
        update_text(&mut hasher, &name_of(path));
        hasher.update(&bytes.to_le_bytes());
        let last = bytes.saturating_sub(SAMPLE_BYTES);
        for index in 0..=SAMPLES_PER_FILE {
            let at = (u128::from(last) * u128::from(index) / u128::from(SAMPLES_PER_FILE)) as u64;
            sample(&mut hasher, path, &mut file, at, bytes.min(SAMPLE_BYTES))?;
        }
    }
    Ok(hasher.finalize().to_hex().to_string())
}

struct Tensor {
    path: PathBuf,
    name: String,
    /// Type and shape, as the header has them.
    kind: String,
    /// From the start of the file.
    start: u64,
    bytes: u64,
}

/// The tensors of a safetensors file: 8 bytes with the header's length, a JSON header, the data.
fn tensors_of(path: &Path) -> Result<Vec<Tensor>> {
    let bad =
        |why: &str| Error::new(ErrorKind::InvalidInput, format!("{} is no safetensors file: {why}", path.display()));
    let mut file = open(path)?;
    let file_bytes = file.metadata().map_err(|error| read_error(path, error))?.len();
    let mut length = [0; 8];
    file.read_exact(&mut length).map_err(|error| read_error(path, error))?;
    let length = u64::from_le_bytes(length);
    if length > SAFETENSORS_HEADER_MAX || length + 8 > file_bytes {
        return Err(bad(&format!("a header of {length} bytes in {file_bytes}")));
    }
    let mut header = vec![0; length as usize];
    file.read_exact(&mut header).map_err(|error| read_error(path, error))?;
    let header: serde_json::Map<String, serde_json::Value> =
        serde_json::from_slice(&header).map_err(|error| bad(&error.to_string()))?;
    let mut tensors = Vec::with_capacity(header.len());
    for (name, entry) in header {
        if name == "__metadata__" {
            continue;
        }
        let offset = |index: usize| entry.get("data_offsets")?.get(index)?.as_u64();
        let (Some(begin), Some(end)) = (offset(0), offset(1)) else {
            return Err(bad(&format!("tensor {name} has no data_offsets")));
        };
        if begin > end || end > file_bytes - 8 - length {
            return Err(bad(&format!("tensor {name} ends outside the file")));
        }
        let kind = format!("{}{}", entry["dtype"], entry["shape"]);
        tensors.push(Tensor { path: path.into(), name, kind, start: 8 + length + begin, bytes: end - begin });
    }
    Ok(tensors)
}

fn sample(hasher: &mut blake3::Hasher, path: &Path, file: &mut File, at: u64, bytes: u64) -> Result<()> {
    let mut buffer = vec![0; bytes as usize];
    file.seek(SeekFrom::Start(at))
        .and_then(|_| file.read_exact(&mut buffer))
        .map_err(|error| read_error(path, error))?;
    hasher.update(&buffer);
    Ok(())
}

fn sorted_by_name(files: &[PathBuf]) -> Result<Vec<&Path>> {
    if files.is_empty() {
        return Err(Error::new(ErrorKind::InvalidInput, "no weight files to digest; give at least one"));
    }
    let mut sorted: Vec<&Path> = files.iter().map(PathBuf::as_path).collect();
    sorted.sort_by_key(|path| (path.file_name(), *path));
    Ok(sorted)
}

fn update_text(hasher: &mut blake3::Hasher, text: &str) {
    hasher.update(&(text.len() as u64).to_le_bytes()).update(text.as_bytes());
}

fn name_of(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

fn open(path: &Path) -> Result<File> {
    File::open(path).map_err(|error| Error::from_io(format!("cannot open {}", path.display()), error))
}

fn read_error(path: &Path, error: std::io::Error) -> Error {
    Error::from_io(format!("cannot read {}", path.display()), error)
}
