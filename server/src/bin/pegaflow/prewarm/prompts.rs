//! The prompts of a file, one JSON object a line: what vLLM takes, or lines of an OpenAI batch. All of them are checked before
//! anything is computed; only where they lie and their digests are kept in memory.

use std::collections::HashSet;
use std::fs::File;
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom};
use std::path::Path;

use pegaflow_engine::{Error, ErrorKind, Result};
use serde_json::{Map, Value};

/// The longest line.
const LINE_BYTES_MAX: u64 = 64 << 20;
/// Problems that are named; the rest are counted.
const PROBLEMS_MAX: usize = 20;
/// What counts of a line.
const FIELDS: [&str; 7] =
    ["prompt", "prompt_token_ids", "messages", "cache_salt", "tools", "chat_template_kwargs", "add_generation_prompt"];

/// Names a prompt by its content: equal prompts have one name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct PromptId(pub(super) [u8; 16]);

impl PromptId {
    /// Of a prompt with the fields that count.
    fn of(prompt: &Value) -> Self {
        // The names are sorted, so that the text is one for all orders of the fields.
        let digest = blake3::hash(prompt.to_string().as_bytes());
        let mut id = [0; 16];
        id.iter_mut().zip(digest.as_bytes()).for_each(|(to, from)| *to = *from);
        Self(id)
    }
}

impl std::fmt::Display for PromptId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl std::str::FromStr for PromptId {
    type Err = ();

    fn from_str(text: &str) -> std::result::Result<Self, ()> {
        let number = u128::from_str_radix(text, 16).map_err(|_| ())?;
        if text.len() == 32 { Ok(Self(number.to_be_bytes())) } else { Err(()) }
    }
}

/// Where a prompt lies in its file.
#[derive(Debug, Clone, Copy)]
pub(super) struct Place {
    pub(super) id: PromptId,
    offset: u64,
    /// Bytes of its line.
    pub(super) bytes: u64,
    /// The number of its line, from 1.
    pub(super) line: u64,
}

/// A checked file of prompts.
#[derive(Debug)]
pub(super) struct PromptFile {
    file: File,
    /// Each once, in the order of the file.
    pub(super) places: Vec<Place>,
    /// Lines whose prompt had come before.
    pub(super) duplicates: u64,
}

impl PromptFile {
    /// Reads and checks all lines.
    ///
    /// # Errors
    /// `NotFound` or `Io` if the file cannot be read, `InvalidInput` that names the lines that are no prompts.
    pub(super) fn read(path: &Path) -> Result<Self> {
        let io = |error| crate::cannot_read(path, error);
        let file = File::open(path).map_err(io)?;
        let mut reader = BufReader::with_capacity(1 << 20, file);
        let (mut places, mut seen, mut problems) = (Vec::new(), HashSet::new(), Vec::new());
        let (mut offset, mut line, mut wrong, mut duplicates) = (0, 0, 0_u64, 0);
        let mut text = Vec::new();
        loop {
            text.clear();
            let bytes = (&mut reader).take(LINE_BYTES_MAX + 1).read_until(b'\n', &mut text).map_err(io)? as u64;
            if bytes == 0 {
                break;
            }
            line += 1;
            if bytes > LINE_BYTES_MAX {
                let message = format!("line {line} of {} has more than {LINE_BYTES_MAX} bytes", path.display());
                return Err(Error::new(ErrorKind::InvalidInput, message));
            }
            if !text.trim_ascii().is_empty() {
                match prompt_of(&text) {
                    Ok(prompt) => {
                        let id = PromptId::of(&prompt);
                        match seen.insert(id) {
                            true => places.push(Place { id, offset, bytes, line }),
                            false => duplicates += 1,
                        }
                    }
                    Err(problem) => {
                        wrong += 1;
                        if problems.len() < PROBLEMS_MAX {
                            problems.push(format!("line {line}: {problem}"));
                        }
                    }
                }
            }
            offset += bytes;
        }
        if wrong > 0 {
            let more = wrong - problems.len() as u64;
            let more = if more > 0 { format!("; and {more} lines more") } else { String::new() };
            let message = format!("{} holds lines that are no prompts: {}{more}", path.display(), problems.join("; "));
            return Err(Error::new(ErrorKind::InvalidInput, message));
        }
        Ok(Self { file: reader.into_inner(), places, duplicates })
    }

    /// A prompt as vLLM gets it.
    ///
    /// # Errors
    /// `Io`, or `InvalidInput` if the file has changed since it was checked.
    pub(super) fn prompt(&mut self, place: &Place) -> Result<Value> {
        let mut text = vec![0; place.bytes as usize];
        let read = self.file.seek(SeekFrom::Start(place.offset)).and_then(|_| self.file.read_exact(&mut text));
        read.map_err(|error| Error::from_io(format!("cannot read line {} of the prompts again", place.line), error))?;
        match prompt_of(&text) {
            Ok(prompt) if PromptId::of(&prompt) == place.id => Ok(prompt),
            _ => Err(Error::new(
                ErrorKind::InvalidInput,
                format!("line {} of the prompts has changed since it was checked; leave the file alone", place.line),
            )),
        }
    }
}

/// The fields of a line that count.
fn prompt_of(line: &[u8]) -> std::result::Result<Value, String> {
    let value: Value = serde_json::from_slice(line).map_err(|error| format!("no JSON ({error})"))?;
    let Value::Object(mut object) = value else { return Err("no JSON object".into()) };
    // A line of an OpenAI batch.
    if let Some(Value::Object(body)) = object.remove("body") {
        object = body;
    }
    object.retain(|name, value| FIELDS.contains(&name.as_str()) && !value.is_null());
    let given =
        ["prompt", "prompt_token_ids", "messages"].into_iter().filter(|name| object.contains_key(*name)).count();
    if given != 1 {
        return Err(format!("{given} of prompt, prompt_token_ids and messages are given; give one"));
    }
    check(&object)?;
    let mut sorted: Vec<(String, Value)> = object.into_iter().collect();
    sorted.sort_by(|one, other| one.0.cmp(&other.0));
    Ok(Value::Object(sorted.into_iter().collect::<Map<_, _>>()))
}

fn check(object: &Map<String, Value>) -> std::result::Result<(), String> {
    let is_list = |value: &Value| value.as_array().is_some_and(|list| !list.is_empty());
    for (name, value) in object {
        let (is_good, wanted) = match name.as_str() {
            "prompt" => (value.as_str().is_some_and(|text| !text.is_empty()), "a text that is not empty"),
            "prompt_token_ids" => {
                let is_token = |token: &Value| token.as_u64().is_some_and(|token| u32::try_from(token).is_ok());
                let are_tokens = value.as_array().is_some_and(|tokens| tokens.iter().all(is_token));
                (is_list(value) && are_tokens, "a list of token numbers that is not empty")
            }
            "messages" => {
                let is_message = |message: &Value| message.get("role").is_some_and(Value::is_string);
                let are_messages = value.as_array().is_some_and(|messages| messages.iter().all(is_message));
                (is_list(value) && are_messages, "a list of messages, each with a role")
            }
            "cache_salt" => (value.as_str().is_some_and(|salt| !salt.is_empty()), "a text that is not empty"),
            "tools" => (value.is_array(), "a list"),
            "add_generation_prompt" => (value.is_boolean(), "true or false"),
            _ => (value.is_object(), "an object"),
        };
        if !is_good {
            return Err(format!("{name} is not {wanted}"));
        }
    }
    if object.contains_key("messages") && object.contains_key("cache_salt") {
        // vLLM's offline chat takes none.
        return Err("cache_salt goes with prompt or prompt_token_ids, not with messages".into());
    }
    Ok(())
}

#[cfg(test)]
mod tests;
