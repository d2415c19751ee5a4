//! The router between clients and engines that do what real ones do at their worst.
#![expect(clippy::expect_used, reason = "a test that cannot go on has failed")]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::http::{HeaderMap, Response, StatusCode};
use axum::routing::{get, post};
use futures::StreamExt;
use serde_json::{Value, json};

/// Long enough for anything that is to happen; a test that waits this long has failed.
const PATIENCE: Duration = Duration::from_secs(20);
const WORDS: [&str; 6] = ["never ", "a ", "wrong ", "byte", ", ", "ever"];

/// What an engine does with the next requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mood {
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
struct Seen {
    mood: Mood,
    bodies: Vec<Value>,
    authorization: Vec<String>,
    /// Answers that nobody took to their end.
    abandoned: usize,
}

type Shared = Arc<Mutex<Seen>>;

struct FakeEngine {
    address: SocketAddr,
    seen: Shared,
    runtime: tokio::runtime::Runtime,
}

impl FakeEngine {
    fn start() -> Self {
        let seen = Arc::new(Mutex::new(Seen { mood: Mood::Good, bodies: vec![], authorization: vec![], abandoned: 0 }));
        let routes = axum::Router::new()
            .route("/health", get(|| async { "" }))
            .route("/v1/models", get(|| async { r#"{"data": []}"# }))
            .route("/v1/completions", post(complete))
            .with_state(Arc::clone(&seen));
        let runtime = tokio::runtime::Runtime::new().expect("a runtime");
        let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0")).expect("listens");
        let address = listener.local_addr().expect("an address");
        runtime.spawn(async move { axum::serve(listener, routes).await });
        Self { address, seen, runtime }
    }

    fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    fn is(&self, mood: Mood) {
        self.seen.lock().expect("not poisoned").mood = mood;
    }

    fn bodies(&self) -> Vec<Value> {
        self.seen.lock().expect("not poisoned").bodies.clone()
    }

    fn stop(self) -> SocketAddr {
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
    let mood = {
        let mut seen = seen.lock().expect("not poisoned");
        seen.bodies.push(body.clone());
        let token = headers.get("authorization").and_then(|value| value.to_str().ok()).unwrap_or_default();
        seen.authorization.push(token.to_owned());
        seen.mood
    };
    if mood == Mood::Fails {
        return answer(StatusCode::INTERNAL_SERVER_ERROR, "application/json", Body::from("{}"));
    }
    if body["stream"] != true {
        let tokens = if body["kv_transfer_params"]["pegaflow_handoff"] == true { Some(64) } else { None };
        let all = json!({
            "choices": [{"index": 0, "text": WORDS.concat(), "finish_reason": "stop"}],
            "kv_transfer_params": tokens.map(|tokens| json!({"pegaflow_tokens": tokens})),
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
struct Router {
    child: Child,
    address: SocketAddr,
}

impl Router {
    fn start(arguments: &[&str]) -> Self {
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

    fn between(engines: &[&FakeEngine], more: &[&str]) -> Self {
        let urls: Vec<String> = engines.iter().map(|engine| engine.url()).collect();
        let mut arguments: Vec<&str> = urls.iter().flat_map(|url| ["--engine", url]).collect();
        arguments.extend(more);
        Self::start(&arguments)
    }

    fn send(&self, head: &str, body: &str) -> TcpStream {
        let mut stream = TcpStream::connect(self.address).expect("connects");
        stream.set_read_timeout(Some(PATIENCE)).expect("set");
        // Without chunks in the answer.
        write!(stream, "{head} HTTP/1.0\r\nAuthorization: Bearer mine\r\nContent-Length: {}\r\n\r\n{body}", body.len())
            .expect("writes");
        stream
    }

    fn ask(&self, head: &str, body: &str) -> (u16, String) {
        let mut text = String::new();
        self.send(head, body).read_to_string(&mut text).expect("reads");
        let (head, body) = text.split_once("\r\n\r\n").expect("an answer");
        (head.split(' ').nth(1).and_then(|code| code.parse().ok()).expect("a status"), body.to_owned())
    }

    fn complete(&self, body: &Value) -> (u16, String) {
        self.ask("POST /v1/completions", &body.to_string())
    }

    fn metric(&self, line: &str) -> f64 {
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

fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !is_so() {
        assert!(Instant::now() < deadline, "{what}: not so after {PATIENCE:?}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn streamed(prompt: &str) -> Value {
    json!({"model": "m", "prompt": prompt, "stream": true, "temperature": 0})
}

/// The words of an answer, how often it ended, and its error.
fn heard(answer: &str) -> (String, usize, Option<String>) {
    let (mut text, mut ends, mut error) = (String::new(), 0, None);
    for data in answer.lines().filter_map(|line| line.strip_prefix("data: ")) {
        if data == "[DONE]" {
            ends += 1;
            continue;
        }
        let value: Value = serde_json::from_str(data).expect("JSON");
        text += value["choices"][0]["text"].as_str().unwrap_or_default();
        error = error.or(value["error"]["message"].as_str().map(str::to_owned));
    }
    (text, ends, error)
}

#[test]
fn requests_are_answered_and_spread_with_the_clients_key() {
    let (one, other) = (FakeEngine::start(), FakeEngine::start());
    let router = Router::between(&[&one, &other], &[]);
    for number in 0..10 {
        let (status, text) = router.complete(&json!({"model": "m", "prompt": format!("{number}")}));
        assert_eq!(status, 200);
        assert!(text.contains("never a wrong byte, ever"), "{text}");
    }
    let (status, text) = router.complete(&streamed("hello"));
    assert_eq!((status, heard(&text)), (200, (WORDS.concat(), 1, None)));
    assert!(one.bodies().len() >= 3 && other.bodies().len() >= 3, "both have something to do");
    assert!(one.seen.lock().expect("not poisoned").authorization.iter().all(|token| token == "Bearer mine"));
    assert_eq!(router.ask("GET /v1/models", ""), (200, r#"{"data": []}"#.into()));
    assert_eq!(router.ask("GET /health", "").0, 200);
    assert_eq!(router.metric(r#"pegaflow_router_requests_total{end="answered"}"#), 11.0);
}

#[test]
fn a_long_beginning_stays_with_its_engine() {
    let engines = [FakeEngine::start(), FakeEngine::start(), FakeEngine::start()];
    let router = Router::between(&[&engines[0], &engines[1], &engines[2]], &[]);
    for number in 0..9 {
        let prompt = format!("{}{number}", "the same words at the start ".repeat(200));
        assert_eq!(router.complete(&json!({"model": "m", "prompt": prompt})).0, 200);
    }
    let mut counts: Vec<usize> = engines.iter().map(|engine| engine.bodies().len()).collect();
    counts.sort_unstable();
    assert_eq!(counts, [0, 0, 9]);
}

#[test]
fn a_prompt_is_computed_by_one_engine_and_answered_by_another() {
    let (prefill, decode) = (FakeEngine::start(), FakeEngine::start());
    let router = Router::start(&["--prefill", &prefill.url(), "--decode", &decode.url()]);
    let long = "many words ".repeat(200);
    let (status, text) = router.complete(&streamed(&long));
    assert_eq!((status, heard(&text).0), (200, WORDS.concat()));
    let [computed] = prefill.bodies().try_into().expect("one request");
    assert_eq!(
        (&computed["max_tokens"], &computed["stream"], &computed["prompt"]),
        (&1.into(), &false.into(), &long.clone().into())
    );
    let [answered] = decode.bodies().try_into().expect("one request");
    assert_eq!(answered["kv_transfer_params"], json!({"pegaflow_tokens": 64}));
    assert_eq!(router.complete(&streamed("short")).0, 200);
    assert_eq!((prefill.bodies().len(), decode.bodies().len()), (1, 2), "a short prompt is not worth it");
    // Without anybody to compute prompts all goes on.
    prefill.stop();
    let (status, text) = router.complete(&streamed(&long));
    assert_eq!((status, heard(&text).0), (200, WORDS.concat()));
    let last = decode.bodies().pop().expect("a request");
    assert_eq!(last.get("kv_transfer_params"), None);
    assert_eq!(router.metric(r#"pegaflow_router_handoffs_total{result="failed"}"#), 1.0);
    assert_eq!(router.ask("GET /health", "").0, 200);
}

#[test]
fn an_engine_that_fails_or_is_gone_costs_another_try() {
    let (good, bad) = (FakeEngine::start(), FakeEngine::start());
    let router = Router::between(&[&good, &bad], &[]);
    bad.is(Mood::Fails);
    for number in 0..6 {
        assert_eq!(router.complete(&json!({"prompt": format!("{number}")})).0, 200);
    }
    assert!(!bad.bodies().is_empty() && good.bodies().len() == 6);
    let (engine, address) = (good, bad.stop());
    for number in 0..6 {
        assert_eq!(router.complete(&json!({"prompt": format!("{number}")})).0, 200);
    }
    let up = format!("pegaflow_router_engine_up{{engine=\"{address}\"}}");
    until("it is known to be down", || router.metric(&up) == 0.0);
    engine.is(Mood::Fails);
    assert_eq!(router.complete(&json!({"prompt": "a"})).0, 500, "what the engine says, if nobody says better");
    engine.stop();
    assert_eq!(router.complete(&json!({"prompt": "a"})).0, 502);
    until("it is not healthy", || router.ask("GET /health", "").0 == 503);
}

#[test]
fn an_answer_goes_on_with_another_engine() {
    for words in 0..=WORDS.len() {
        let (good, bad) = (FakeEngine::start(), FakeEngine::start());
        bad.is(Mood::DiesAfter(words));
        let router = Router::between(&[&good, &bad], &[]);
        let mut resumed = 0.0;
        for _ in 0..4 {
            let (status, text) = router.complete(&streamed("hello"));
            assert_eq!((status, heard(&text)), (200, (WORDS.concat(), 1, None)), "{words} words: {text}");
            assert!(
                !(text.contains("cmpl-Good") && text.contains("cmpl-Dies")),
                "one name for the whole answer: {text}"
            );
            resumed = router.metric("pegaflow_router_resumed_total");
        }
        assert!(resumed >= 1.0, "{words} words");
    }
}

#[test]
fn what_can_not_go_on_ends_with_an_error_and_not_with_wrong_words() {
    let (good, bad) = (FakeEngine::start(), FakeEngine::start());
    bad.is(Mood::DiesAfter(4));
    let router = Router::between(&[&good, &bad], &[]);
    let mut chance = streamed("hello");
    chance["temperature"] = 0.9.into();
    let broken = (0..4).map(|_| heard(&router.complete(&chance).1)).find(|(_, _, error)| error.is_some());
    let (text, ends, _) = broken.expect("one of them had the bad engine");
    assert_eq!((text, ends), (WORDS[..4].concat(), 0));
    good.is(Mood::Differs);
    let broken = (0..4).map(|_| heard(&router.complete(&streamed("hello")).1)).find(|(_, _, error)| error.is_some());
    let (text, ends, error) = broken.expect("one of them had the bad engine first");
    assert_eq!((text, ends), (WORDS[..4].concat(), 0));
    assert!(error.expect("there").contains("differently"));
    assert!(router.metric(r#"pegaflow_router_requests_total{end="broken_off"}"#) >= 2.0);
}

#[test]
fn an_engine_that_says_nothing_more_is_left() {
    let (good, bad) = (FakeEngine::start(), FakeEngine::start());
    bad.is(Mood::Hangs);
    let router = Router::between(&[&good, &bad], &["--pause", "1"]);
    for _ in 0..2 {
        assert_eq!(heard(&router.complete(&streamed("hello")).1), (WORDS.concat(), 1, None));
    }
    until("the engine is told", || bad.seen.lock().expect("not poisoned").abandoned == 1);
}

#[test]
fn a_client_that_goes_frees_the_engine_and_its_place() {
    let engine = FakeEngine::start();
    engine.is(Mood::Hangs);
    let router = Router::between(&[&engine], &["--requests-max", "2"]);
    let clients: Vec<TcpStream> = (0..2)
        .map(|_| {
            let mut client = router.send("POST /v1/completions", &streamed("hello").to_string());
            let mut begun = [0; 50];
            client.read_exact(&mut begun).expect("an answer begins");
            client
        })
        .collect();
    let (status, text) = router.complete(&streamed("hello"));
    assert!(status == 503 && text.contains("2 requests"), "{status} {text}");
    drop(clients);
    until("the engine is told", || engine.seen.lock().expect("not poisoned").abandoned == 2);
    until("the places are free", || router.metric(r#"pegaflow_router_requests_total{end="abandoned"}"#) == 2.0);
    engine.is(Mood::Good);
    assert_eq!(heard(&router.complete(&streamed("hello")).1).1, 1);
    let in_flight = format!("pegaflow_router_engine_requests{{engine=\"{}\"}}", engine.address);
    assert_eq!(router.metric(&in_flight), 0.0);
}

#[test]
fn bad_requests_and_bad_options_are_refused_with_a_reason() {
    let engine = FakeEngine::start();
    let router = Router::between(&[&engine], &[]);
    let (status, text) = router.ask("POST /v1/completions", "{not json");
    assert!(status == 400 && text.contains("no JSON"), "{status} {text}");
    assert!(engine.bodies().is_empty());
    for (arguments, why) in [
        (&[][..], "no engine is given"),
        (&["--prefill", "http://h:1"], "nobody answers"),
        (&["--engine", "https://h:1"], "plain HTTP"),
        (&["--engine", "http://h:1", "--engine", "http://h:1"], "twice"),
        (&["--engine", "http://h:1", "--tries", "0"], "--tries"),
    ] {
        let run = Command::new(env!("CARGO_BIN_EXE_pegaflow-router")).args(arguments).output().expect("runs");
        let error = String::from_utf8_lossy(&run.stderr).into_owned();
        assert!(run.status.code() == Some(2) && error.contains(why), "{arguments:?}: {error}");
    }
    let taken = ["--listen", &router.address.to_string(), "--engine", "http://127.0.0.1:9"];
    let run = Command::new(env!("CARGO_BIN_EXE_pegaflow-router")).args(taken).output().expect("runs");
    assert_eq!(run.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&run.stderr).contains("cannot listen"));
}

#[test]
fn sigterm_lets_answers_end() {
    let engine = FakeEngine::start();
    engine.is(Mood::Hangs);
    let mut router = Router::between(&[&engine], &["--drain", "1"]);
    let client = router.send("POST /v1/completions", &streamed("hello").to_string());
    until("it has begun", || !engine.bodies().is_empty());
    let pid = rustix::process::Pid::from_child(&router.child);
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).expect("sent");
    until("it has ended", || router.child.try_wait().expect("asked").is_some());
    assert_eq!(router.child.wait().expect("ended").code(), Some(0));
    drop(client);
}
