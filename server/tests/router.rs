//! The router between clients and engines that do what real ones do at their worst.
#![expect(clippy::expect_used, reason = "a test that cannot go on has failed")]

mod support;

use std::io::Read;
use std::net::TcpStream;
use std::process::Command;

use serde_json::{Value, json};
use support::router::{FakeEngine, Mood, Router, WORDS};
use support::until;

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
