//! `pegaflow pin` keeps blocks in the DRAM of a running server; `pegaflow unpin` lets go of them.

use std::time::Duration;

use clap::{ArgGroup, Args};
use pegaflow_engine::{BlockChoice, ByteSize, KeyPrefix, Result};
use pegaflow_server::client::Client;
use serde_json::{Value, json};

use crate::duration;
use crate::namespaces::{Which, ago, meant};
use crate::warm::PATIENCE;

/// Which blocks are to stay, and for how long.
#[derive(Debug, Args)]
#[command(group(
    ArgGroup::new("whose").required(true).multiple(true).args(["namespace", "tenant", "cache_salt", "all", "prefix"])
))]
pub(crate) struct PinOptions {
    #[command(flatten)]
    which: Which,
    /// Of these only the block with this key, those before it in its chain, and all that continue it. 8 to 64 hexadecimal
    /// digits.
    #[arg(long, value_name = "KEY")]
    prefix: Option<KeyPrefix>,
    /// End the pin after so long: 90s, 30min, 12h, 7d. Default: it goes on until it is ended, or the server is.
    #[arg(long, value_name = "TIME", value_parser = duration::parse)]
    ttl: Option<Duration>,
}

/// What is to be let go of.
#[derive(Debug, Args)]
#[command(group(ArgGroup::new("what").required(true).args(["pin", "namespace", "tenant", "cache_salt", "all"])))]
pub(crate) struct UnpinOptions {
    /// The pin's number, as `pegaflow ls` shows it.
    #[arg(value_name = "PIN", value_parser = clap::value_parser!(u64).range(1..))]
    pin: Option<u64>,
    #[command(flatten)]
    which: Which,
}

/// Pins what was asked for; the pin, as JSON, and as text if that is wanted.
pub(crate) fn pin(client: &Client, options: &PinOptions, is_json: bool) -> Result<Value> {
    let (namespaces, prefix) = (meant(client, &options.which)?, options.prefix.clone());
    let pin = client.pin(&BlockChoice { namespaces, prefix, unused_for: None }, options.ttl, PATIENCE)?;
    if !is_json {
        println!("{}", line(&pin));
    }
    Ok(pin)
}

/// Ends pins; what was done, as JSON, and as text if that is wanted.
pub(crate) fn unpin(client: &Client, options: &UnpinOptions, is_json: bool) -> Result<Value> {
    let ended = match options.pin {
        Some(number) => client.unpin(number, PATIENCE)?,
        None => client.unpin_namespaces(&meant(client, &options.which)?, PATIENCE)?,
    };
    if !is_json {
        println!("{} pins are over; {} blocks ({}) may leave DRAM", ended.pins, ended.blocks, ByteSize(ended.bytes));
    }
    Ok(json!({ "pins": ended.pins, "blocks": ended.blocks, "bytes": ended.bytes }))
}

/// Prefixes, for people.
pub(crate) fn print_prefixes(prefixes: &[Value]) {
    println!(
        "{:16}  {:16} {:>6} {:>7} {:>8} {:>22} {:>11} {:>5} {:>9}",
        "PREFIX", "NAMESPACE", "BEFORE", "SHARED", "BRANCHES", "DRAM", "PINNED", "USES", "USED"
    );
    for prefix in prefixes {
        let text = |name: &str| prefix.get(name).and_then(Value::as_str).unwrap_or("?");
        let number = |name: &str| prefix.get(name).and_then(Value::as_u64);
        let of = |name: &str| number(name).unwrap_or(0);
        println!(
            "{:.16}  {:.16} {:>6} {:>7} {:>8} {:>22} {:>11} {:>5} {:>9}",
            text("key"),
            text("namespace"),
            of("depth"),
            of("common_blocks"),
            of("branches"),
            format!("{} in {}", of("blocks"), ByteSize(of("bytes"))),
            number("pinned_bytes").filter(|bytes| *bytes > 0).map_or_else(|| "-".into(), |it| ByteSize(it).to_string()),
            number("uses").map_or_else(|| "-".into(), |uses| uses.to_string()),
            ago(Duration::from_millis(of("idle_ms"))),
        );
    }
}

/// A pin, for people.
pub(crate) fn line(pin: &Value) -> String {
    let number = |name: &str| pin.get(name).and_then(Value::as_u64);
    let of = |name: &str| number(name).unwrap_or(0);
    let namespaces: Vec<String> = pin
        .get("namespaces")
        .and_then(Value::as_array)
        .map(|ids| ids.iter().filter_map(Value::as_str).map(|id| format!("{id:.16}")).collect())
        .unwrap_or_default();
    let whose = if namespaces.is_empty() { "all namespaces".into() } else { namespaces.join(", ") };
    let prefix = pin.get("prefix").and_then(Value::as_str).map_or(String::new(), |key| format!(", prefix {key:.16}"));
    let until = number("left_ms")
        .map_or_else(|| "until it is ended".into(), |ms| format!("for {} more", ago(Duration::from_millis(ms))));
    format!("pin {}: {} blocks ({}) of {whose}{prefix}, {until}", of("number"), of("blocks"), ByteSize(of("bytes")))
}
