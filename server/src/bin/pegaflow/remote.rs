//! Servers at other places, and the tokens for them.

use clap::Subcommand;
use pegaflow_engine::Result;
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
    let Some(url) = &options.server else {
        return Ok(match (&options.socket, options.tcp) {
            (Some(path), _) => Endpoint::Unix(path.clone()),
            (None, Some(address)) => Endpoint::Tcp(address),
            (None, None) => Endpoint::default(),
        });
    };
    let identity = options.client_cert.clone().zip(options.client_key.clone());
    let tls = options.ca.clone().map(|authorities| ClientTls { authorities, identity });
    Endpoint::parse(url, tls.as_ref())
}
