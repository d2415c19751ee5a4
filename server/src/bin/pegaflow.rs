//! The command line of operators: asks a running server over its socket.
#![deny(unsafe_code)]

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::{Parser, Subcommand};
use pegaflow_engine::{ByteSize, Error, ErrorKind, Result};
use pegaflow_server::ExitStatus;
use pegaflow_server::client::{Client, ClientConfig, Endpoint};
use serde_json::Value;

/// Asks a running pegaflow-server.
///
/// Exit status: 0 done, 1 no server or no answer, 2 invalid command line, 5 permission denied, 7 input/output error.
#[derive(Debug, Parser)]
#[command(name = "pegaflow", version)]
struct Options {
    /// The server's Unix socket. Default: $XDG_RUNTIME_DIR/pegaflow/pegaflow.sock, or /tmp/pegaflow-UID/pegaflow.sock.
    #[arg(long, env = "PEGAFLOW_SOCKET", value_name = "PATH", global = true)]
    socket: Option<PathBuf>,
    /// The server's loopback TCP address, instead of the socket.
    #[arg(long, value_name = "ADDRESS", global = true, conflicts_with = "socket")]
    tcp: Option<SocketAddr>,
    /// The longest wait for a connection, in seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 5, global = true,
          value_parser = clap::value_parser!(u64).range(1..=600))]
    connect_timeout: u64,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Prints the server's counters and gauges.
    Stats {
        /// As one JSON object.
        #[arg(long)]
        json: bool,
    },
    /// Makes everything saved so far durable.
    Flush {
        /// The longest wait, in seconds.
        #[arg(long, value_name = "SECONDS", default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..=600))]
        timeout: u64,
    },
    /// Says whether the server answers, and how fast.
    Ping,
}

fn main() -> ExitCode {
    let options = Options::parse();
    match run(&options) {
        Ok(()) => ExitStatus::Ok.into(),
        Err(error) => {
            eprintln!("pegaflow: {error:#}");
            ExitStatus::from(error.kind()).into()
        }
    }
}

fn run(options: &Options) -> Result<()> {
    let endpoint = match (&options.socket, options.tcp) {
        (Some(path), _) => Endpoint::Unix(path.clone()),
        (None, Some(address)) => Endpoint::Tcp(address),
        (None, None) => Endpoint::default(),
    };
    check_there(&endpoint)?;
    let client = Client::start(ClientConfig::new(endpoint, "pegaflow command line"))?;
    client.wait_connected(Duration::from_secs(options.connect_timeout))?;
    match options.command {
        Command::Stats { json: true } => println!("{}", client.stats()?),
        Command::Stats { json: false } => print_stats(&client.stats()?),
        Command::Flush { timeout } => {
            client.flush(Duration::from_secs(timeout))?;
            println!("flushed");
        }
        Command::Ping => {
            let started = Instant::now();
            let stats = client.stats()?;
            let version = stats.get("server_version").and_then(Value::as_str).unwrap_or("unknown");
            println!("pegaflow-server {version} answered in {:.1} ms", started.elapsed().as_secs_f64() * 1000.0);
        }
    }
    client.close(Duration::from_secs(1));
    Ok(())
}

/// A person waits: say at once that no server is there, instead of waiting for one to come.
fn check_there(endpoint: &Endpoint) -> Result<()> {
    let found = match endpoint {
        Endpoint::Unix(path) => std::os::unix::net::UnixStream::connect(path).map(drop),
        Endpoint::Tcp(address) => std::net::TcpStream::connect_timeout(address, Duration::from_secs(5)).map(drop),
    };
    found.map_err(|error| match error.kind() {
        std::io::ErrorKind::PermissionDenied => Error::from_io(format!("cannot connect to {endpoint}"), error),
        _ => Error::new(
            ErrorKind::Closed,
            format!("no server at {endpoint} ({error}); start one with: pegaflow-server --path DIR"),
        ),
    })
}

fn print_stats(stats: &Value) {
    let print = |name: &str, value: &Value| match value {
        Value::Number(number) if name.ends_with("_bytes") => {
            let readable = number.as_u64().map_or_else(String::new, |bytes| format!("  ({})", ByteSize(bytes)));
            println!("{name:<26} {number}{readable}");
        }
        Value::String(text) => println!("{name:<26} {text}"),
        other => println!("{name:<26} {other}"),
    };
    let Some(fields) = stats.as_object() else { return };
    for (name, value) in fields {
        match value.as_object() {
            Some(inner) => inner.iter().for_each(|(name, value)| print(name, value)),
            None => print(name, value),
        }
    }
}
