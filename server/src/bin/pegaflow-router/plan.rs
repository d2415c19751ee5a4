//! What a request asks for, as far as the router must know, and what of it is sent to whom.

use axum::http::{HeaderMap, HeaderName, header};
use serde_json::{Map, Value, json};

use crate::affinity::Beginning;
use crate::known_keys::KEYS;

/// The setting of the connector that asks how much of a prompt is in the cache, and its answer.
const HANDOFF: &str = "pegaflow_handoff";
const TOKENS: &str = "pegaflow_tokens";
/// Headers of one connection, and those that the router sets itself or that would change the bytes of an answer.
const NOT_SENT: [HeaderName; 11] = [
    header::HOST,
    header::CONNECTION,
    header::CONTENT_LENGTH,
    header::TRANSFER_ENCODING,
    header::TE,
    header::TRAILER,
    header::UPGRADE,
    header::EXPECT,
    header::ACCEPT_ENCODING,
    header::PROXY_AUTHENTICATE,
    header::PROXY_AUTHORIZATION,
];

/// The two kinds of requests that generate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// `/v1/completions`.
    Completion,
    /// `/v1/chat/completions`.
    Chat,
}

impl Kind {
    /// Of a path, if it is one.
    pub(crate) fn of(path: &str) -> Option<Self> {
        match path {
            "/v1/completions" => Some(Self::Completion),
            "/v1/chat/completions" => Some(Self::Chat),
            _ => None,
        }
    }
}

/// A request that generates.
#[derive(Debug)]
pub(crate) struct Plan {
    pub(crate) kind: Kind,
    /// With its query.
    pub(crate) path: String,
    pub(crate) headers: HeaderMap,
    body: Map<String, Value>,
    pub(crate) beginning: Beginning,
    pub(crate) is_stream: bool,
    /// Whether keys of blocks that an engine tells are those of the beginning.
    pub(crate) has_one_prompt: bool,
    /// Whether the client wants to be told keys itself.
    pub(crate) wants_keys: bool,
    /// Whether another engine would say the same, in text that can be compared.
    pub(crate) can_be_resumed: bool,
}

impl Plan {
    /// Reads a request. An error is for the client.
    pub(crate) fn new(kind: Kind, path: String, headers: &HeaderMap, body: &[u8]) -> Result<Self, String> {
        let body = match serde_json::from_slice(body) {
            Ok(Value::Object(body)) => body,
            Ok(_) => return Err("the body is no JSON object".into()),
            Err(error) => return Err(format!("the body is no JSON: {error}")),
        };
        let prompt = prompt_of(kind, &body);
        let model = body.get("model").and_then(Value::as_str).unwrap_or_default();
        Ok(Self {
            kind,
            path,
            headers: to_be_sent(headers),
            beginning: Beginning::new(model, body.get("cache_salt").and_then(Value::as_str), &prompt),
            has_one_prompt: has_one_prompt(&body) && !is_set(&body, "truncate_prompt_tokens"),
            wants_keys: body.get("kv_transfer_params").is_some_and(|asked| asked.get(KEYS) == Some(&Value::Bool(true))),
            is_stream: body.get("stream").and_then(Value::as_bool).unwrap_or(false),
            can_be_resumed: can_be_resumed(&body),
            body,
        })
    }

    /// Whether it pays that another engine computes the prompt.
    pub(crate) fn is_worth_a_handoff(&self, from_bytes: usize) -> bool {
        // Somebody who wants to know all about the prompt has it computed where the answer is.
        let wants_prompt = is_set(&self.body, "prompt_logprobs") || is_true(&self.body, "echo");
        self.beginning.prompt_bytes() >= from_bytes && !wants_prompt
    }

    /// The request for the engine that computes the prompt: one token, which nobody reads. `asks_keys`: it is to tell keys of
    /// blocks.
    pub(crate) fn prefill(&self, asks_keys: bool) -> Vec<u8> {
        let mut body = self.body.clone();
        for name in ["stream_options", "max_completion_tokens", "min_tokens", "logprobs", "top_logprobs", "best_of"] {
            body.remove(name);
        }
        let few = json!({ "stream": false, "max_tokens": 1, "n": 1, "kv_transfer_params": { HANDOFF: true } });
        if let Value::Object(few) = few {
            body.extend(few);
        }
        ask(&mut body, asks_keys);
        Value::Object(body).to_string().into_bytes()
    }

    /// How many tokens of the prompt the cache has or is about to have, by the answer to [`Self::prefill`].
    pub(crate) fn tokens_handed_off(answer: &[u8]) -> Option<u64> {
        let answer: Value = serde_json::from_slice(answer).ok()?;
        answer.get("kv_transfer_params")?.get(TOKENS)?.as_u64()
    }

    /// The request for the engine that answers; with what was computed elsewhere. `asks_keys`: it is to tell keys of blocks.
    pub(crate) fn decode(&self, tokens: Option<u64>, asks_keys: bool) -> Vec<u8> {
        let mut body = self.body.clone();
        if let Some(tokens) = tokens {
            body.insert("kv_transfer_params".into(), json!({ TOKENS: tokens }));
        } else if let Some(Value::Object(parameters)) = body.get_mut("kv_transfer_params") {
            parameters.remove(TOKENS);
        }
        ask(&mut body, asks_keys);
        Value::Object(body).to_string().into_bytes()
    }
}

/// Has an engine tell keys of blocks.
fn ask(body: &mut Map<String, Value>, asks_keys: bool) {
    if !asks_keys {
        return;
    }
    let parameters = body.entry("kv_transfer_params").or_insert(Value::Null);
    match parameters {
        Value::Object(parameters) => drop(parameters.insert(KEYS.into(), true.into())),
        Value::Null => *parameters = json!({ KEYS: true }),
        // The engine says what is wrong with it.
        _ => {}
    }
}

/// Without what belongs to one connection.
pub(crate) fn to_be_sent(headers: &HeaderMap) -> HeaderMap {
    let named: Vec<String> = headers
        .get_all(header::CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(',').map(|name| name.trim().to_ascii_lowercase()))
        .collect();
    let mut sent = headers.clone();
    let is_sent = |name: &HeaderName| {
        !NOT_SENT.contains(name) && name != "keep-alive" && !named.iter().any(|other| other == name.as_str())
    };
    let gone: Vec<HeaderName> = headers.keys().filter(|name| !is_sent(name)).cloned().collect();
    for name in gone {
        sent.remove(name);
    }
    sent
}

/// What the keys of blocks depend on, in order, as bytes.
fn prompt_of(kind: Kind, body: &Map<String, Value>) -> Vec<u8> {
    let mut prompt = Vec::new();
    let mut add = |value: &Value| match value {
        Value::String(text) => prompt.extend_from_slice(text.as_bytes()),
        other => prompt.extend_from_slice(other.to_string().as_bytes()),
    };
    match kind {
        Kind::Completion => body.get("prompt").into_iter().for_each(&mut add),
        Kind::Chat => {
            body.get("tools").into_iter().for_each(&mut add);
            let messages = body.get("messages").and_then(Value::as_array);
            messages.into_iter().flatten().for_each(&mut add);
        }
    }
    prompt
}

fn is_set(body: &Map<String, Value>, name: &str) -> bool {
    body.get(name).is_some_and(|value| !value.is_null())
}

fn is_true(body: &Map<String, Value>, name: &str) -> bool {
    body.get(name).and_then(Value::as_bool).unwrap_or(false)
}

fn has_one_prompt(body: &Map<String, Value>) -> bool {
    match body.get("prompt") {
        Some(Value::Array(items)) => items.iter().all(Value::is_number),
        _ => true,
    }
}

/// Whether another engine would go on with the same words, which can be told from the text alone.
fn can_be_resumed(body: &Map<String, Value>) -> bool {
    let number = |name: &str| body.get(name).and_then(Value::as_f64);
    let is_one = |name: &str| !is_set(body, name) || number(name) == Some(1.0);
    let is_same = number("temperature") == Some(0.0) || is_set(body, "seed");
    // Chats say `"logprobs": false`, completions a number.
    let has_more = is_true(body, "logprobs")
        || number("logprobs").is_some()
        || is_set(body, "prompt_logprobs")
        || is_true(body, "return_token_ids")
        || is_true(body, "echo")
        || is_true(body, "use_beam_search");
    is_same && is_one("n") && is_one("best_of") && has_one_prompt(body) && !has_more
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(kind: Kind, body: &Value) -> Plan {
        Plan::new(kind, "/v1/x".into(), &HeaderMap::new(), body.to_string().as_bytes()).expect("good")
    }

    #[test]
    fn the_prefill_keeps_the_prompt_and_asks_for_one_token() {
        let body = json!({
            "model": "m", "messages": [{"role": "user", "content": "hello"}], "tools": [{"type": "function"}],
            "stream": true, "stream_options": {"include_usage": true}, "max_completion_tokens": 700, "min_tokens": 5,
            "n": 3, "temperature": 0.5, "kv_transfer_params": {"other": 1},
        });
        let sent: Value = serde_json::from_slice(&plan(Kind::Chat, &body).prefill(false)).expect("JSON");
        assert_eq!(
            sent,
            json!({
                "model": "m", "messages": body["messages"], "tools": body["tools"], "temperature": 0.5,
                "stream": false, "max_tokens": 1, "n": 1, "kv_transfer_params": {"pegaflow_handoff": true},
            })
        );
    }

    #[test]
    fn the_decode_is_what_the_client_sent_with_what_was_handed_off() {
        let body = json!({"model": "m", "prompt": "hello", "max_tokens": 9, "stream": true});
        let plan = plan(Kind::Completion, &body);
        assert_eq!(serde_json::from_slice::<Value>(&plan.decode(None, false)).expect("JSON"), body);
        let tokens = Plan::tokens_handed_off(br#"{"choices": [], "kv_transfer_params": {"pegaflow_tokens": 96}}"#);
        assert_eq!(tokens, Some(96));
        let sent: Value = serde_json::from_slice(&plan.decode(tokens, false)).expect("JSON");
        assert_eq!(sent["kv_transfer_params"], json!({"pegaflow_tokens": 96}));
        for nothing in [&b"{}"[..], b"", b"[1]", br#"{"kv_transfer_params": null}"#] {
            assert_eq!(Plan::tokens_handed_off(nothing), None);
        }
        // A client does not say what an engine has to wait for.
        let body = json!({"prompt": "hello", "kv_transfer_params": {"pegaflow_tokens": 1_000_000_000}});
        let sent: Value =
            serde_json::from_slice(&self::plan(Kind::Completion, &body).decode(None, false)).expect("JSON");
        assert_eq!(sent["kv_transfer_params"], json!({}));
    }

    #[test]
    fn keys_are_asked_for_beside_what_the_client_has_set() {
        let sent =
            |bytes: Vec<u8>| serde_json::from_slice::<Value>(&bytes).expect("JSON")["kv_transfer_params"].clone();
        let plain = plan(Kind::Completion, &json!({"prompt": "hello"}));
        assert_eq!(sent(plain.decode(None, true)), json!({"pegaflow_keys": true}));
        assert_eq!(sent(plain.decode(Some(7), true)), json!({"pegaflow_tokens": 7, "pegaflow_keys": true}));
        assert_eq!(sent(plain.prefill(true)), json!({"pegaflow_handoff": true, "pegaflow_keys": true}));
        let own = plan(Kind::Completion, &json!({"prompt": "hello", "kv_transfer_params": {"other": 1}}));
        assert_eq!(sent(own.decode(None, true)), json!({"other": 1, "pegaflow_keys": true}));
        assert!(!own.wants_keys && own.has_one_prompt);
        let wants = json!({"prompt": ["a", "b"], "kv_transfer_params": {"pegaflow_keys": true}});
        let wants = plan(Kind::Completion, &wants);
        assert!(wants.wants_keys && !wants.has_one_prompt);
        assert!(!plan(Kind::Chat, &json!({"messages": [], "truncate_prompt_tokens": 9})).has_one_prompt);
    }

    #[test]
    fn only_what_is_the_same_everywhere_can_be_resumed() {
        let yes = [
            json!({"prompt": "a", "temperature": 0}),
            json!({"prompt": [1, 2, 3], "temperature": 0.0, "n": 1}),
            json!({"messages": [], "temperature": 1.0, "seed": 7, "logprobs": false}),
        ];
        let no = [
            json!({"prompt": "a"}),
            json!({"prompt": "a", "temperature": 0.7}),
            json!({"prompt": ["a", "b"], "temperature": 0}),
            json!({"prompt": "a", "temperature": 0, "n": 2}),
            json!({"prompt": "a", "temperature": 0, "logprobs": 3}),
            json!({"prompt": "a", "temperature": 0, "echo": true}),
            json!({"prompt": "a", "temperature": 0, "return_token_ids": true}),
        ];
        yes.iter().for_each(|body| assert!(plan(Kind::Chat, body).can_be_resumed, "{body}"));
        no.iter().for_each(|body| assert!(!plan(Kind::Chat, body).can_be_resumed, "{body}"));
    }

    #[test]
    fn headers_of_a_connection_stay_behind() {
        let mut headers = HeaderMap::new();
        for (name, value) in [
            ("host", "a"),
            ("connection", "close, X-Mine"),
            ("x-mine", "1"),
            ("authorization", "Bearer t"),
            ("x-id", "7"),
        ] {
            headers.insert(HeaderName::from_static(name), value.parse().expect("a value"));
        }
        let sent = to_be_sent(&headers);
        let mut names: Vec<&str> = sent.keys().map(HeaderName::as_str).collect();
        names.sort_unstable();
        assert_eq!(names, ["authorization", "x-id"]);
    }

    #[test]
    fn what_is_no_object_is_refused() {
        for body in ["", "[]", "{", "1"] {
            assert!(Plan::new(Kind::Chat, String::new(), &HeaderMap::new(), body.as_bytes()).is_err());
        }
    }
}
