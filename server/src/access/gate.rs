//! Who may connect over TCP: so many connections in all and of each address. What is over a bound is closed at once, so that a
//! flood leaves no backlog behind which others wait, and takes no memory.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use parking_lot::Mutex;

use crate::limits::{CONNECTIONS_PER_ADDRESS_MAX, TCP_CONNECTIONS_MAX};

/// See the module.
#[derive(Debug)]
pub(crate) struct Gate {
    connections_max: usize,
    open: Mutex<HashMap<IpAddr, usize>>,
    refused: AtomicU64,
}

impl Gate {
    /// With the bounds of [`crate::limits`], and within a quarter of the files that the process may open.
    pub(crate) fn new() -> Arc<Self> {
        let files = rustix::process::getrlimit(rustix::process::Resource::Nofile).current.unwrap_or(u64::MAX);
        let files = usize::try_from(files / 4).unwrap_or(usize::MAX).max(1);
        Arc::new(Self {
            connections_max: TCP_CONNECTIONS_MAX.min(files),
            open: Mutex::default(),
            refused: AtomicU64::new(0),
        })
    }

    /// A place for a connection from this address, if there is one.
    pub(crate) fn enter(self: &Arc<Self>, address: SocketAddr) -> Option<Place> {
        let mut open = self.open.lock();
        let all: usize = open.values().sum();
        let of_address = open.get(&address.ip()).copied().unwrap_or(0);
        if all >= self.connections_max || of_address >= CONNECTIONS_PER_ADDRESS_MAX {
            drop(open);
            let refused = self.refused.fetch_add(1, Ordering::Relaxed) + 1;
            // A flood does not fill the log.
            if refused.is_power_of_two() {
                tracing::warn!(%address, all, of_address, refused, "too many connections; this one was closed");
            }
            return None;
        }
        *open.entry(address.ip()).or_default() += 1;
        Some(Place { gate: Arc::clone(self), peer: Peer { address, admitted: Arc::default() } })
    }
}

/// The other end of a connection, as every request of it knows it.
#[derive(Debug, Clone)]
pub(crate) struct Peer {
    pub(crate) address: SocketAddr,
    /// Whether a request of it was let in: until then its time runs.
    pub(crate) admitted: Arc<AtomicBool>,
}

/// A connection's place; given back when dropped.
#[derive(Debug)]
pub(crate) struct Place {
    gate: Arc<Gate>,
    pub(crate) peer: Peer,
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut open = self.gate.open.lock();
        let address = self.peer.address.ip();
        if let Some(count) = open.get_mut(&address) {
            *count -= 1;
            if *count == 0 {
                open.remove(&address);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_address_leaves_places_to_others_and_all_come_back() {
        let gate = Gate::new();
        let from = |host: u8| SocketAddr::from(([127, 0, 0, host], 1));
        let places: Vec<Place> = (0..CONNECTIONS_PER_ADDRESS_MAX).map(|_| gate.enter(from(1)).expect("room")).collect();
        assert!(gate.enter(from(1)).is_none());
        let other = gate.enter(from(2)).expect("another address");
        drop(places);
        assert!(gate.enter(from(1)).is_some());
        let mut all = vec![other];
        all.extend(
            (3..=255)
                .flat_map(|host| (0..CONNECTIONS_PER_ADDRESS_MAX).map(move |_| host))
                .map_while(|host| gate.enter(from(host))),
        );
        assert_eq!(all.len(), gate.connections_max.min(254 * CONNECTIONS_PER_ADDRESS_MAX));
        drop(all);
        assert!(gate.open.lock().is_empty());
    }
}
