//! A router process, and engines that do what real ones do at their worst.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::http::{HeaderMap, Response, StatusCode};
use axum::routing::{get, post};
use futures::StreamExt;
use serde_json::{Value, json};

use super::PATIENCE;

pub(crate) const WORDS: [&str; 6] = ["never ", "a ", "wrong ", "byte", ", ", "ever"];

/// What an engine does with the next requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mood {
    Good,
    /// Ends the connection after so many words.
    DiesAfter(usize),
    /// Says the second half in other words.
    Differs,
    Fails,
    /// Says one word and then nothing.
    Hangs,
}

#[derive(Debug)]
pub(crate) struct Seen {
    pub(crate) mood: Mood,
    pub(crate) bodies: Vec<Value>,
    pub(crate) authorization: Vec<String>,
    /// What is told of the prompt's blocks to whom asks.
    pub(crate) keys: Option<Value>,
    /// Answers that nobody took to their end.
    pub(crate) abandoned: usize,
}

pub(crate) type Shared = Arc<Mutex<Seen>>;

pub(crate) struct FakeEngine {
    pub(crate) address: SocketAddr,
    pub(crate) seen: Shared,
    runtime: tokio::runtime::Runtime,
}

impl FakeEngine {
    pub(crate) fn start() -> Self {
        Self::start_at(SocketAddr::from(([127, 0, 0, 1], 0)))
    }

    pub(crate) fn start_at(address: SocketAddr) -> Self {
        let (mood, keys) = (Mood::Good, None);
        let seen = Seen { mood, bodies: vec![], authorization: vec![], keys, abandoned: 0 };
        let seen = Arc::new(Mutex::new(seen));
        let routes = axum::Router::new()
            .route("/health", get(|| async { "" }))
            .route("/v1/models", get(|| async { r#"{"data": []}"# }))
            .route("/v1/completions", post(complete))
            .with_state(Arc::clone(&seen));
        let runtime = tokio::runtime::Runtime::new().expect("a runtime");
        let listener = runtime.block_on(tokio::net::TcpListener::bind(address)).expect("listens");
        let address = listener.local_addr().expect("an address");
        runtime.spawn(async move { axum::serve(listener, routes).await });
        Self { address, seen, runtime }
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    pub(crate) fn is(&self, mood: Mood) {
        self.seen.lock().expect("not poisoned").mood = mood;
    }

    pub(crate) fn tells(&self, keys: Value) {
        self.seen.lock().expect("not poisoned").keys = Some(keys);
    }

    pub(crate) fn bodies(&self) -> Vec<Value> {
        self.seen.lock().expect("not poisoned").bodies.clone()
    }

    pub(crate) fn stop(self) -> SocketAddr {
        self.runtime.shutdown_timeout(PATIENCE);
        self.address
    }
}

/// Notes an answer that was dropped before its end.
struct Unfinished(Option<Shared>);

impl Drop for Unfinished {
    fn drop(&mut self) {
        if let Some(seen) = self.0.take() {
            seen.lock().expect("not poisoned").abandoned += 1;
        }
    }
}

async fn complete(State(seen): State<Shared>, headers: HeaderMap, body: Bytes) -> Response<Body> {
    let body: Value = serde_json::from_slice(&body).expect("JSON");
    let (mood, keys) = {
        let mut seen = seen.lock().expect("not poisoned");
        seen.bodies.push(body.clone());
        let token = headers.get("authorization").and_then(|value| value.to_str().ok()).unwrap_or_default();
        seen.authorization.push(token.to_owned());
        (seen.mood, seen.keys.clone())
    };
    if mood == Mood::Fails {
        return answer(StatusCode::INTERNAL_SERVER_ERROR, "application/json", Body::from("{}"));
    }
    if body["stream"] != true {
        let asked = &body["kv_transfer_params"];
        let mut told = json!({});
        if asked["pegaflow_handoff"] == true {
            told["pegaflow_tokens"] = 64.into();
        }
        if let Some(keys) = keys.filter(|_| asked["pegaflow_keys"] == true) {
            told["pegaflow_keys"] = keys;
        }
        let all = json!({
            "choices": [{"index": 0, "text": WORDS.concat(), "finish_reason": "stop"}],
            "kv_transfer_params": if told == json!({}) { Value::Null } else { told },
        });
        return answer(StatusCode::OK, "application/json", Body::from(all.to_string()));
    }
    let event = move |at: usize| {
        let word = if mood == Mood::Differs && at >= 3 { "other" } else { WORDS[at] };
        let reason = (at + 1 == WORDS.len()).then_some("stop");
        let value =
            json!({"id": format!("cmpl-{mood:?}"), "choices": [{"index": 0, "text": word, "finish_reason": reason}]});
        Bytes::from(format!("data: {value}\n\n"))
    };
    let unfinished = Unfinished(Some(seen));
    let events = futures::stream::unfold((0, unfinished), move |(at, mut unfinished)| async move {
        match mood {
            Mood::DiesAfter(words) if at == words => {
                // What was said has gone out before the end comes.
                tokio::time::sleep(Duration::from_millis(50)).await;
                let lost: Result<Bytes, std::io::Error> = Err(std::io::ErrorKind::ConnectionReset.into());
                unfinished.0 = None;
                return Some((lost, (at + 1, unfinished)));
            }
            Mood::Hangs if at == 1 => std::future::pending().await,
            _ => {}
        }
        match at.cmp(&WORDS.len()) {
            std::cmp::Ordering::Less => Some((Ok(event(at)), (at + 1, unfinished))),
            std::cmp::Ordering::Equal => {
                unfinished.0 = None;
                Some((Ok(Bytes::from_static(b"data: [DONE]\n\n")), (at + 1, unfinished)))
            }
            std::cmp::Ordering::Greater => None,
        }
    });
    answer(StatusCode::OK, "text/event-stream; charset=utf-8", Body::from_stream(events.fuse()))
}

fn answer(status: StatusCode, kind: &str, body: Body) -> Response<Body> {
    Response::builder().status(status).header("content-type", kind).body(body).expect("a response")
}

/// A router process; killed when dropped.
pub(crate) struct Router {
    pub(crate) child: Child,
    pub(crate) address: SocketAddr,
}

impl Router {
    pub(crate) fn start(arguments: &[&str]) -> Self {
        let mut child = Command::new(env!("CARGO_BIN_EXE_pegaflow-router"))
            .args(["--listen", "127.0.0.1:0", "--health-interval", "100"])
            .args(arguments)
            .env("NO_COLOR", "1")
            .stderr(Stdio::piped())
            .spawn()
            .expect("starts");
        let mut lines = BufReader::new(child.stderr.take().expect("piped")).lines();
        let address = lines
            .by_ref()
            .map_while(Result::ok)
            .find_map(|line| line.split_once("ready address=")?.1.trim().parse().ok())
            .expect("ready");
        std::thread::spawn(move || lines.for_each(drop));
        Self { child, address }
    }

    pub(crate) fn between(engines: &[&FakeEngine], more: &[&str]) -> Self {
        let urls: Vec<String> = engines.iter().map(|engine| engine.url()).collect();
        let mut arguments: Vec<&str> = urls.iter().flat_map(|url| ["--engine", url]).collect();
        arguments.extend(more);
        Self::start(&arguments)
    }

    pub(crate) fn send(&self, head: &str, body: &str) -> TcpStream {
        let mut stream = TcpStream::connect(self.address).expect("connects");
        stream.set_read_timeout(Some(PATIENCE)).expect("set");
        // Without chunks in the answer.
        write!(stream, "{head} HTTP/1.0\r\nAuthorization: Bearer mine\r\nContent-Length: {}\r\n\r\n{body}", body.len())
            .expect("writes");
        stream
    }

    pub(crate) fn ask(&self, head: &str, body: &str) -> (u16, String) {
        let mut text = String::new();
        self.send(head, body).read_to_string(&mut text).expect("reads");
        let (head, body) = text.split_once("\r\n\r\n").expect("an answer");
        (head.split(' ').nth(1).and_then(|code| code.parse().ok()).expect("a status"), body.to_owned())
    }

    pub(crate) fn complete(&self, body: &Value) -> (u16, String) {
        self.ask("POST /v1/completions", &body.to_string())
    }

    pub(crate) fn metric(&self, line: &str) -> f64 {
        let (_, text) = self.ask("GET /metrics", "");
        let value = text.lines().find_map(|found| found.strip_prefix(line)?.trim().parse().ok());
        value.unwrap_or(0.0)
    }
}

impl Drop for Router {
    fn drop(&mut self) {
        let _gone = self.child.kill();
        let _status = self.child.wait();
    }
}
