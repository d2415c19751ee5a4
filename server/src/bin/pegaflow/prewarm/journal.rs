//! Which prompts are done: a file of lines beside the prompts, so that a run that was cut goes on where it was. A prompt is
//! noted when all of its blocks are durable. The first line says for which model and cache that holds.

use std::collections::HashSet;
use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use pegaflow_engine::{Error, ErrorKind, Result};
use serde_json::{Value, json};

use super::prompts::PromptId;

/// The journal of one file of prompts.
#[derive(Debug)]
pub(super) struct Journal {
    path: PathBuf,
    file: File,
    done: HashSet<PromptId>,
}

impl Journal {
    /// Opens the journal, or begins one. With `anew` what it says is forgotten. Nothing is written before the first note
    /// but its first line.
    ///
    /// # Errors
    /// `InvalidInput` if it is no journal, or one of another model or cache; `Io`; `Busy` while another run writes it.
    pub(super) fn open(path: &Path, of: &Value, anew: bool) -> Result<Self> {
        let io = |error| Error::from_io(format!("the journal {}", path.display()), error);
        let mut file = OpenOptions::new().read(true).append(true).create(true).open(path).map_err(io)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(std::fs::TryLockError::WouldBlock) => {
                let message = format!("another run is at work on the journal {}; wait for it", path.display());
                return Err(Error::new(ErrorKind::Busy, message));
            }
            Err(std::fs::TryLockError::Error(error)) => return Err(io(error)),
        }
        let mut text = String::new();
        file.read_to_string(&mut text).map_err(io)?;
        let mut journal = Self { path: path.to_owned(), file, done: HashSet::new() };
        // What was cut off in the middle of a line does not count; what follows begins a line of its own.
        let whole = text.rfind('\n').map_or(0, |end| end + 1);
        let mut lines = text.get(..whole).unwrap_or_default().lines();
        let first = lines.next();
        let head: Value = first.and_then(|first| serde_json::from_str(first).ok()).unwrap_or_default();
        // Before anything is written: it may be somebody's file.
        if !text.is_empty() && head.get("pegaflow_prewarm") != Some(&json!(1)) {
            return Err(journal.bad("is no journal of pegaflow prewarm; give another --journal"));
        }
        journal.file.set_len(if anew { 0 } else { whole as u64 }).map_err(io)?;
        if anew || first.is_none() {
            journal.append(&format!("{}\n", json!({ "pegaflow_prewarm": 1, "of": of })))?;
            return Ok(journal);
        }
        if head.get("of") != Some(of) {
            let was = head.get("of").map(ToString::to_string).unwrap_or_default();
            return Err(journal.bad(&format!(
                "says what is done for {was}, and this is {of}; give another --journal, or --again to compute all prompts"
            )));
        }
        for (number, line) in lines.enumerate() {
            match line.parse() {
                Ok(id) => journal.done.insert(id),
                Err(()) => return Err(journal.bad(&format!("has a line that is none, number {}", number + 2))),
            };
        }
        Ok(journal)
    }

    fn bad(&self, what: &str) -> Error {
        Error::new(ErrorKind::InvalidInput, format!("{} {what}", self.path.display()))
    }

    /// Whether a prompt is done.
    pub(super) fn has(&self, id: &PromptId) -> bool {
        self.done.contains(id)
    }

    /// Notes prompts whose blocks are durable; the note is, too.
    ///
    /// # Errors
    /// `Io`.
    pub(super) fn note(&mut self, ids: impl IntoIterator<Item = PromptId>) -> Result<()> {
        let ids: Vec<PromptId> = ids.into_iter().collect();
        self.append(&ids.iter().map(|id| format!("{id}\n")).collect::<String>())?;
        self.done.extend(ids);
        Ok(())
    }

    fn append(&mut self, text: &str) -> Result<()> {
        let written = self.file.write_all(text.as_bytes()).and_then(|()| self.file.sync_data());
        written.map_err(|error| Error::from_io(format!("the journal {}", self.path.display()), error))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(number: u8) -> PromptId {
        PromptId([number; 16])
    }

    #[test]
    fn a_journal_goes_on_where_it_was() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("journal");
        let of = json!({ "model": "m" });
        let mut journal = Journal::open(&path, &of, false).expect("begun");
        journal.note([id(1), id(2)]).expect("noted");
        let second = Journal::open(&path, &of, false).expect_err("in use");
        assert_eq!(second.kind(), ErrorKind::Busy);
        drop(journal);
        // Cut in the middle of a line.
        let whole = std::fs::read(&path).expect("there");
        std::fs::write(&path, &whole[..whole.len() - 5]).expect("cut");
        let mut journal = Journal::open(&path, &of, false).expect("goes on");
        assert!(journal.has(&id(1)) && !journal.has(&id(2)));
        journal.note([id(3)]).expect("noted");
        drop(journal);
        let journal = Journal::open(&path, &of, false).expect("goes on");
        assert!(journal.has(&id(1)) && !journal.has(&id(2)) && journal.has(&id(3)));
        drop(journal);
        assert!(!Journal::open(&path, &of, true).expect("anew").has(&id(1)));
    }

    #[test]
    fn a_journal_of_something_else_is_refused() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("journal");
        drop(Journal::open(&path, &json!({ "model": "m" }), false).expect("begun"));
        let error = Journal::open(&path, &json!({ "model": "n" }), false).expect_err("another model");
        assert_eq!(error.kind(), ErrorKind::InvalidInput);
        for (precious, anew) in
            [("{\"prompt\": \"mine\"}\n", false), ("{\"prompt\": \"mine\"}\n", true), ("mine", false)]
        {
            std::fs::write(&path, precious).expect("written");
            Journal::open(&path, &json!({ "model": "m" }), anew).expect_err("no journal");
            assert_eq!(std::fs::read_to_string(&path).expect("there"), precious);
        }
    }
}
