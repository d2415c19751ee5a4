//! `pegaflow pack`: a namespace as one signed file, to be carried elsewhere. Works on stores that no server has open.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use clap::{Args, Subcommand};
use indicatif::{ProgressBar, ProgressStyle};
use pegaflow_engine::{ByteSize, Engine, Error, ErrorKind, KnownNamespace, NamespaceDescriptor, Result, TENANT_FIELD};
use pegaflow_server::ExitStatus;
use pegaflow_server::pack::{Head, Pack, PackWriter, keys};
use pegaflow_server::settings::{Loaded, Settings, Source};
use serde_json::{Value, json};

/// DRAM for blocks on their way, unless the command line says how much.
const DRAM: ByteSize = ByteSize::mib(256);
/// Fields that are named where identities differ, and how much of each.
const FIELDS_MAX: usize = 8;
const FIELD_CHARS_MAX: usize = 60;
/// What is to be done with a pack.
#[derive(Debug, Subcommand)]
pub(crate) enum PackCommand {
    /// Writes a namespace of a store into one file.
    Export {
        #[command(flatten)]
        settings: Box<Settings>,
        #[command(flatten)]
        options: ExportOptions,
    },
    /// Brings the blocks of a pack into a store. They are durable when it ends.
    Import {
        #[command(flatten)]
        settings: Box<Settings>,
        #[command(flatten)]
        options: ImportOptions,
    },
    /// Checks every block of a pack, and says what is in it.
    Verify {
        /// The pack.
        #[arg(value_name = "PACK")]
        file: PathBuf,
        #[command(flatten)]
        trust: Trust,
    },
    /// Makes a key to sign packs with; prints its public half, which others give as --trust.
    Key {
        /// The file to be made.
        #[arg(value_name = "FILE")]
        file: PathBuf,
    },
}

/// What is packed, and who signs it.
#[derive(Debug, Args)]
pub(crate) struct ExportOptions {
    /// The pack to be made.
    #[arg(value_name = "PACK")]
    file: PathBuf,
    /// The namespace, by the first digits of its name (`pegaflow pack export` lists them if it has to ask).
    #[arg(long, value_name = "NAME")]
    namespace: Option<String>,
    /// The key that signs it; see `pegaflow pack key`.
    #[arg(long, value_name = "FILE", required_unless_present = "unsigned")]
    key: Option<PathBuf>,
    /// Do not sign it. Whoever imports it has to accept that.
    #[arg(long, conflicts_with = "key")]
    unsigned: bool,
}

/// Which pack, and whether it goes into a store that knows other models.
#[derive(Debug, Args)]
pub(crate) struct ImportOptions {
    /// The pack.
    #[arg(value_name = "PACK")]
    file: PathBuf,
    #[command(flatten)]
    trust: Trust,
    /// Import it although the store has namespaces, and none like the pack's: it is for an engine that is to come.
    #[arg(long)]
    new: bool,
}

/// Whose signature counts.
#[derive(Debug, Args)]
pub(crate) struct Trust {
    /// The public key of somebody whose packs are believed; may be repeated.
    #[arg(long, value_name = "KEY")]
    trust: Vec<String>,
    /// Accept a pack that nobody has signed. Who changed it can have changed what models answer.
    #[arg(long)]
    unsigned: bool,
}

impl Trust {
    /// Whether the pack is believed.
    ///
    /// # Errors
    /// `PermissionDenied` that names the signer.
    fn check(&self, pack: &Pack) -> Result<()> {
        let refuse = |message: String| Err(Error::new(ErrorKind::PermissionDenied, message));
        if !pack.footer.is_signed() {
            let message = "nobody has signed the pack; give --unsigned to believe it all the same";
            return if self.unsigned { Ok(()) } else { refuse(message.into()) };
        }
        let signer = keys::hex(&pack.footer.signer);
        if self.trust.iter().any(|trusted| trusted.trim().eq_ignore_ascii_case(&signer)) {
            return Ok(());
        }
        refuse(format!(
            "the pack is signed by {signer}, who is not trusted; give --trust {signer} if that is who you think"
        ))
    }
}

/// Does what needs no settings; `None` for the rest.
pub(crate) fn without_store(command: &PackCommand, is_json: bool) -> Option<Result<ExitStatus>> {
    match command {
        PackCommand::Verify { file, trust } => Some(verify(file, trust, is_json)),
        PackCommand::Key { file } => Some(keys::make(file).map(|public| {
            tell(is_json, &json!({ "key": file, "public": public }), &public);
            ExitStatus::Ok
        })),
        PackCommand::Export { .. } | PackCommand::Import { .. } => None,
    }
}

/// Exports or imports.
pub(crate) fn with_store(loaded: &Loaded, command: &PackCommand, is_json: bool) -> ExitCode {
    let done = match command {
        PackCommand::Export { options, .. } => export(loaded, options, is_json),
        PackCommand::Import { options, .. } => import(loaded, options, is_json),
        PackCommand::Verify { .. } | PackCommand::Key { .. } => Ok(()),
    };
    match done {
        Ok(()) => ExitStatus::Ok.into(),
        Err(error) => super::failed(&error, is_json),
    }
}

fn tell(is_json: bool, json: &Value, text: &str) {
    if is_json { println!("{json}") } else { println!("{text}") }
}

/// The store of the settings, without what a server does beside.
fn open(loaded: &Loaded) -> Result<Engine> {
    if loaded.settings.path.is_none() {
        return Err(Error::new(ErrorKind::InvalidInput, "which store? give --path, the directory of its home"));
    }
    let mut config = loaded.settings.engine();
    if loaded.effective.iter().any(|it| it.name == "dram" && it.source == Source::Default) {
        config.dram = DRAM;
    }
    config.shared_dram = false;
    if let Some(nvme) = &mut config.nvme {
        nvme.warm_start = false;
        nvme.scrub = ByteSize(0);
    }
    Engine::open(config)
}

fn closing<T>(engine: &Engine, loaded: &Loaded, outcome: Result<T>) -> Result<T> {
    let timeout = Duration::from_secs(loaded.settings.shutdown_timeout);
    let closed = engine.close(Instant::now() + timeout);
    outcome.and_then(|outcome| closed.map(|()| outcome))
}

fn bar(blocks: u64) -> ProgressBar {
    let bar = ProgressBar::new(blocks);
    if let Ok(style) = ProgressStyle::with_template("{bar:30} {pos}/{len} blocks, {eta} left") {
        bar.set_style(style);
    }
    bar
}

fn export(loaded: &Loaded, options: &ExportOptions, is_json: bool) -> Result<()> {
    let key = options.key.as_deref().map(keys::read).transpose()?;
    let engine = open(loaded)?;
    let work = || {
        let namespace = chosen(&engine.namespaces()?, options.namespace.as_deref())?;
        let mut pack = PackWriter::create(&options.file)?;
        let bar = bar(engine.stats().nvme_records);
        let report = engine.export(&namespace.id, &mut |record| {
            bar.inc(1);
            pack.add(&record)
        })?;
        bar.finish_and_clear();
        let head = Head {
            descriptor: namespace.descriptor.clone(),
            groups: namespace.groups.clone(),
            created: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs()),
            payload_bytes: pack.payload_bytes,
        };
        let bytes = pack.finish(&head, key.as_ref())?;
        Ok((namespace, report, bytes))
    };
    let outcome = work();
    let (namespace, report, bytes) = closing(&engine, loaded, outcome)?;
    let json = json!({
        "pack": options.file,
        "namespace": namespace.id.to_string(),
        "blocks": report.records,
        "payload_bytes": report.bytes,
        "file_bytes": bytes,
        "left_out": report.left_out,
        "signer": key.as_ref().map(|key| keys::hex(ring::signature::KeyPair::public_key(key).as_ref())),
    });
    let left_out = match report.left_out {
        0 => String::new(),
        left_out => format!("; {left_out} could not be read and are left out"),
    };
    let text = format!(
        "{}: {} blocks, {} in a file of {}{left_out}",
        options.file.display(),
        report.records,
        ByteSize(report.bytes),
        ByteSize(bytes)
    );
    tell(is_json, &json, &text);
    Ok(())
}

/// The namespace that was asked for, or the only one.
fn chosen(known: &[KnownNamespace], prefix: Option<&str>) -> Result<KnownNamespace> {
    let prefix = prefix.unwrap_or_default().to_ascii_lowercase();
    let matching: Vec<&KnownNamespace> =
        known.iter().filter(|namespace| namespace.id.to_string().starts_with(&prefix)).collect();
    let listed = || {
        let name = |namespace: &&KnownNamespace| {
            let model = namespace.descriptor.fields().get("model").map_or("", String::as_str);
            let tenant =
                namespace.descriptor.fields().get(TENANT_FIELD).map_or(String::new(), |it| format!(", tenant {it}"));
            format!("{:.16} ({model}{tenant})", namespace.id.to_string())
        };
        matching.iter().take(20).map(name).collect::<Vec<_>>().join(", ")
    };
    match matching.as_slice() {
        [only] => Ok((*only).clone()),
        [] if known.is_empty() => Err(Error::new(ErrorKind::NotFound, "the store has no namespace: nothing was saved")),
        [] => Err(Error::new(ErrorKind::NotFound, format!("the store has no namespace that begins with {prefix}"))),
        _ => {
            Err(Error::new(ErrorKind::InvalidInput, format!("which namespace? give --namespace, one of {}", listed())))
        }
    }
}

fn import(loaded: &Loaded, options: &ImportOptions, is_json: bool) -> Result<()> {
    let pack = Pack::open(&options.file)?;
    options.trust.check(&pack)?;
    let engine = open(loaded)?;
    let work = || {
        if !options.new {
            check_identity(&pack.head.descriptor, &engine.namespaces()?)?;
        }
        let (mut blocks, bar) = (pack.blocks(), bar(pack.footer.entries));
        let report = engine.import(&pack.head.descriptor, &pack.head.groups, &mut || {
            bar.inc(1);
            blocks.next_block()
        });
        bar.finish_and_clear();
        report
    };
    let outcome = work();
    let report = closing(&engine, loaded, outcome)?;
    let json = json!({
        "pack": options.file,
        "namespace": pack.head.descriptor.id().to_string(),
        "imported": report.imported,
        "present": report.present,
    });
    tell(is_json, &json, &format!("{} blocks imported, {} were there already", report.imported, report.present));
    Ok(())
}

/// A store that knows other namespaces only is one whose engines would never find these blocks.
fn check_identity(pack: &NamespaceDescriptor, known: &[KnownNamespace]) -> Result<()> {
    let differing = |namespace: &KnownNamespace| -> Vec<String> {
        let (theirs, ours) = (pack.fields(), namespace.descriptor.fields());
        let names = theirs.keys().chain(ours.keys().filter(|name| !theirs.contains_key(*name)));
        names
            .filter(|name| *name != TENANT_FIELD && theirs.get(*name) != ours.get(*name))
            .map(|name| {
                let shown = |value: Option<&String>| value.map_or("nothing".to_owned(), |text| shortened(text));
                format!("{name} is {} in the pack, {} here", shown(theirs.get(name)), shown(ours.get(name)))
            })
            .collect()
    };
    let nearest = known.iter().map(differing).min_by_key(Vec::len).unwrap_or_default();
    if nearest.is_empty() {
        return Ok(());
    }
    let more = nearest.len().saturating_sub(FIELDS_MAX);
    let more = if more > 0 { format!("; and {more} fields more") } else { String::new() };
    let named: Vec<String> = nearest.into_iter().take(FIELDS_MAX).collect();
    Err(Error::new(
        ErrorKind::PermissionDenied,
        format!(
            "the pack is of another identity than what the store has, so its engines would not find it: {}{more}; give --new to import it for others",
            named.join("; ")
        ),
    ))
}

fn shortened(text: &str) -> String {
    match text.char_indices().nth(FIELD_CHARS_MAX) {
        Some((end, _)) => format!("{}...", text.get(..end).unwrap_or_default()),
        None => text.to_owned(),
    }
}

fn verify(file: &Path, trust: &Trust, is_json: bool) -> Result<ExitStatus> {
    let pack = Pack::open(file)?;
    if !trust.trust.is_empty() {
        trust.check(&pack)?;
    }
    let (mut blocks, bar) = (pack.blocks(), bar(pack.footer.entries));
    while blocks.next_block()?.is_some() {
        bar.inc(1);
    }
    bar.finish_and_clear();
    let signer = pack.footer.is_signed().then(|| keys::hex(&pack.footer.signer));
    let json = json!({
        "pack": file,
        "is_good": true,
        "namespace": pack.head.descriptor.id().to_string(),
        "fields": pack.head.descriptor.fields(),
        "blocks": pack.footer.entries,
        "payload_bytes": pack.head.payload_bytes,
        "file_bytes": pack.file_bytes,
        "created": pack.head.created,
        "signer": signer,
    });
    let model = pack.head.descriptor.fields().get("model").map_or("an unnamed model", String::as_str);
    let text = format!(
        "{}: {} blocks of {model}, {}, all as they were packed; {}",
        file.display(),
        pack.footer.entries,
        ByteSize(pack.head.payload_bytes),
        signer.map_or("not signed".to_owned(), |signer| format!("signed by {signer}"))
    );
    tell(is_json, &json, &text);
    Ok(ExitStatus::Ok)
}

#[cfg(test)]
mod tests;
