//! Traces and metrics that a server pushes to a collector, here played by this test; and a collector that is not there.
#![expect(clippy::expect_used, reason = "a test that cannot go on has failed")]

mod support;

use std::collections::HashMap;
use std::io::Read;
use std::net::SocketAddr;
use std::sync::Arc;

use opentelemetry_proto::tonic::collector::metrics::v1::metrics_service_server::{
    MetricsService, MetricsServiceServer,
};
use opentelemetry_proto::tonic::collector::metrics::v1::{ExportMetricsServiceRequest, ExportMetricsServiceResponse};
use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{TraceService, TraceServiceServer};
use opentelemetry_proto::tonic::collector::trace::v1::{ExportTraceServiceRequest, ExportTraceServiceResponse};
use opentelemetry_proto::tonic::trace::v1::Span;
use parking_lot::Mutex;
use pegaflow_server::client::Endpoint;
use support::{PATIENCE, Process, Worker};
use tonic::transport::server::TcpIncoming;
use tonic::{Request, Response, Status};

/// What has come.
#[derive(Clone, Default)]
struct Collector {
    spans: Arc<Mutex<Vec<Span>>>,
    services: Arc<Mutex<Vec<String>>>,
    metrics: Arc<Mutex<Vec<String>>>,
}

#[tonic::async_trait]
impl TraceService for Collector {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        for resource in request.into_inner().resource_spans {
            let attributes = resource.resource.map(|resource| resource.attributes).unwrap_or_default();
            let name = attributes.iter().find(|pair| pair.key == "service.name").expect("a service");
            self.services.lock().push(format!("{:?}", name.value));
            self.spans.lock().extend(resource.scope_spans.into_iter().flat_map(|scope| scope.spans));
        }
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

#[tonic::async_trait]
impl MetricsService for Collector {
    async fn export(
        &self,
        request: Request<ExportMetricsServiceRequest>,
    ) -> Result<Response<ExportMetricsServiceResponse>, Status> {
        let scopes = request.into_inner().resource_metrics.into_iter().flat_map(|resource| resource.scope_metrics);
        self.metrics.lock().extend(scopes.flat_map(|scope| scope.metrics).map(|metric| metric.name));
        Ok(Response::new(ExportMetricsServiceResponse::default()))
    }
}

impl Collector {
    fn serve(&self, runtime: &tokio::runtime::Runtime) -> SocketAddr {
        let _inside = runtime.enter();
        let incoming = TcpIncoming::bind("127.0.0.1:0".parse().expect("an address")).expect("binds");
        let address = incoming.local_addr().expect("an address");
        let server = tonic::transport::Server::builder()
            .add_service(TraceServiceServer::new(self.clone()))
            .add_service(MetricsServiceServer::new(self.clone()));
        runtime.spawn(server.serve_with_incoming(incoming));
        address
    }
}

/// A server with this collector saves and loads three blocks, and ends; what it has logged.
fn run(endpoint: &str, more: &[&str]) -> String {
    let directory = tempfile::tempdir().expect("a directory");
    let socket = directory.path().join("p.sock");
    let mut command = Process::command(&socket);
    command.args(["--otlp-endpoint", endpoint]).args(more);
    let (mut server, mut log) = Process::start_with_log(command);
    let worker = Worker::new(Endpoint::Unix(socket));
    worker.client.wait_connected(PATIENCE).expect("connects");
    worker.register();
    support::until("registered", || worker.lookup(1).is_ok());
    let saved = worker.start_save(3).expect("accepted");
    worker.wait(saved);
    let loaded = worker.start_load(3);
    worker.wait(loaded);
    worker.client.close(PATIENCE);
    server.signal("-TERM");
    assert_eq!(server.wait_exit(), Some(0));
    let mut text = String::new();
    log.read_to_string(&mut text).expect("reads");
    text
}

#[test]
fn lookups_loads_and_saves_are_traced_and_metrics_pushed() {
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let collector = Collector::default();
    let address = collector.serve(&runtime);
    let log = run(&format!("http://{address}"), &["--trace-sample", "1"]);
    let spans = collector.spans.lock().clone();
    let named = |name: &str| spans.iter().filter(|span| span.name == name).collect::<Vec<_>>();
    let attributes = |span: &Span| -> HashMap<String, String> {
        span.attributes.iter().map(|pair| (pair.key.clone(), format!("{:?}", pair.value))).collect()
    };
    let (saves, loads, lookups) = (named("save"), named("load"), named("lookup"));
    assert_eq!((saves.len(), loads.len()), (1, 1), "{log}");
    assert!(!lookups.is_empty(), "{spans:?}");
    for parent in [saves[0], loads[0]] {
        assert!(parent.parent_span_id.is_empty(), "the root of a trace");
        assert!(attributes(parent).contains_key("operation"), "{parent:?}");
        let mut copies = named("copy").into_iter().filter(|copy| copy.parent_span_id == parent.span_id);
        let copy = copies.next_back().expect("its blocks were copied");
        assert_eq!(copy.trace_id, parent.trace_id);
        assert!(attributes(copy)["blocks"].contains('3'), "{copy:?}");
        assert!(parent.start_time_unix_nano <= copy.start_time_unix_nano);
        assert!(copy.end_time_unix_nano <= parent.end_time_unix_nano);
    }
    let found = lookups.iter().any(|span| attributes(span).get("hit_blocks").is_some_and(|hits| hits.contains('3')));
    assert!(found, "{lookups:?}");
    let service = collector.services.lock().first().cloned().expect("a service");
    assert!(service.contains("pegaflow"), "{service}");
    let metrics = collector.metrics.lock();
    assert!(metrics.iter().any(|name| name == "pegaflow_saved_blocks_total"), "pushed at the stop: {metrics:?}");
}

#[test]
fn without_samples_only_metrics_are_pushed() {
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let collector = Collector::default();
    let address = collector.serve(&runtime);
    run(&format!("http://{address}"), &["--trace-sample", "0"]);
    assert_eq!(collector.spans.lock().len(), 0);
    assert!(!collector.metrics.lock().is_empty());
}

#[test]
fn a_collector_that_is_gone_or_silent_holds_nothing_up() {
    let port_of_nobody = {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("binds");
        listener.local_addr().expect("an address").port()
    };
    let silent = std::net::TcpListener::bind("127.0.0.1:0").expect("binds");
    let silent_port = silent.local_addr().expect("an address").port();
    let log = run(&format!("http://127.0.0.1:{port_of_nobody}"), &["--trace-sample", "1"]);
    assert!(log.contains("the OTLP collector does not take"), "{log}");
    run(&format!("http://127.0.0.1:{silent_port}"), &["--trace-sample", "1"]);
}
