//! TLS 1.3 for TCP, both ends, with rustls on `ring`. Certificates and keys come from PEM files; the server's can be read
//! anew while it runs, for connections that come afterwards.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::RwLock;
use pegaflow_engine::{Error, ErrorKind, Result};
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::server::WebPkiClientVerifier;
use tokio_rustls::rustls::version::TLS13;
use tokio_rustls::rustls::{ClientConfig, RootCertStore, ServerConfig, crypto};
use tokio_rustls::{TlsAcceptor, TlsConnector};

use crate::owner_only;

/// The only protocol spoken inside: HTTP/2.
const ALPN: &[u8] = b"h2";

/// Where a server's certificate and key are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsFiles {
    /// The certificate and those between it and its authority, in PEM.
    pub certificate: PathBuf,
    /// Its private key, in PEM; readable by its owner alone.
    pub key: PathBuf,
    /// Authorities of clients, in PEM: then every client needs a certificate too. Default: none.
    pub client_authorities: Option<PathBuf>,
}

/// A server's side, as its files say now.
#[derive(Debug)]
pub struct ServerTls {
    files: TlsFiles,
    config: RwLock<Arc<ServerConfig>>,
}

impl ServerTls {
    /// Reads the files.
    ///
    /// # Errors
    /// `PermissionDenied` for a key that others can read, `InvalidInput` for files that are not what they should be or do
    /// not belong together, and what the file system reports.
    pub fn read(files: TlsFiles) -> Result<Self> {
        let config = RwLock::new(server_config(&files)?);
        Ok(Self { files, config })
    }

    /// Reads the files again; connections that are there keep what they have.
    ///
    /// # Errors
    /// As [`ServerTls::read`]; then everything stays as it is.
    pub fn reload(&self) -> Result<()> {
        let config = server_config(&self.files)?;
        *self.config.write() = config;
        Ok(())
    }

    pub(crate) fn acceptor(&self) -> TlsAcceptor {
        TlsAcceptor::from(Arc::clone(&self.config.read()))
    }
}

fn invalid(what: &str, path: &Path, why: impl std::fmt::Display) -> Error {
    Error::new(ErrorKind::InvalidInput, format!("{what} {}: {why}", path.display()))
}

fn certificates(what: &str, path: &Path) -> Result<Vec<CertificateDer<'static>>> {
    let text =
        std::fs::read(path).map_err(|error| Error::from_io(format!("reading {what} {}", path.display()), error))?;
    let found: std::result::Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&text).collect();
    let found = found.map_err(|error| invalid(what, path, error))?;
    if found.is_empty() { Err(invalid(what, path, "it has no certificate in PEM")) } else { Ok(found) }
}

fn authorities(what: &str, path: &Path) -> Result<RootCertStore> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(what, path)? {
        roots.add(certificate).map_err(|error| invalid(what, path, error))?;
    }
    Ok(roots)
}

fn private_key(path: &Path) -> Result<PrivateKeyDer<'static>> {
    let text = owner_only::read("the TLS key", path)?;
    PrivateKeyDer::from_pem_slice(text.as_bytes()).map_err(|error| invalid("the TLS key", path, error))
}

fn server_config(files: &TlsFiles) -> Result<Arc<ServerConfig>> {
    let provider = Arc::new(crypto::ring::default_provider());
    let wrong = |error: &dyn std::fmt::Display| invalid("the TLS certificate", &files.certificate, error);
    let builder = ServerConfig::builder_with_provider(Arc::clone(&provider)).with_protocol_versions(&[&TLS13]);
    let builder = builder.map_err(|error| wrong(&error))?;
    let builder = match &files.client_authorities {
        None => builder.with_no_client_auth(),
        Some(path) => {
            let roots = Arc::new(authorities("the authorities of clients", path)?);
            let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider).build();
            builder.with_client_cert_verifier(verifier.map_err(|error| invalid("the authorities", path, error))?)
        }
    };
    let chain = certificates("the TLS certificate", &files.certificate)?;
    let config = builder.with_single_cert(chain, private_key(&files.key)?);
    let mut config = config.map_err(|error| wrong(&error))?;
    config.alpn_protocols = vec![ALPN.to_vec()];
    Ok(Arc::new(config))
}

/// What a client needs to trust a server, and to be trusted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClientTls {
    /// The authorities that may vouch for the server, in PEM: no others do.
    pub authorities: PathBuf,
    /// The client's own certificate and key, in PEM, for a server that asks for one. Default: none.
    pub identity: Option<(PathBuf, PathBuf)>,
}

impl ClientTls {
    pub(crate) fn connector(&self) -> Result<TlsConnector> {
        let provider = Arc::new(crypto::ring::default_provider());
        let wrong = |error: &dyn std::fmt::Display| invalid("the authorities", &self.authorities, error);
        let builder = ClientConfig::builder_with_provider(provider).with_protocol_versions(&[&TLS13]);
        let builder = builder.map_err(|error| wrong(&error))?;
        let builder = builder.with_root_certificates(authorities("the authorities", &self.authorities)?);
        let mut config = match &self.identity {
            None => builder.with_no_client_auth(),
            Some((certificate, key)) => {
                let chain = certificates("the client's certificate", certificate)?;
                let config = builder.with_client_auth_cert(chain, private_key(key)?);
                config.map_err(|error| invalid("the client's certificate", certificate, error))?
            }
        };
        config.alpn_protocols = vec![ALPN.to_vec()];
        Ok(TlsConnector::from(Arc::new(config)))
    }
}
