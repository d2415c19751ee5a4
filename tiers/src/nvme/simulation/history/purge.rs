//! A purge of the namespace of all blocks: when it is acknowledged none of them is ever found again.

use std::time::{Duration, Instant};

use super::{BLOCKS, Fact, History, OBJECTS, SimFailureKind, Step, descriptor};

/// How long a purge may take: it waits for threads, not for the drive.
const PATIENCE: Duration = Duration::from_secs(60);

impl History {
    /// All blocks go at once; what is saved from then on is of a new number.
    pub(super) fn purge(&mut self) -> Step {
        let (Some(store), Some(_)) = (self.world.store.clone(), self.namespace) else { return Ok(()) };
        self.tell(|| "purge".to_owned());
        if self.pinned.as_ref().is_some_and(|pinned| pinned.name >= OBJECTS) {
            self.pinned = None;
        }
        self.namespace = None;
        self.operation += 1;
        match store.purge(&descriptor(0).id(), Instant::now() + PATIENCE) {
            Ok(Some(_)) => {
                self.tally.purges += 1;
                (OBJECTS..OBJECTS + BLOCKS).for_each(|name| self.model.purged(name));
            }
            // It may be purged with the next open, or may not.
            Err(_) if self.is_excused() => {
                (OBJECTS..OBJECTS + BLOCKS).for_each(|name| self.model.accepted(name, self.operation, Fact::Absent));
                return Ok(());
            }
            ended => return Err((SimFailureKind::Refused, format!("nothing is purged: {ended:?}"))),
        }
        self.catch_up()?;
        self.register(0).map(drop)
    }
}
