//! What operators and their probes see: alive, ready or why not, and the numbers.
#![expect(clippy::expect_used, reason = "a test that cannot go on has failed")]

mod support;

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};

use pegaflow_server::{HttpServer, Metrics, Readiness};
use support::{Local, PATIENCE};

fn get(address: SocketAddr, path: &str) -> (u16, String) {
    let (status, _, body) = get_all(address, path);
    (status, body)
}

/// Status, head and body.
fn get_all(address: SocketAddr, path: &str) -> (u16, String, String) {
    let mut stream = TcpStream::connect(address).expect("connects");
    stream.set_read_timeout(Some(PATIENCE)).expect("set");
    write!(stream, "GET {path} HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n").expect("writes");
    let mut text = String::new();
    stream.read_to_string(&mut text).expect("reads");
    let (head, body) = text.split_once("\r\n\r\n").expect("an answer");
    let status = head.split(' ').nth(1).and_then(|code| code.parse().ok()).expect("a status");
    (status, head.to_owned(), body.to_owned())
}

fn serve(runtime: &tokio::runtime::Runtime, readiness: &Readiness) -> HttpServer {
    let address = "127.0.0.1:0".parse().expect("an address");
    runtime.block_on(HttpServer::start(address, readiness.clone())).expect("listens")
}

#[test]
fn readiness_says_why_and_metrics_have_the_numbers() {
    let mut local = Local::start();
    let http = serve(&local.runtime, &local.readiness);
    let worker = local.worker();
    let operation = worker.start_save(5).expect("accepted");
    worker.wait(operation);
    assert_eq!(get(http.address(), "/health").0, 200);
    assert_eq!(get(http.address(), "/ready").0, 200);
    assert_eq!(get(http.address(), "/nothing").0, 404);
    let (status, text) = get(http.address(), "/metrics");
    assert_eq!(status, 200);
    for line in ["pegaflow_saved_blocks_total 5", "pegaflow_sessions 1", "pegaflow_ready 1"] {
        assert!(text.lines().any(|found| found == line), "{line} not in\n{text}");
    }
    let (status, text) = get(http.address(), "/status");
    let json: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    assert_eq!((status, &json["saved_blocks"], &json["write_budget_day_bytes"]), (200, &5.into(), &0.into()), "{text}");
    local.stop().expect("stops");
    let (status, why) = get(http.address(), "/ready");
    assert!(status == 503 && why.starts_with("closed"), "{status} {why}");
    assert_eq!(get(http.address(), "/health").0, 200, "alive all the same");
}

#[test]
fn a_server_that_is_still_starting_is_alive_and_not_ready() {
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let http = serve(&runtime, &Readiness::new(Metrics::new()));
    assert_eq!(get(http.address(), "/health").0, 200);
    let (status, why) = get(http.address(), "/ready");
    assert!(status == 503 && why.contains("starting"), "{status} {why}");
    assert_eq!(get(http.address(), "/status").0, 503);
    assert!(get(http.address(), "/metrics").1.contains("pegaflow_ready 0"));
}

#[test]
fn the_page_allows_itself_and_nothing_else_and_reads_one_json() {
    let mut local = Local::start();
    let http = serve(&local.runtime, &local.readiness);
    let (status, head, page) = get_all(http.address(), "/");
    let policy = head.lines().find_map(|line| line.strip_prefix("content-security-policy: ")).expect("a policy");
    assert!(status == 200 && policy.starts_with("default-src 'none';"), "{status} {policy}");
    assert!(
        !policy.contains("unsafe") && !policy.contains('*') && policy.contains("frame-ancestors 'none'"),
        "{policy}"
    );
    let nonce = policy.split("script-src 'nonce-").nth(1).and_then(|rest| rest.split('\'').next()).expect("a nonce");
    assert_eq!((nonce.len(), page.matches(&format!("nonce=\"{nonce}\"")).count()), (32, 2), "style and script");
    assert!(!get(http.address(), "/").1.contains(nonce), "another one each time");
    // Nothing from elsewhere: the only address is that of the SVG namespace.
    let addresses = page.match_indices("http").filter(|(at, _)| !page[*at..].starts_with("http://www.w3.org/2000/svg"));
    assert_eq!(addresses.count(), 0);
    assert!(!page.contains("innerHTML") && !page.contains("style=\""), "what comes from clients is text");

    let worker = local.worker();
    let operation = worker.start_save(5).expect("accepted");
    worker.wait(operation);
    let json = |text: &str| serde_json::from_str::<serde_json::Value>(text).expect("JSON");
    let (status, head, text) = get_all(http.address(), "/status.json");
    let told = json(&text);
    assert!(status == 200 && head.contains("cache-control: no-store"), "{head}");
    assert_eq!((&told["state"], &told["reason"], &told["namespaces"]), (&"ready".into(), &().into(), &().into()));
    assert_eq!((&told["stats"]["saved_blocks"], &told["sessions"]), (&5.into(), &1.into()));
    assert!(told["decisions"].as_array().is_some_and(Vec::is_empty), "{text}");
    local.stop().expect("stops");
    assert_eq!(json(&get(http.address(), "/status.json").1)["state"], "stopping");

    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let starting = serve(&runtime, &Readiness::new(Metrics::new()));
    let told = json(&get(starting.address(), "/status.json").1);
    assert_eq!((&told["state"], &told["stats"]), (&"starting".into(), &().into()));
}
