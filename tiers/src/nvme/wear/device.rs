//! From a path to the NVMe controllers under it, by what sysfs says: file system - partition - mapped device or array -
//! namespace - controller.

use std::collections::BTreeSet;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Mapped devices and arrays on top of each other, at most.
const LAYERS_MAX: u32 = 8;
/// Devices looked at, at most.
const DEVICES_MAX: usize = 64;

/// The controllers (`nvme0`) that hold the file system of `path`; empty if there are none or it can not be told.
pub fn controllers_of(path: &Path) -> Vec<String> {
    match std::fs::metadata(path) {
        Ok(metadata) => {
            let device = metadata.dev();
            controllers_under(Path::new("/sys"), rustix::fs::major(device), rustix::fs::minor(device))
        }
        Err(_) => Vec::new(),
    }
}

fn controllers_under(sysfs: &Path, major: u32, minor: u32) -> Vec<String> {
    let mut found = BTreeSet::new();
    let mut left = DEVICES_MAX;
    // File systems without a block device of their own (overlay, tmpfs, network) have none here.
    if let Ok(device) = sysfs.join(format!("dev/block/{major}:{minor}")).canonicalize() {
        visit(&device, LAYERS_MAX, &mut left, &mut found);
    }
    found.into_iter().collect()
}

fn visit(device: &Path, layers: u32, left: &mut usize, found: &mut BTreeSet<String>) {
    if layers == 0 || *left == 0 {
        return;
    }
    *left -= 1;
    let below = entries(&device.join("slaves"));
    if !below.is_empty() {
        return below
            .iter()
            .filter_map(|one| one.canonicalize().ok())
            .for_each(|one| visit(&one, layers - 1, left, found));
    }
    let disk = if device.join("partition").exists() { device.parent().unwrap_or(device) } else { device };
    if !disk.file_name().and_then(|name| name.to_str()).is_some_and(is_namespace) {
        return;
    }
    let above = disk.ancestors().skip(1);
    let controller = above.filter_map(|folder| folder.file_name()?.to_str()).find(|name| is_controller(name));
    match controller {
        Some(controller) => drop(found.insert(controller.to_owned())),
        // A drive with several ways to it: the controllers are beside the namespace, and each knows the drive's health.
        None => {
            let beside = entries(disk.parent().unwrap_or(disk));
            let names = beside.iter().filter_map(|one| one.file_name()?.to_str());
            found.extend(names.filter(|name| is_controller(name)).min().map(str::to_owned));
        }
    }
}

fn entries(folder: &Path) -> Vec<PathBuf> {
    let listed = std::fs::read_dir(folder).into_iter().flatten().filter_map(|entry| Some(entry.ok()?.path()));
    listed.take(DEVICES_MAX).collect()
}

/// `nvme0`.
pub(super) fn is_controller(name: &str) -> bool {
    name.strip_prefix("nvme").is_some_and(is_number)
}

/// `nvme0n1`, also `nvme0c1n1`.
fn is_namespace(name: &str) -> bool {
    name.strip_prefix("nvme")
        .and_then(|rest| rest.rsplit_once('n'))
        .is_some_and(|(controller, namespace)| is_number(namespace) && controller.split('c').all(is_number))
}

fn is_number(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit())
}

#[cfg(test)]
mod tests {
    use std::fs::{create_dir_all, write};
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn names_are_told_apart() {
        assert!(["nvme0", "nvme12"].into_iter().all(is_controller));
        assert!(["nvme", "nvme0n1", "nvme-subsys0", "sda", "nvme0x"].into_iter().all(|name| !is_controller(name)));
        assert!(["nvme0n1", "nvme12n34", "nvme0c1n1"].into_iter().all(is_namespace));
        assert!(["nvme0", "nvme0n1p1", "sdan1", "dm-0"].into_iter().all(|name| !is_namespace(name)));
    }

    #[test]
    fn controllers_are_found_through_partitions_arrays_and_several_ways() {
        let sysfs = tempfile::tempdir().expect("a directory");
        let sysfs = sysfs.path();
        let folder = |path: &str| {
            let folder = sysfs.join(path);
            create_dir_all(&folder).expect("made");
            folder
        };
        folder("dev/block");
        let device = |number: &str, to: &Path| symlink(to, sysfs.join("dev/block").join(number)).expect("linked");
        let disk = folder("devices/pci0000:00/0000:00:1f.0/nvme/nvme3/nvme3n1");
        let partition = folder("devices/pci0000:00/0000:00:1f.0/nvme/nvme3/nvme3n1/nvme3n1p2");
        write(partition.join("partition"), "2\n").expect("written");
        folder("devices/pci0000:00/0000:00:1f.0/nvme/nvme3/nvme3n1/nvme3n1p2/slaves");
        device("259:0", &disk);
        device("259:2", &partition);
        let shared = folder("devices/virtual/nvme-subsystem/nvme-subsys0/nvme0n1");
        folder("devices/virtual/nvme-subsystem/nvme-subsys0/nvme1");
        folder("devices/virtual/nvme-subsystem/nvme-subsys0/nvme0");
        device("259:5", &shared);
        let array = folder("devices/virtual/block/md0");
        for (name, below) in [("nvme3n1p2", &partition), ("nvme0n1", &shared)] {
            symlink(below, folder("devices/virtual/block/md0/slaves").join(name)).expect("linked");
        }
        device("9:0", &array);
        let mapped = folder("devices/virtual/block/dm-0");
        symlink(&array, folder("devices/virtual/block/dm-0/slaves").join("md0")).expect("linked");
        device("253:0", &mapped);
        let other = folder("devices/pci0000:00/virtio0/block/vda");
        device("254:0", &other);
        // A loop that no kernel makes.
        let odd = folder("devices/virtual/block/dm-7");
        symlink(&odd, folder("devices/virtual/block/dm-7/slaves").join("dm-7")).expect("linked");
        device("253:7", &odd);
        let found = |major, minor| controllers_under(sysfs, major, minor).join(" ");
        assert_eq!(found(259, 0), "nvme3");
        assert_eq!(found(259, 2), "nvme3");
        assert_eq!(found(259, 5), "nvme0");
        assert_eq!(found(9, 0), "nvme0 nvme3");
        assert_eq!(found(253, 0), "nvme0 nvme3");
        assert_eq!(found(254, 0), "");
        assert_eq!(found(253, 7), "");
        assert_eq!(found(0, 42), "");
    }
}
