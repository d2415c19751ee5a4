//! The format, frozen: structures and a whole store as files under `tiers/fixtures/`, sane and damaged. A test draws each
//! structure from `docs/format.md`, field by field at its offset, and compares it with the file; the code must read the file
//! as the values that are meant, and write the same bytes again. So neither the layout nor the page can change unnoticed.
//!
//! Each file is one structure, compressed with zstd: `zstd -dc FILE | xxd` shows it. `make fixtures` writes those that are
//! missing and touches no other: a version of the format that was released stays as it is for ever.

mod damaged;
mod drawing;
mod payloads;
mod structures;
mod whole_store;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// Where the fixtures of this version of the format are.
fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/v1")
}

fn path_of(name: &str) -> PathBuf {
    root().join(format!("{name}.zst"))
}

/// The bytes of a fixture.
fn read(name: &str) -> Vec<u8> {
    try_read(name).unwrap_or_else(|| panic!("the fixture {name} is missing; `make fixtures` writes it"))
}

fn try_read(name: &str) -> Option<Vec<u8>> {
    let packed = std::fs::read(path_of(name)).ok()?;
    Some(zstd::decode_all(packed.as_slice()).unwrap_or_else(|error| panic!("the fixture {name}: {error}")))
}

fn write(name: &str, bytes: &[u8]) {
    let path = path_of(name);
    std::fs::create_dir_all(path.parent().expect("a directory")).expect("made");
    std::fs::write(path, zstd::encode_all(bytes, 19).expect("compressed")).expect("written");
}

/// All fixtures below a folder, by name.
fn names_below(folder: &str) -> BTreeSet<String> {
    let mut names = BTreeSet::new();
    let mut folders = vec![root().join(folder)];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).into_iter().flatten() {
            let path = entry.expect("an entry").path();
            if path.is_dir() {
                folders.push(path);
            } else {
                let name = path.strip_prefix(root()).expect("below").to_string_lossy().into_owned();
                names.insert(name.strip_suffix(".zst").unwrap_or_else(|| panic!("what is {name}?")).to_owned());
            }
        }
    }
    names
}

/// The 64-bit number at an offset.
fn word_at(bytes: &[u8], at: usize) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(word)
}

/// Every structure, sane and damaged, by the name of its file.
fn drawn() -> Vec<(String, Vec<u8>)> {
    let sane = structures::drawn().into_iter().chain(payloads::drawn());
    sane.map(|(name, bytes)| (name.to_owned(), bytes)).chain(damaged::drawn()).collect()
}

#[test]
fn each_fixture_is_what_format_md_draws() {
    let drawn = drawn();
    for (name, bytes) in &drawn {
        let found = read(name);
        let differs = found.iter().zip(bytes).position(|(found, drawn)| found != drawn);
        assert!(&found == bytes, "{name}: {} bytes, drawn {}, differs at {differs:?}", found.len(), bytes.len());
    }
    let mut names: BTreeSet<String> = drawn.into_iter().map(|(name, _)| name).collect();
    let count = names.len();
    names.extend(names_below("store"));
    assert_eq!(names_below(""), names, "each file is used, and each name is there once");
    assert!(count > 70, "{count}");
}

/// The recipe `make fixtures`.
#[test]
#[ignore = "writes files of the repository"]
fn write_missing_fixtures() {
    for (name, bytes) in drawn() {
        if try_read(&name).is_none() {
            write(&name, &bytes);
            println!("{name}: {} bytes", bytes.len());
        }
    }
    if names_below("store").is_empty() {
        whole_store::write_all();
    }
}
