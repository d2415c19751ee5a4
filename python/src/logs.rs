//! The engine's log lines go to standard error. `PEGAFLOW_LOG` chooses what is shown; by default warnings.

use std::io::IsTerminal;
use std::sync::Once;

use tracing_subscriber::EnvFilter;

/// Starts logging, once in a process; a subscriber that is there already stays.
pub(crate) fn start() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let filter = EnvFilter::try_from_env("PEGAFLOW_LOG").unwrap_or_else(|_| EnvFilter::new("warn"));
        let started = tracing_subscriber::fmt()
            .with_env_filter(filter)
            .with_writer(std::io::stderr)
            .with_ansi(std::io::stderr().is_terminal())
            .try_init();
        if started.is_err() {
            tracing::debug!("another log subscriber is in place");
        }
    });
}
