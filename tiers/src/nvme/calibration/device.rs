//! What device a file lies on, as far as sysfs tells: a copy of a store on another one is measured anew.

use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// Number, size, model and serial number of the device that holds a file, in one line.
pub(super) fn device_of(path: &Path) -> String {
    let Ok(metadata) = std::fs::metadata(path) else { return "unknown".into() };
    let device = metadata.dev();
    let number = format!("{}:{}", rustix::fs::major(device), rustix::fs::minor(device));
    let Ok(folder) = Path::new("/sys/dev/block").join(&number).canonicalize() else { return number };
    let disk = if folder.join("partition").exists() { folder.parent().unwrap_or(&folder) } else { &folder };
    let told = ["size", "device/model", "device/serial", "wwid"].map(|name| {
        let text = std::fs::read_to_string(disk.join(name)).unwrap_or_default();
        text.split_whitespace().collect::<Vec<_>>().join(" ")
    });
    std::iter::once(number).chain(told).filter(|text| !text.is_empty()).collect::<Vec<_>>().join(" ")
}

/// The release of the running kernel.
pub(super) fn kernel_release() -> String {
    let text = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    text.trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_is_told_alike_twice() {
        let program = std::env::current_exe().expect("the test's own path");
        assert_eq!(device_of(&program), device_of(program.parent().expect("a directory")));
        assert!(device_of(&program).contains(':') && !kernel_release().is_empty());
        assert_eq!(device_of(Path::new("/no/such/file")), "unknown");
    }
}
