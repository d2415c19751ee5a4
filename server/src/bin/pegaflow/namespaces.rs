//! `pegaflow ls` and `pegaflow purge`: what the server has of each namespace, and how to get rid of it.

use std::io::{IsTerminal, Write};
use std::time::Duration;

use clap::{ArgGroup, Args};
use pegaflow_engine::{
    ByteSize, Error, ErrorKind, KeyPrefix, NamespaceDescriptor, NamespaceId, Result, TENANT_FIELD, TenantId,
};
use pegaflow_server::client::Client;
use serde_json::{Value, json};

use crate::warm::PATIENCE;
use crate::{duration, pins};

/// How long the server may take for a page of namespaces whose rows it counts.
const LIST_PATIENCE: Duration = Duration::from_secs(300);
/// Digits of a namespace that are shown.
const DIGITS: usize = 16;

/// What is listed, and how exactly.
#[derive(Debug, Args)]
pub(crate) struct ListOptions {
    /// Rows of the index that are counted at most, about a million in a second; what is above is told as "at least". 0: only
    /// DRAM is looked at.
    #[arg(long, value_name = "ROWS", default_value_t = 5_000_000,
          value_parser = clap::value_parser!(u64).range(..=100_000_000))]
    count: u64,
    /// Lists the prefixes in DRAM, too, by the keys of their first blocks, which `pin --prefix` and `evict --prefix` take: those that
    /// begin requests, the largest ones first.
    #[arg(long)]
    prefixes: bool,
    /// With --prefixes: of this namespace only, by the beginning of its name.
    #[arg(long, value_name = "ID-PREFIX", requires = "prefixes")]
    namespace: Option<String>,
    /// With --prefixes: those in which the prefix with this key goes on.
    #[arg(long, value_name = "KEY", requires = "prefixes")]
    under: Option<KeyPrefix>,
    /// With --prefixes: at most so many.
    #[arg(long, value_name = "NUMBER", default_value_t = 20, requires = "prefixes",
          value_parser = clap::value_parser!(u32).range(1..=1000))]
    most: u32,
}

/// Which namespaces, and how sure that is.
#[derive(Debug, Args)]
#[command(group(ArgGroup::new("whose").required(true).args(["namespace", "tenant", "cache_salt", "all"])))]
pub(crate) struct PurgeOptions {
    #[command(flatten)]
    which: Which,
    /// Do not ask. Needed where there is no terminal to ask at, and with --json.
    #[arg(long)]
    yes: bool,
    /// The longest wait for each namespace, in seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..=600))]
    timeout: u64,
    /// Of these only namespaces that were neither looked up nor saved to for so long: 90s, 30min, 12h, 7d. The server knows that
    /// since its start only: before so much time has gone by it purges none.
    #[arg(long, value_name = "TIME", value_parser = duration::parse)]
    older_than: Option<Duration>,
    /// Refused: see `pegaflow evict --prefix`.
    #[arg(long, value_name = "KEY", hide = true)]
    prefix: Option<KeyPrefix>,
}

/// Which namespaces.
#[derive(Debug, Args)]
#[group(multiple = false)]
pub(crate) struct Which {
    /// The one whose name begins with this, as `pegaflow ls` shows it.
    #[arg(long, value_name = "ID-PREFIX")]
    namespace: Option<String>,
    /// All of a tenant, of every model. Where it shares a namespace with others (there are more than 1,024 tenants), theirs go
    /// too.
    #[arg(long, value_name = "NAME")]
    tenant: Option<String>,
    /// All of the tenant of requests with this cache salt.
    #[arg(long, value_name = "SALT")]
    cache_salt: Option<String>,
    /// All. Named objects are none: they stay.
    #[arg(long)]
    all: bool,
}

impl Which {
    /// Whether none is left out.
    fn is_all(&self) -> bool {
        self.namespace.is_none() && self.tenant.is_none() && self.cache_salt.is_none()
    }

    fn tenant(&self) -> Option<String> {
        let of_salt = self.cache_salt.as_deref().map(|salt| TenantId::of_cache_salt(salt).to_string());
        self.tenant.clone().or(of_salt)
    }
}

/// One namespace, as the server tells of it.
struct Namespace {
    id: NamespaceId,
    told: Value,
}

impl Namespace {
    fn new(told: Value) -> Result<Self> {
        let unclear = || Error::new(ErrorKind::Io, "the server's answer is not understood: a namespace without a name");
        let text = told.get("id").and_then(Value::as_str).filter(|text| text.len() == 64 && text.is_ascii());
        let byte = |at: usize| text.and_then(|text| u8::from_str_radix(text.get(at * 2..at * 2 + 2)?, 16).ok());
        let bytes: Option<Vec<u8>> = (0..32).map(byte).collect();
        let bytes = bytes.and_then(|bytes| <[u8; 32]>::try_from(bytes).ok()).ok_or_else(unclear)?;
        Ok(Self { id: NamespaceId::from_bytes(bytes), told })
    }

    fn field(&self, name: &str) -> Option<&str> {
        self.told.get("fields")?.get(name)?.as_str()
    }

    fn number(&self, path: &str) -> Option<u64> {
        self.told.pointer(path)?.as_u64()
    }

    /// What people know it by.
    fn title(&self) -> String {
        let what = self.field("model").or(self.field("kind")).unwrap_or("?");
        let tenant = self.field(TENANT_FIELD).map_or(String::new(), |tenant| format!(", tenant {tenant}"));
        format!("{:.DIGITS$} ({what}{tenant})", self.id.to_string())
    }
}

/// All namespaces.
fn list(client: &Client, rows_max: u64) -> Result<Vec<Namespace>> {
    let (mut found, mut left): (Vec<Namespace>, u64) = (Vec::new(), rows_max);
    loop {
        let after = found.last().map(|namespace| namespace.id);
        let (page, is_last) = client.list_namespaces(after.as_ref(), left, LIST_PATIENCE)?;
        let page: Vec<Value> = serde_json::from_str(&page)
            .map_err(|error| Error::new(ErrorKind::Io, format!("the server's answer is not understood: {error}")))?;
        let page: Vec<Namespace> = page.into_iter().map(Namespace::new).collect::<Result<_>>()?;
        left = left.saturating_sub(page.iter().filter_map(|one| one.number("/drive/blocks")).sum());
        let is_empty = page.is_empty();
        found.extend(page);
        if is_last || is_empty {
            return Ok(found);
        }
    }
}

/// Whether the server knows a namespace of this name.
pub(crate) fn is_known(client: &Client, id: &NamespaceId) -> Result<bool> {
    Ok(list(client, 0)?.iter().any(|namespace| namespace.id == *id))
}

/// Lists namespaces and pins; as JSON, and as text if that is wanted.
pub(crate) fn ls(client: &Client, options: &ListOptions, is_json: bool) -> Result<Value> {
    let found = list(client, options.count)?;
    let pins = match client.pins() {
        // Pins name blocks, which are told to operators only.
        Err(error) if error.kind() == ErrorKind::PermissionDenied => None,
        pins => Some(pins?),
    };
    if !is_json {
        print(&found);
        pins.iter().flatten().for_each(|pin| println!("{}", pins::line(pin)));
    }
    let told: Vec<Value> = found.iter().map(|namespace| namespace.told.clone()).collect();
    let mut told = json!({ "namespaces": told, "pins": pins });
    if options.prefixes {
        let which = Which { namespace: options.namespace.clone(), tenant: None, cache_salt: None, all: false };
        let ids: Vec<NamespaceId> = match which.is_all() {
            true => Vec::new(),
            false => chosen(found, &which)?.iter().map(|namespace| namespace.id).collect(),
        };
        let prefixes = client.list_prefixes(&ids, options.under.as_ref(), options.most, PATIENCE)?;
        if !is_json {
            pins::print_prefixes(&prefixes);
        }
        told["prefixes"] = prefixes.into();
    }
    Ok(told)
}

fn print(found: &[Namespace]) {
    if found.is_empty() {
        return println!("there are no namespaces: nothing was registered, and nothing saved");
    }
    println!(
        "{:DIGITS$}  {:24} {:16} {:>9} {:>22} {:>11} {:>22} {:>6} {:>9}",
        "NAMESPACE", "MODEL", "TENANT", "INSTANCES", "DRAM", "PINNED", "DRIVE", "HITS", "USED"
    );
    for one in found {
        let amount = |blocks: Option<u64>, bytes: Option<u64>| match (blocks, bytes) {
            (Some(blocks), Some(bytes)) => format!("{blocks} in {}", ByteSize(bytes)),
            _ => "-".into(),
        };
        let is_cut = one.told.pointer("/drive/is_complete") == Some(&Value::Bool(false));
        let drive = amount(one.number("/drive/blocks"), one.number("/drive/bytes"));
        let drive = if is_cut { format!(">={drive}") } else { drive };
        let hits = match (one.number("/hit_blocks"), one.number("/lookup_blocks")) {
            (Some(hits), Some(asked)) if asked > 0 => format!("{:.0} %", hits as f64 * 100.0 / asked as f64),
            _ => "-".into(),
        };
        let used = one.number("/idle_ms").map_or_else(|| "-".into(), |ms| ago(Duration::from_millis(ms)));
        println!(
            "{:.DIGITS$}  {:24.24} {:16.16} {:>9} {:>22} {:>11} {drive:>22} {hits:>6} {used:>9}",
            one.id.to_string(),
            one.field("model").or(one.field("kind")).unwrap_or("?"),
            one.field(TENANT_FIELD).unwrap_or("-"),
            one.number("/instances").unwrap_or(0),
            amount(one.number("/dram_blocks"), one.number("/dram_bytes")),
            one.number("/pinned_bytes")
                .filter(|bytes| *bytes > 0)
                .map_or_else(|| "-".into(), |bytes| ByteSize(bytes).to_string()),
        );
    }
}

/// How long, for people.
pub(crate) fn ago(idle: Duration) -> String {
    match idle.as_secs() {
        seconds @ 0..120 => format!("{seconds} s"),
        seconds @ 120..7200 => format!("{} min", seconds / 60),
        seconds @ 7200..172_800 => format!("{} h", seconds / 3600),
        seconds => format!("{} d", seconds / 86_400),
    }
}

/// Purges what was asked for; what was done, as JSON, and as text if that is wanted.
pub(crate) fn purge(client: &Client, options: &PurgeOptions, is_json: bool) -> Result<Value> {
    if options.prefix.is_some() {
        let message = "a prefix is not purged: only a namespace has an end that outlasts crashes, and covers what is on its way to the \
                       drive. pegaflow evict --prefix takes it out of DRAM, purge --tenant or --cache-salt out of everywhere";
        return Err(Error::new(ErrorKind::Unsupported, message));
    }
    let mut chosen = chosen(list(client, 0)?, &options.which)?;
    if let Some(time) = options.older_than {
        let up_ms = client.stats()?.get("uptime_ms").and_then(Value::as_u64).unwrap_or(0);
        let idle = |one: &Namespace| Duration::from_millis(one.number("/idle_ms").unwrap_or(up_ms));
        chosen.retain(|one| idle(one) >= time);
        if chosen.is_empty() {
            let up = ago(Duration::from_millis(up_ms));
            let message =
                format!("no namespace is unused for {time:?}, as far as the server knows, which runs for {up}");
            return Err(Error::new(ErrorKind::NotFound, message));
        }
    }
    if !options.yes && !is_confirmed(&chosen, is_json)? {
        return Err(Error::new(ErrorKind::Cancelled, "nothing was purged"));
    }
    let mut purged = Vec::new();
    for namespace in &chosen {
        let done = match client.purge(&namespace.id, options.older_than, Duration::from_secs(options.timeout)) {
            // Somebody else was faster.
            Err(error) if error.kind() == ErrorKind::NotFound => continue,
            // It was used just now.
            Err(error) if error.kind() == ErrorKind::Busy && options.older_than.is_some() => continue,
            Err(error) => {
                let (id, done, all) = (namespace.id, purged.len(), chosen.len());
                return Err(error.with("namespace", id).with("purged", format!("{done} of {all}")));
            }
            Ok(done) => done,
        };
        if !is_json {
            println!(
                "purged {}: {} blocks ({}) in DRAM, {} blocks ({}) on the drive{}{}",
                namespace.title(),
                done.dram_blocks,
                ByteSize(done.dram_bytes),
                done.drive_blocks,
                ByteSize(done.drive_bytes),
                if done.destroyed_keys > 0 { ", its key is destroyed" } else { "" },
                if done.is_swept { "" } else { "; the index is swept when the store is opened next" },
            );
        }
        purged.push(json!({
            "id": namespace.id.to_string(),
            "tenant": namespace.field(TENANT_FIELD),
            "dram_blocks": done.dram_blocks,
            "dram_bytes": done.dram_bytes,
            "drive_blocks": done.drive_blocks,
            "drive_bytes": done.drive_bytes,
            "destroyed_keys": done.destroyed_keys,
            "is_swept": done.is_swept,
        }));
    }
    let sum = |name: &str| purged.iter().filter_map(|one| one.get(name)?.as_u64()).sum::<u64>();
    let told = json!({
        "namespaces": purged.len(),
        "dram_blocks": sum("dram_blocks"),
        "dram_bytes": sum("dram_bytes"),
        "drive_blocks": sum("drive_blocks"),
        "drive_bytes": sum("drive_bytes"),
        "destroyed_keys": sum("destroyed_keys"),
        "purged": purged,
    });
    if !is_json {
        println!("{} namespaces purged, {} keys destroyed", told["namespaces"], told["destroyed_keys"]);
    }
    Ok(told)
}

/// The names of those that are meant; none for all.
pub(crate) fn meant(client: &Client, which: &Which) -> Result<Vec<NamespaceId>> {
    if which.is_all() {
        return Ok(Vec::new());
    }
    Ok(chosen(list(client, 0)?, which)?.into_iter().map(|namespace| namespace.id).collect())
}

/// Those that are meant, never none.
fn chosen(known: Vec<Namespace>, which: &Which) -> Result<Vec<Namespace>> {
    let objects = NamespaceDescriptor::objects().id();
    let known = known.into_iter().filter(|namespace| namespace.id != objects);
    let none = |what: String| Error::new(ErrorKind::NotFound, format!("{what}; pegaflow ls shows what there is"));
    let (chosen, missing): (Vec<Namespace>, _) = if let Some(prefix) = &which.namespace {
        let prefix = prefix.to_ascii_lowercase();
        let chosen: Vec<Namespace> = known.filter(|one| one.id.to_string().starts_with(&prefix)).collect();
        if prefix.is_empty() || chosen.len() > 1 {
            let few = chosen.iter().take(20).map(Namespace::title).collect::<Vec<_>>().join(", ");
            let message = format!("{} namespaces begin with '{prefix}'; give more digits of one: {few}", chosen.len());
            return Err(Error::new(ErrorKind::InvalidInput, message));
        }
        (chosen, none(format!("there is no namespace that begins with {prefix}")))
    } else if let Some(tenant) = which.tenant() {
        let values =
            TenantId::new(&tenant).map_or_else(|_| vec![tenant.clone()], |tenant| tenant.field_values().into());
        let is_meant =
            |one: &Namespace| one.field(TENANT_FIELD).is_some_and(|value| values.iter().any(|it| it == value));
        (known.filter(is_meant).collect(), none(format!("there is no namespace of tenant {tenant}")))
    } else {
        (known.collect(), none("there is no namespace".into()))
    };
    if chosen.is_empty() { Err(missing) } else { Ok(chosen) }
}

/// Asks, where there is somebody to ask.
fn is_confirmed(chosen: &[Namespace], is_json: bool) -> Result<bool> {
    let unsure = |source| Error::from_io("asking at the terminal", source);
    if is_json || !std::io::stdin().is_terminal() || !std::io::stderr().is_terminal() {
        let message = format!("{} namespaces would be purged, for good; say so with --yes", chosen.len());
        return Err(Error::new(ErrorKind::InvalidInput, message));
    }
    for namespace in chosen {
        eprintln!("  {}", namespace.title());
    }
    eprint!("Purge {} namespaces, for good? [y/N] ", chosen.len());
    std::io::stderr().flush().map_err(unsure)?;
    let mut answer = String::new();
    std::io::stdin().read_line(&mut answer).map_err(unsure)?;
    Ok(matches!(answer.trim().to_ascii_lowercase().as_str(), "y" | "yes"))
}
