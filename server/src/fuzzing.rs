//! What `make fuzz` throws bytes at: requests, files of tokens and manifests of packs. Nothing may panic.

use std::path::Path;

use prost::Message;

use crate::access::Tokens;
use crate::limits::{NAME_BYTES_MAX, NAMESPACE_BYTES_MAX};
use crate::pack::fuzzing::{examples, read_manifest};
use crate::proto::lookup_answer::Answer;
use crate::{proto, wire};

/// Reads the bytes as one of the requests or replies, which the first byte names, and checks it as the service does. What came of it,
/// in words.
pub fn request(bytes: &[u8]) -> String {
    let Some((which, bytes)) = bytes.split_first() else { return String::new() };
    let label = match which % 13 {
        0 => proto::RegisterRequest::decode(bytes).map(|request| outcome(wire::instance_spec(request))),
        1 => proto::LookupRequest::decode(bytes).map(|request| outcome(wire::lookup_request(&request))),
        2 => proto::LoadRequest::decode(bytes).map(|request| outcome(wire::load_blocks(&request))),
        3 => proto::SaveRequest::decode(bytes).map(|request| outcome(wire::save_blocks(&request))),
        4 => proto::FlushRequest::decode(bytes).map(|request| outcome(wire::flush_timeout(request.timeout_ms))),
        5 => proto::ConsumeRequest::decode(bytes)
            .map(|request| outcome(wire::leases(&request.leases).and_then(|_| wire::shard(request.shard)))),
        6 => proto::OpenSessionRequest::decode(bytes)
            .map(|request| outcome(wire::check_name("the name", &request.client_name, NAME_BYTES_MAX))),
        7 => proto::LookupReply::decode(bytes).map(|reply| outcome(wire::lookup_reply(&reply))),
        8 => proto::SessionEvent::decode(bytes).map(|event| format!("{}", event.event.is_some())),
        9 => proto::LocateRequest::decode(bytes).map(|request| outcome(wire::locate_request(&request))),
        10 => proto::EvictRequest::decode(bytes)
            .map(|request| outcome(wire::block_choice(&request.namespaces, &request.prefix, request.unused_for_ms))),
        11 => proto::UnpinRequest::decode(bytes).map(|request| outcome(wire::named_namespaces(&request.namespaces))),
        _ => proto::LookupAnswer::decode(bytes).map(|answer| match answer.answer {
            Some(Answer::Found(reply)) => outcome(wire::lookup_reply(&reply)),
            other => format!("{}", other.is_some()),
        }),
    };
    label.unwrap_or_else(|_| "no message".into())
}

/// Reads the text of a file of tokens. What came of it, in words.
pub fn tokens(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(&bytes[..bytes.len().min(NAMESPACE_BYTES_MAX)]);
    outcome(Tokens::parse(&text))
}

/// Reads a pack with these bytes as its manifest, by way of the file `scratch`. What came of it, in words.
pub fn pack_manifest(scratch: &Path, bytes: &[u8]) -> String {
    match read_manifest(scratch, bytes) {
        Ok(good) => format!("{good} good"),
        Err(error) => outcome::<()>(Err(error)),
    }
}

/// Manifests to begin with.
pub fn pack_manifests() -> Vec<Vec<u8>> {
    examples()
}

fn outcome<T>(result: pegaflow_engine::Result<T>) -> String {
    match result {
        Ok(_) => "good".into(),
        Err(error) => error.message().chars().filter(|c| c.is_alphabetic()).take(60).collect(),
    }
}
