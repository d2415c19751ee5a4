//! Test-only switches that turn one protection of the store off each, so that a test can show that the suite notices.
//! They belong to the thread that sets them and to the threads of the stores that it opens; without the feature
//! `fault-injection` nothing of them is compiled in. `docs/reliability.md` lists them with the tests.

#[cfg(any(test, feature = "fault-injection"))]
pub use on::Sabotage;
#[cfg(any(test, feature = "fault-injection"))]
pub(super) use on::{inherited, is_off, is_sabotaged, is_simulated, simulated, with_sabotage};

/// Whether a protection is switched off.
#[cfg(not(any(test, feature = "fault-injection")))]
macro_rules! is_off {
    ($switch:ident) => {
        false
    };
}
#[cfg(not(any(test, feature = "fault-injection")))]
pub(super) use is_off;

/// The work of a thread of the store.
#[cfg(not(any(test, feature = "fault-injection")))]
pub(super) fn inherited<T>(work: impl FnOnce() -> T) -> impl FnOnce() -> T {
    work
}

/// Whether the store runs step by step, without a clock.
#[cfg(not(any(test, feature = "fault-injection")))]
pub(super) fn is_simulated() -> bool {
    false
}

#[cfg(any(test, feature = "fault-injection"))]
mod on {
    use std::cell::Cell;

    thread_local! {
        static STATE: Cell<State> = const { Cell::new(State { sabotage: None, is_simulated: false }) };
    }

    #[derive(Clone, Copy)]
    struct State {
        sabotage: Option<Sabotage>,
        is_simulated: bool,
    }

    macro_rules! switches {
        ($($(#[$meta:meta])* $name:ident,)*) => {
            /// A protection that a test switches off, named after what the store then does.
            #[derive(Debug, Clone, Copy, PartialEq, Eq)]
            #[non_exhaustive]
            pub enum Sabotage {
                $($(#[$meta])* $name,)*
            }

            impl Sabotage {
                /// All of them.
                pub const ALL: &[Self] = &[$(Self::$name,)*];
            }
        };
    }

    switches! {
        /// The checksum of a record's header is not looked at.
        SkipHeaderChecksum,
        /// The checksum of a payload is not looked at.
        SkipPayloadChecksum,
        /// A record is taken for whatever was asked for.
        SkipIdentityCheck,
        /// A record counts wherever it lies and of whichever life of its region it is.
        SkipPlaceCheck,
        /// The checksum of a region's header is not looked at.
        SkipRegionHeaderChecksum,
        /// The checksum of a superblock is not looked at.
        SkipSuperblockChecksum,
        /// The checksum of a namespace's entry is not looked at.
        SkipNamespaceChecksum,
        /// Records are reported, and the index is told, before the sync of their data.
        CommitBeforeSync,
        /// After a failed sync the store syncs again and believes it.
        RetryFailedSync,
        /// Records behind one that is not written yet are committed.
        CommitPastHoles,
        /// A sequence is taken again after a crash.
        ReuseSequences,
        /// A generation is taken again after a crash.
        ReuseGenerations,
        /// A superblock is not synced before the numbers that it reserves are used.
        SkipSuperblockSync,
        /// Records are committed before the header of their region is written.
        SkipRegionHeader,
        /// A region counts as free before the header that says so is durable.
        SkipFreeHeaderSync,
        /// No fence is written where a log ended.
        SkipFence,
        /// A scan takes records whatever their sequence is.
        IgnoreSequenceRule,
        /// Tombstones go with their region.
        DropTombstones,
        /// Objects are not marked as replacing an older version.
        ForgetReplaced,
        /// The index is not told which regions hold what hides older records.
        ForgetHidingRegions,
        /// A region is given up while records of it are not durable.
        ReclaimUnsettled,
        /// A region is given up while readers hold it.
        IgnorePins,
        /// A bad object is forgotten without a tombstone.
        QuarantineWithoutTombstone,
        /// An index is believed whichever store it is of.
        BelieveForeignIndex,
        /// What a killed process has written is read, and told to the index, without a sync.
        SkipFirstSync,
        /// A region that was sealed by a failed write counts as covered to its end.
        CoverFailedWrites,
        /// A sync is believed though another one failed while it was in flight.
        BelieveSyncBesideFailed,
        /// Regions are not read on from where the index ends.
        SkipReadingOn,
        /// A torn payload behind the index's end is taken for whole.
        TrustTornTail,
        /// A rebuild of the index ends at the first damage.
        StopRebuildAtDamage,
        /// A region whose header could not be read is left as it is.
        KeepUnreadableRegion,
        /// A namespace is given out before its entry is durable.
        SkipNamespaceSync,
        /// Records of a namespace that was purged count for the one that has its identity now.
        BelievePurged,
        /// A failed write is reported as done.
        IgnoreFailedWrite,
        /// An object is not marked as replacing a version whose region is being given up.
        ForgetWhatIsReclaimed,
        /// A copy of the index from an earlier open is believed.
        BelieveOldIndex,
        /// An older copy of the index is believed though what it lacks is nowhere else any more.
        ForgetFloor,
        /// With several drives, a superblock that an open has read is taken for durable.
        TrustUnsyncedSuperblock,
        /// After a crash a region below the rebuild floor is written on.
        WriteBelowFloor,
        /// A data key is used before its entry is durable.
        SkipKeySync,
        /// The code that authenticates a record's header is not looked at.
        SkipHeaderCode,
        /// With several drives, the index does not make removals and replacements durable before they are reported.
        SkipIndexSync,
    }

    /// Runs `work` with a protection switched off.
    pub(in crate::nvme) fn with_sabotage<T>(sabotage: Option<Sabotage>, work: impl FnOnce() -> T) -> T {
        with(|state| state.sabotage = sabotage, work)
    }

    /// Runs `work`; stores that it opens run step by step, without a clock.
    pub(in crate::nvme) fn simulated<T>(work: impl FnOnce() -> T) -> T {
        with(|state| state.is_simulated = true, work)
    }

    fn with<T>(change: impl FnOnce(&mut State), work: impl FnOnce() -> T) -> T {
        /// Also when `work` panics.
        struct Restore(State);
        impl Drop for Restore {
            fn drop(&mut self) {
                STATE.set(self.0);
            }
        }
        let mut state = STATE.get();
        let _restore = Restore(state);
        change(&mut state);
        STATE.set(state);
        work()
    }

    pub(in crate::nvme) fn inherited<T>(work: impl FnOnce() -> T) -> impl FnOnce() -> T {
        let state = STATE.get();
        move || {
            STATE.set(state);
            work()
        }
    }

    pub(in crate::nvme) fn is_simulated() -> bool {
        STATE.get().is_simulated
    }

    pub(in crate::nvme) fn is_sabotaged(sabotage: Sabotage) -> bool {
        STATE.get().sabotage == Some(sabotage)
    }

    macro_rules! is_off {
        ($switch:ident) => {
            $crate::nvme::switches::is_sabotaged($crate::nvme::switches::Sabotage::$switch)
        };
    }
    pub(in crate::nvme) use is_off;
}
