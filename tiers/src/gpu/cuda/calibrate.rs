//! How many CTAs the copy kernel takes on this GPU: the fewest that come within 2 % of the fastest, so that the others are
//! left to decoding. Measured once per GPU and driver; the result is kept in the user's cache folder.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::device::Core;
use super::driver::{self, Event, PinnedBuffer};
use super::kernel::Other;
use super::method::{STAGING_BYTES, Tuning};
use super::plan::{Cursor, Geometry};
use crate::dram::Place;
use crate::error::{Error, ErrorKind, Result};

const CANDIDATES: [u32; 4] = [4, 8, 16, 32];
/// Bytes of a measurement.
const MEASURED_BYTES: u64 = 64 << 20;
const REPEATS: usize = 3;
const FRAGMENT_BYTES: u64 = 64 << 10;
const BLOCK_FRAGMENTS: u64 = 16;
/// How much slower than the fastest is as good.
const TOLERANCE: f64 = 1.02;

/// What is kept on disk.
#[derive(Serialize, Deserialize)]
struct Kept {
    load_ctas: u32,
    staging_ctas: u32,
}

/// What was found before on this GPU with this driver, or else is found now.
pub(super) fn tuning(core: &Core) -> Result<Tuning> {
    let path = cache_file(core)?;
    let kept = path.as_ref().and_then(|path| std::fs::read(path).ok());
    if let Some(kept) = kept.and_then(|bytes| serde_json::from_slice::<Kept>(&bytes).ok())
        && CANDIDATES.contains(&kept.load_ctas)
        && CANDIDATES.contains(&kept.staging_ctas)
    {
        return Ok(Tuning { load_ctas: kept.load_ctas, staging_ctas: kept.staging_ctas });
    }
    let tuning = measure(core)?;
    if let Some(path) = path
        && let Err(error) = keep(&path, tuning)
    {
        tracing::debug!(%error, path = %path.display(), "the calibration is not kept");
    }
    Ok(tuning)
}

/// `None` for users without a cache folder.
fn cache_file(core: &Core) -> Result<Option<PathBuf>> {
    let absolute = |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let folder = absolute("XDG_CACHE_HOME").or_else(|| absolute("HOME").map(|home| home.join(".cache")));
    let (uuid, version) = (core.tools.context.uuid()?, driver::version()?);
    Ok(folder.map(|folder| folder.join("pegaflow").join(format!("gpu-{uuid}-{version}.json"))))
}

fn keep(path: &std::path::Path, tuning: Tuning) -> std::io::Result<()> {
    let Some(folder) = path.parent() else { return Ok(()) };
    std::fs::create_dir_all(folder)?;
    let Tuning { load_ctas, staging_ctas } = tuning;
    let text = serde_json::to_string(&Kept { load_ctas, staging_ctas })?;
    // Another process may do the same.
    let temporary = path.with_extension(format!("{}.tmp", std::process::id()));
    std::fs::write(&temporary, text)?;
    std::fs::rename(&temporary, path)
}

/// Measures with the memory for staging of saves, which waits meanwhile.
fn measure(core: &Core) -> Result<Tuning> {
    let tools = &core.tools;
    let _entered = tools.context.enter()?;
    let mut saves = core.saves.lock();
    driver::wait(|| saves.progress())?;
    let device = saves
        .staging_address(tools)
        .ok_or_else(|| Error::new(ErrorKind::NoSpace, "there is no GPU memory to measure with"))?;
    let block_bytes = FRAGMENT_BYTES * BLOCK_FRAGMENTS;
    let blocks = (STAGING_BYTES / block_bytes) as u32;
    // Like layers: the fragments of a block are far apart.
    let geometry = Geometry::new(
        (0..BLOCK_FRAGMENTS)
            .map(|fragment| (device + fragment * u64::from(blocks) * FRAGMENT_BYTES, FRAGMENT_BYTES, FRAGMENT_BYTES)),
    );
    let (host, table) = core.keep_calibration((
        PinnedBuffer::new(&tools.context, STAGING_BYTES as usize)?,
        core.upload(geometry.slices())?,
    ));
    let order: Vec<(u32, Place)> = (0..blocks).rev().map(|block| (block, Place(0))).collect();
    let (begin, end) = (Event::timed(&tools.context)?, Event::timed(&tools.context)?);
    let time = |ctas: u32, to_device: bool, other: u64| -> Result<f64> {
        let mut times = Vec::with_capacity(REPEATS);
        for _ in 0..REPEATS {
            begin.record(core.setup.handle())?;
            for _ in 0..MEASURED_BYTES / STAGING_BYTES {
                let piece = Cursor::default().next(&geometry, order.len(), STAGING_BYTES);
                let piece = piece.ok_or_else(|| Error::new(ErrorKind::InvalidInput, "there is nothing to measure"))?;
                let other = Other::Staging(other);
                // SAFETY: the staging memory is ours while the lane is locked, the others until the end of this function;
                // all are as long as the piece. The wait below comes before any of them goes.
                unsafe {
                    tools.kernel.queue(&core.setup, ctas, to_device, table.address(), (&order, &piece), other)?;
                }
            }
            end.record(core.setup.handle())?;
            driver::wait(|| end.progress())?;
            times.push(f64::from(tools.symbols.elapsed_ms(&begin, &end).unwrap_or(f32::MAX)));
        }
        Ok(median(times))
    };
    let fewest = |to_device, other| -> Result<u32> {
        let mut measured = Vec::with_capacity(CANDIDATES.len());
        for ctas in CANDIDATES {
            measured.push((ctas, time(ctas, to_device, other)?));
        }
        tracing::debug!(?measured, to_device, "milliseconds for 64 MiB, by CTAs");
        Ok(fewest_ctas(&measured))
    };
    let result = fewest(true, host.address())
        .and_then(|load_ctas| Ok(Tuning { load_ctas, staging_ctas: fewest(false, device + STAGING_BYTES)? }));
    // Whatever happened: nothing may run on the memory that goes now.
    driver::wait(|| core.setup.progress())?;
    result
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::MAX)
}

fn fewest_ctas(measured: &[(u32, f64)]) -> u32 {
    let best = measured.iter().map(|(_, time)| *time).fold(f64::MAX, f64::min);
    let good = measured.iter().filter(|(_, time)| *time <= best * TOLERANCE).map(|(ctas, _)| *ctas);
    good.min().unwrap_or(Tuning::DEFAULT.load_ctas)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_fewest_ctas_that_are_as_good_win() {
        assert_eq!(fewest_ctas(&[(4, 2.0), (8, 1.01), (16, 1.0), (32, 1.005)]), 8);
        assert_eq!(fewest_ctas(&[(4, 4.0), (8, 2.0), (16, 1.5), (32, 1.0)]), 32);
        assert_eq!(fewest_ctas(&[]), Tuning::DEFAULT.load_ctas);
    }

    #[test]
    fn a_median_is_the_middle() {
        assert_eq!(median(vec![3.0, 1.0, 2.0]), 2.0);
    }
}
