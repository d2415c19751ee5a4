//! On which NUMA nodes the arena's memory belongs: near the GPUs that copy from it and to it. Reads sysfs, changes
//! nothing.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

const NVIDIA: &str = "0x10de";
/// The PCI class of display controllers, 3D controllers included.
const DISPLAY: &str = "0x03";

/// Where memory is to be taken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Placement {
    /// The kernel decides.
    Anywhere,
    /// On this node as long as it has room.
    Preferred(u32),
    /// Evenly on these nodes.
    Interleaved(BTreeSet<u32>),
}

/// Where the memory belongs on a host whose sysfs is at `sys`: on the node of the GPUs, or evenly on theirs; anywhere
/// on a host of one node, without GPUs, or if it is not known where one of them is.
pub(super) fn placement(sys: &Path) -> Placement {
    let names = entries(&sys.join("devices/system/node"));
    let is_node = |path: &PathBuf| {
        let number = path.file_name().and_then(|name| name.to_str()?.strip_prefix("node"));
        number.is_some_and(|number| number.parse::<u32>().is_ok())
    };
    if names.iter().filter(|path| is_node(path)).count() < 2 {
        return Placement::Anywhere;
    }
    let gpus = entries(&sys.join("bus/pci/devices"));
    let nodes = gpus.iter().filter(|device| is_gpu(device)).map(|gpu| read(gpu, "numa_node").parse::<u32>());
    // The kernel says -1 for a device of which it does not know: that is no `u32`.
    let Ok(nodes) = nodes.collect::<Result<BTreeSet<u32>, _>>() else { return Placement::Anywhere };
    match nodes.first() {
        None => Placement::Anywhere,
        Some(node) if nodes.len() == 1 => Placement::Preferred(*node),
        Some(_) => Placement::Interleaved(nodes),
    }
}

fn is_gpu(device: &Path) -> bool {
    read(device, "vendor") == NVIDIA && read(device, "class").starts_with(DISPLAY)
}

fn read(device: &Path, file: &str) -> String {
    fs::read_to_string(device.join(file)).unwrap_or_default().trim().to_owned()
}

fn entries(directory: &Path) -> Vec<PathBuf> {
    let found = fs::read_dir(directory).into_iter().flatten();
    found.filter_map(|entry| Some(entry.ok()?.path())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A host with `nodes` nodes and devices of (vendor, class, node).
    fn host(nodes: u32, devices: &[(&str, &str, &str)]) -> Placement {
        let sys = tempfile::tempdir().expect("a directory");
        for node in 0..nodes {
            fs::create_dir_all(sys.path().join(format!("devices/system/node/node{node}"))).expect("made");
        }
        for other in ["power", "nodes"] {
            fs::create_dir_all(sys.path().join("devices/system/node").join(other)).expect("made");
        }
        for (number, (vendor, class, node)) in devices.iter().enumerate() {
            let device = sys.path().join(format!("bus/pci/devices/0000:{number:02x}:00.0"));
            fs::create_dir_all(&device).expect("made");
            for (file, text) in [("vendor", vendor), ("class", class), ("numa_node", node)] {
                fs::write(device.join(file), format!("{text}\n")).expect("written");
            }
        }
        placement(sys.path())
    }

    #[test]
    fn memory_belongs_where_the_gpus_are() {
        let gpu = |node| ("0x10de", "0x030200", node);
        let bridge = ("0x10de", "0x068000", "0");
        let other = ("0x1a03", "0x030000", "0");
        assert_eq!(host(2, &[bridge, gpu("1"), other, gpu("1")]), Placement::Preferred(1));
        assert_eq!(host(2, &[("0x10de", "0x030000", "0")]), Placement::Preferred(0));
        assert_eq!(host(4, &[gpu("3"), gpu("1"), gpu("3")]), Placement::Interleaved(BTreeSet::from([1, 3])));
    }

    #[test]
    fn the_kernel_decides_where_nothing_is_known() {
        let gpu = |node| ("0x10de", "0x030200", node);
        assert_eq!(host(1, &[gpu("0")]), Placement::Anywhere, "one node");
        assert_eq!(host(2, &[]), Placement::Anywhere, "no device");
        assert_eq!(host(2, &[("0x8086", "0x030200", "1"), ("0x10de", "0x020000", "1")]), Placement::Anywhere);
        assert_eq!(host(2, &[gpu("-1")]), Placement::Anywhere);
        assert_eq!(host(2, &[gpu("0"), gpu("-1")]), Placement::Anywhere);
        assert_eq!(placement(Path::new("/nowhere")), Placement::Anywhere);
    }
}
