//! Reads traces: JSON lines, plain or compressed.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;

use pegaflow_engine::{Error, ErrorKind, Result, Trace};
use serde_json::Value;

const ZSTD_MAGIC: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];
/// Longer lines are refused: nobody asks for so many blocks at once.
const LINE_BYTES_MAX: u64 = 64 << 20;

pub(super) fn read(path: &Path) -> Result<Trace> {
    let failed = |error| Error::from_io(format!("cannot read {}", path.display()), error);
    let mut file = BufReader::new(File::open(path).map_err(|error| crate::cannot_read(path, error))?);
    let is_compressed = file.fill_buf().map_err(failed)?.starts_with(&ZSTD_MAGIC);
    let mut lines: Box<dyn BufRead> = if is_compressed {
        Box::new(BufReader::new(zstd::Decoder::with_buffer(file).map_err(failed)?))
    } else {
        Box::new(file)
    };
    let mut trace = Trace::default();
    let mut line = Vec::new();
    for number in 1.. {
        line.clear();
        let length = lines.as_mut().take(LINE_BYTES_MAX).read_until(b'\n', &mut line).map_err(failed)?;
        if length == 0 {
            break;
        }
        if line.trim_ascii().is_empty() {
            continue;
        }
        add(&mut trace, &line).map_err(|what| {
            let message = format!("{}, line {number}: {what}", path.display());
            Error::new(ErrorKind::InvalidInput, message)
        })?;
    }
    if trace.references() == 0 {
        return Err(Error::new(ErrorKind::InvalidInput, format!("{} holds no requests for blocks", path.display())));
    }
    Ok(trace)
}

fn add(trace: &mut Trace, line: &[u8]) -> std::result::Result<(), String> {
    let request: Value = serde_json::from_slice(line.trim_ascii_end()).map_err(|error| {
        // It counts lines of its own.
        let text = error.to_string();
        let what = text.split(" at line ").next().unwrap_or_default();
        format!("not JSON: {what} at column {}", error.column())
    })?;
    if !request.is_object() {
        return Err("not a JSON object".into());
    }
    let time = request.get("timestamp").and_then(Value::as_f64).filter(|time| *time >= 0.0);
    let now_ms = time.ok_or("'timestamp' is missing, or not a number of ms")? as u64;
    let ids = request.get("hash_ids").and_then(Value::as_array).ok_or("'hash_ids' is missing, or not a list")?;
    let ids: Option<Vec<u64>> = ids.iter().map(Value::as_u64).collect();
    trace.push(now_ms, 0, ids.ok_or("'hash_ids' holds something else than whole numbers")?);
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn written(bytes: &[u8]) -> tempfile::NamedTempFile {
        let mut file = tempfile::NamedTempFile::new().expect("a file");
        file.write_all(bytes).expect("written");
        file
    }

    const LINES: &[u8] =
        b"{\"timestamp\": 0, \"input_length\": 9, \"hash_ids\": [0, 1]}\n\n{\"timestamp\":7,\"hash_ids\":[]}\n";

    #[test]
    fn plain_and_compressed_traces_are_the_same() {
        let compressed = zstd::encode_all(LINES, 1).expect("compressed");
        for bytes in [LINES, compressed.as_slice()] {
            let trace = read(written(bytes).path()).expect("a trace");
            assert_eq!((trace.len(), trace.references(), trace.unique_blocks()), (2, 2, 2));
        }
    }

    #[test]
    fn what_is_wrong_is_said_with_its_line() {
        for (bytes, expected) in [
            (&b"{\"timestamp\": 0, \"hash_ids\": []}\n{\"timestamp\": 1}"[..], "line 2: 'hash_ids' is missing"),
            (b"{\"hash_ids\": []}", "line 1: 'timestamp'"),
            (b"{\"timestamp\": 0, \"hash_ids\": [-1]}", "line 1: 'hash_ids' holds"),
            (b"[]x", "line 1: not JSON: trailing characters at column 3"),
            (b"\n{\"timestamp\": 0, \"hash_ids\": [1\n", "line 2: not JSON: EOF while parsing a list at column"),
            (b"[1]", "line 1: not a JSON object"),
            (b"{\"timestamp\": 0, \"hash_ids\": []}", "holds no requests"),
            (b"\n", "holds no requests"),
        ] {
            let error = read(written(bytes).path()).expect_err("not a trace");
            assert_eq!(error.kind(), ErrorKind::InvalidInput);
            assert!(error.to_string().contains(expected), "{error}");
        }
    }
}
