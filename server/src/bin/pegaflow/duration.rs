//! Times on the command line.

use std::time::Duration;

/// A time as people write it: a whole number and its unit.
pub(crate) fn parse(text: &str) -> Result<Duration, String> {
    let wrong = || format!("'{text}' is no time; write a number and s, min, h or d: 90s, 30min, 12h, 7d");
    let (number, unit) = text.split_at(text.find(|c: char| !c.is_ascii_digit()).ok_or_else(wrong)?);
    let seconds = match unit {
        "s" => 1,
        "min" => 60,
        "h" => 3600,
        "d" => 86_400,
        _ => return Err(wrong()),
    };
    let time = number.parse::<u32>().map_err(|_| wrong())?;
    if time == 0 {
        return Err(format!("'{text}' is no time at all; give 1s or more"));
    }
    Ok(Duration::from_secs(u64::from(time) * seconds))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_has_a_number_and_a_unit() {
        for (text, seconds) in [("90s", 90), ("30min", 1800), ("12h", 43_200), ("7d", 604_800)] {
            assert_eq!(parse(text), Ok(Duration::from_secs(seconds)), "{text}");
        }
        for bad in ["", "7", "h", "7m", "1.5h", "-1h", "7 d", "0s", "99999999999s"] {
            assert!(parse(bad).is_err_and(|why| why.contains(bad)), "{bad}");
        }
    }
}
