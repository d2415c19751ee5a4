//! Servers at other places, and the tokens for them.

use clap::Subcommand;
use pegaflow_engine::{Error, ErrorKind, Result};
use pegaflow_server::client::Endpoint;
use pegaflow_server::{ClientTls, NewToken, Role};
use serde_json::json;

use super::Options;

/// What there is to do about tokens.
#[derive(Debug, Subcommand)]
pub(crate) enum TokenCommand {
    /// Makes a token and prints it, once: it is kept nowhere. The line for the server's file (`--tokens`) goes beside it.
    New {
        /// What its owner may do: engine, operator or read-only.
        #[arg(long, value_name = "ROLE")]
        role: Role,
        /// Whose it is, for the log.
        #[arg(long, value_name = "NAME")]
        name: String,
    },
}

/// Makes a token.
pub(crate) fn token(command: &TokenCommand, is_json: bool) -> Result<()> {
    let TokenCommand::New { role, name } = command;
    let made = NewToken::make(*role, name)?;
    match is_json {
        true => println!("{}", json!({ "token": made.token, "line": made.line })),
        false => {
            println!("token, for the client (it is not shown again): {}", made.token);
            println!("line, for the server's file of tokens:         {}", made.line);
        }
    }
    Ok(())
}

/// Where the server is, as the options say.
pub(crate) fn endpoint(options: &Options) -> Result<Endpoint> {
    let bad = |message: String| Error::new(ErrorKind::InvalidInput, message);
    let Some(url) = &options.server else {
        return Ok(match (&options.socket, options.tcp) {
            (Some(path), _) => Endpoint::Unix(path.clone()),
            (None, Some(address)) => Endpoint::Tcp(address),
            (None, None) => Endpoint::default(),
        });
    };
    let wrong = || bad(format!("'{url}' is no server; write https://HOST:PORT, or http://ADDRESS:PORT on loopback"));
    let trimmed = url.trim_end_matches('/');
    if let Some(address) = trimmed.strip_prefix("http://") {
        let address: std::net::SocketAddr = address.parse().map_err(|_| wrong())?;
        if !address.ip().is_loopback() {
            return Err(bad(format!("{address} is not loopback, and http is not encrypted; write https://")));
        }
        return Ok(Endpoint::Tcp(address));
    }
    let (host, port) = trimmed.strip_prefix("https://").and_then(|rest| rest.rsplit_once(':')).ok_or_else(wrong)?;
    let host = host.trim_start_matches('[').trim_end_matches(']').to_owned();
    let port = port.parse().map_err(|_| wrong())?;
    let authorities = options.ca.clone().ok_or_else(|| {
        bad("https needs --ca, a file with the authorities that may vouch for the server, in PEM".into())
    })?;
    let identity = options.client_cert.clone().zip(options.client_key.clone());
    Ok(Endpoint::Tls { host, port, tls: ClientTls { authorities, identity } })
}
