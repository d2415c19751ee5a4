//! Each protection of the store is switched off once, and the suite notices. `docs/reliability.md` lists these tests.

use super::super::{SimFailure, SimOptions, Simulator};
use super::scenarios::{self, Scenario};
use crate::nvme::{Sabotage, SimBias};

/// Histories until a missing protection must have been noticed.
const SEEDS_MAX: u64 = 6000;

/// What notices.
enum By {
    Histories,
    /// Histories with more of something.
    Biased(SimBias),
    /// The same from a seed on that is known to meet it: from the first one on it takes too many.
    BiasedFrom(SimBias, u64),
    /// The same, and no failed open excuses anything.
    StrictFrom(SimBias, u64),
    Flips,
    Scenario(Scenario),
    /// Histories on encrypted stores.
    EncryptedHistories,
    /// A case on an encrypted store.
    EncryptedScenario(Scenario),
}

fn first_failure(sabotage: Option<Sabotage>, by: &By) -> Option<SimFailure> {
    let directory = super::directory();
    let bias = match by {
        By::Biased(bias) | By::BiasedFrom(bias, _) | By::StrictFrom(bias, _) => *bias,
        _ => SimBias::None,
    };
    let excuses_failed_opens = !matches!(by, By::StrictFrom(..));
    let is_encrypted = matches!(by, By::EncryptedHistories | By::EncryptedScenario(_));
    let options =
        SimOptions { sabotage, bias, is_encrypted, excuses_failed_opens, ..SimOptions::new(directory.path()) };
    let simulator = Simulator::new(options).expect("memory");
    let from = |first: u64| (first..first + SEEDS_MAX).find_map(|seed| simulator.run(seed).err());
    match by {
        By::Histories | By::Biased(_) | By::EncryptedHistories => from(0),
        By::BiasedFrom(_, first) | By::StrictFrom(_, first) => from(*first),
        By::Flips => simulator.flips(8, 50).err(),
        By::Scenario(scenario) | By::EncryptedScenario(scenario) => scenarios::run(&simulator, *scenario).err(),
    }
}

fn assert_noticed(sabotage: Sabotage, by: &By) {
    let failure = first_failure(Some(sabotage), by);
    println!("{sabotage:?}: {failure:?}");
    assert!(failure.is_some(), "nobody noticed that {sabotage:?}");
}

macro_rules! noticed {
    ($($test:ident: $sabotage:ident by $by:expr;)*) => {
        $(
            #[test]
            fn $test() {
                assert_noticed(Sabotage::$sabotage, &$by);
            }
        )*

        #[test]
        fn every_switch_has_its_test() {
            let mut tested = vec![$(Sabotage::$sabotage),*];
            for sabotage in Sabotage::ALL {
                let place = tested.iter().position(|tested| tested == sabotage);
                tested.swap_remove(place.unwrap_or_else(|| panic!("{sabotage:?} has no test")));
            }
            assert!(tested.is_empty(), "{tested:?} are tested twice");
        }
    };
}

noticed! {
    skip_header_checksum: SkipHeaderChecksum by By::Flips;
    skip_payload_checksum: SkipPayloadChecksum by By::Flips;
    skip_identity_check: SkipIdentityCheck by By::Scenario(scenarios::swapped_entries);
    skip_place_check: SkipPlaceCheck by By::Scenario(scenarios::misdirected_version);
    skip_header_code: SkipHeaderCode by By::EncryptedScenario(scenarios::forged_header);
    skip_key_sync: SkipKeySync by By::EncryptedHistories;
    skip_region_header_checksum: SkipRegionHeaderChecksum by By::Flips;
    skip_superblock_checksum: SkipSuperblockChecksum by By::Flips;
    skip_namespace_checksum: SkipNamespaceChecksum by By::Flips;
    commit_before_sync: CommitBeforeSync by By::Histories;
    retry_failed_sync: RetryFailedSync by By::Biased(SimBias::Faults);
    believe_sync_beside_failed: BelieveSyncBesideFailed by By::StrictFrom(SimBias::Faults, 3083);
    commit_past_holes: CommitPastHoles by By::Histories;
    reuse_sequences: ReuseSequences by By::Histories;
    reuse_generations: ReuseGenerations by By::Histories;
    skip_superblock_sync: SkipSuperblockSync by By::Histories;
    skip_region_header: SkipRegionHeader by By::Histories;
    skip_free_header_sync: SkipFreeHeaderSync by By::Histories;
    skip_fence: SkipFence by By::Histories;
    ignore_sequence_rule: IgnoreSequenceRule by By::Histories;
    drop_tombstones: DropTombstones by By::Histories;
    forget_replaced: ForgetReplaced by By::Histories;
    forget_hiding_regions: ForgetHidingRegions by By::Histories;
    reclaim_unsettled: ReclaimUnsettled by By::Histories;
    ignore_pins: IgnorePins by By::Histories;
    quarantine_without_tombstone: QuarantineWithoutTombstone by By::Scenario(scenarios::quarantined_object);
    believe_foreign_index: BelieveForeignIndex by By::Scenario(scenarios::foreign_index);
    skip_first_sync: SkipFirstSync by By::BiasedFrom(SimBias::Kills, 738);
    cover_failed_writes: CoverFailedWrites by By::Biased(SimBias::Faults);
    skip_reading_on: SkipReadingOn by By::Histories;
    trust_torn_tail: TrustTornTail by By::Histories;
    stop_rebuild_at_damage: StopRebuildAtDamage by By::Scenario(scenarios::damage_before_a_removal);
    keep_unreadable_region: KeepUnreadableRegion by By::Scenario(scenarios::unreadable_region);
    skip_namespace_sync: SkipNamespaceSync by By::Histories;
    believe_purged: BelievePurged by By::Biased(SimBias::Purges);
    ignore_failed_write: IgnoreFailedWrite by By::Biased(SimBias::Faults);
    trust_unsynced_superblock: TrustUnsyncedSuperblock by By::Scenario(scenarios::superblock_that_was_not_synced);
    write_below_floor: WriteBelowFloor by By::BiasedFrom(SimBias::Drives, 20_125);
    believe_old_index: BelieveOldIndex by By::Scenario(scenarios::index_that_a_power_loss_undid);
    forget_floor: ForgetFloor by By::Scenario(scenarios::older_index_after_a_drive_went);
    forget_what_is_reclaimed: ForgetWhatIsReclaimed by By::Scenario(scenarios::replaced_while_reclaimed);
    skip_index_sync: SkipIndexSync by By::Scenario(scenarios::removed_on_a_drive_that_goes);
}
