//! The SMART / Health Information log page (log identifier 02h) of the NVM Express base specification: 512 bytes,
//! little-endian.

use crate::error::{Error, ErrorKind, Result};

/// Bytes of the page.
pub(super) const PAGE_BYTES: usize = 512;
/// Bytes of one of the specification's "data units": a thousand times 512.
const DATA_UNIT_BYTES: u128 = 512_000;
/// Percentages used from which on the log says so.
const USED_PERCENT_STEPS: [u8; 3] = [100, 90, 80];
/// The bits of the critical warning, from bit 0 on.
const WARNINGS: [&str; 6] = [
    "its spare capacity is below its threshold",
    "its temperature is outside its limits",
    "its reliability is degraded by media or internal errors",
    "its media is read-only",
    "the backup of its volatile memory has failed",
    "its persistent memory region is read-only or unreliable",
];

/// What a drive says of its own health.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DriveHealth {
    /// Bits of what is wrong; 0: nothing. As in the specification: bit 0 spare, 1 temperature, 2 reliability, 3 read-only,
    /// 4 backup of volatile memory, 5 persistent memory region.
    pub critical_warning: u8,
    /// Temperature in kelvin; 0 if not told.
    pub temperature_kelvin: u16,
    /// Spare capacity that is left, in percent.
    pub spare_percent: u8,
    /// Below this the drive warns.
    pub spare_threshold_percent: u8,
    /// How much of the rated life is used, in percent. Goes on above 100, to 255.
    pub used_percent: u8,
    /// Bytes that hosts have read, in steps of 512,000.
    pub read_bytes: u64,
    /// Bytes that hosts have written, in steps of 512,000. The flash takes more than that.
    pub written_bytes: u64,
    /// Hours of operation.
    pub power_on_hours: u64,
    /// How often power went without notice.
    pub unsafe_shutdowns: u64,
    /// Times that the drive found data that it could not correct.
    pub media_errors: u64,
}

impl DriveHealth {
    /// Reads a page.
    ///
    /// # Errors
    /// `Corrupt` for bytes that can not be such a page: another length, nothing but one value, percentages above 100.
    pub fn from_log_page(page: &[u8]) -> Result<Self> {
        let corrupt = |what: String| Error::new(ErrorKind::Corrupt, format!("a drive's health page {what}"));
        let found = page.len();
        let page: &[u8; PAGE_BYTES] =
            page.try_into().map_err(|_| corrupt(format!("has {found} bytes, expected {PAGE_BYTES}")))?;
        if page.iter().all(|byte| *byte == page[0]) {
            return Err(corrupt(format!("holds nothing but {:#04x}", page[0])));
        }
        let number = |at: usize| -> u128 {
            page.get(at..at + 16).and_then(|bytes| bytes.try_into().ok()).map_or(0, u128::from_le_bytes)
        };
        let count = |at: usize| u64::try_from(number(at)).unwrap_or(u64::MAX);
        let bytes = |at: usize| u64::try_from(number(at).saturating_mul(DATA_UNIT_BYTES)).unwrap_or(u64::MAX);
        let health = Self {
            critical_warning: page[0],
            temperature_kelvin: u16::from_le_bytes([page[1], page[2]]),
            spare_percent: page[3],
            spare_threshold_percent: page[4],
            used_percent: page[5],
            read_bytes: bytes(32),
            written_bytes: bytes(48),
            power_on_hours: count(128),
            unsafe_shutdowns: count(144),
            media_errors: count(160),
        };
        if health.spare_percent > 100 || health.spare_threshold_percent > 100 {
            let (left, threshold) = (health.spare_percent, health.spare_threshold_percent);
            return Err(corrupt(format!("says {left} % of spare with a threshold of {threshold} %")));
        }
        Ok(health)
    }

    /// What an operator should know, one sentence each; empty for a drive that is well.
    pub fn complaints(&self) -> Vec<String> {
        let mut complaints: Vec<String> = (0u8..)
            .zip(WARNINGS)
            .filter(|(bit, _)| self.critical_warning & (1 << bit) != 0)
            .map(|(_, warning)| warning.to_owned())
            .collect();
        if self.spare_percent < self.spare_threshold_percent && self.critical_warning & 1 == 0 {
            complaints.push(WARNINGS[0].to_owned());
        }
        // Told at each step once, not at each percent.
        if let Some(step) = USED_PERCENT_STEPS.iter().find(|step| self.used_percent >= **step) {
            complaints.push(format!("{step} % of its rated life or more is used"));
        }
        complaints
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A page as a drive in the middle of its life gives it.
    fn page() -> [u8; PAGE_BYTES] {
        let mut page = [0; PAGE_BYTES];
        page[1..6].copy_from_slice(&[0x38, 0x01, 97, 10, 41]);
        for (at, value) in [
            (32, 1_000_000u128),
            (48, 20_000_000),
            (64, 11),
            (80, 22),
            (96, 33),
            (112, 44),
            (128, 8_760),
            (144, 55),
            (160, 3),
            (176, 66),
        ] {
            page[at..at + 16].copy_from_slice(&value.to_le_bytes());
        }
        page
    }

    #[test]
    fn a_page_is_read_field_by_field() {
        let health = DriveHealth::from_log_page(&page()).expect("a page");
        let expected = DriveHealth {
            critical_warning: 0,
            temperature_kelvin: 312,
            spare_percent: 97,
            spare_threshold_percent: 10,
            used_percent: 41,
            read_bytes: 512_000_000_000,
            written_bytes: 10_240_000_000_000,
            power_on_hours: 8_760,
            unsafe_shutdowns: 55,
            media_errors: 3,
        };
        assert_eq!((health, health.complaints()), (expected, Vec::new()));
    }

    #[test]
    fn a_worn_drive_complains_of_everything() {
        let mut worn = page();
        (worn[0], worn[3], worn[5]) = (0b11_1111, 4, 255);
        worn[48..64].fill(0xff);
        let health = DriveHealth::from_log_page(&worn).expect("a page");
        assert_eq!((health.written_bytes, health.complaints().len()), (u64::MAX, 7));
        // Without the bit for it, the numbers count.
        worn[0] = 0b1000;
        let complaints = DriveHealth::from_log_page(&worn).expect("a page").complaints();
        assert_eq!(complaints.len(), 3, "{complaints:?}");
        for (used, says) in [(79, 0), (80, 1), (89, 1), (90, 1), (100, 1), (131, 1)] {
            let mut page = page();
            page[5] = used;
            let complaints = DriveHealth::from_log_page(&page).expect("a page").complaints();
            assert_eq!(complaints.len(), says, "{used} %: {complaints:?}");
        }
    }

    #[test]
    fn what_is_no_page_is_refused() {
        let mut odd = page();
        odd[3] = 101;
        for bad in [&[][..], &page()[..511], &[page().as_slice(), &[0]].concat(), &[0; 512], &[0xff; 512], &odd] {
            assert_eq!(DriveHealth::from_log_page(bad).map_err(|error| error.kind()), Err(ErrorKind::Corrupt));
        }
    }
}
