//! A frame as text: a screen of lines that fit its width, or one line.

use super::frame::{DriveOf, Frame, TimesOf};

/// Columns and rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Size {
    pub(super) columns: usize,
    pub(super) rows: usize,
}

/// What the terminal can show.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Style {
    pub(super) has_color: bool,
    pub(super) has_unicode: bool,
}

/// Escape sequences of colours.
const BOLD: &str = "1";
const SOFT: &str = "2";
const RED: &str = "31";
const GREEN: &str = "32";
const YELLOW: &str = "33";
const BLUE: &str = "34";
const CYAN: &str = "36";

const UNITS: [&str; 6] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];

pub(super) fn bytes(value: f64) -> String {
    let (mut value, mut power) = (value, 0);
    while value >= 1000.0 && power + 1 < UNITS.len() {
        (value, power) = (value / 1024.0, power + 1);
    }
    let unit = UNITS.get(power).copied().unwrap_or_default();
    if power == 0 || value >= 100.0 { format!("{value:.0} {unit}") } else { format!("{value:.1} {unit}") }
}

fn percent(share: Option<f64>) -> String {
    share.map_or_else(|| "-".to_owned(), |share| format!("{:.0} %", share * 100.0))
}

fn took(us: Option<f64>) -> String {
    match us {
        None => "-".into(),
        Some(us) if us.is_infinite() => "> 33 s".into(),
        Some(us) if us < 1e3 => format!("{us:.0} us"),
        Some(us) if us < 1e6 => format!("{:.1} ms", us / 1e3),
        Some(us) => format!("{:.1} s", us / 1e6),
    }
}

fn span(ms: u64) -> String {
    let seconds = ms / 1000;
    match seconds {
        0..60 => format!("{seconds} s"),
        60..3600 => format!("{} min", seconds / 60),
        3600..86_400 => format!("{} h {} min", seconds / 3600, seconds % 3600 / 60),
        _ => format!("{} d {} h", seconds / 86_400, seconds % 86_400 / 3600),
    }
}

fn share(part: u64, whole: u64) -> f64 {
    if whole > 0 { (part as f64 / whole as f64).clamp(0.0, 1.0) } else { 0.0 }
}

/// A line that knows how wide it is on the screen, whatever its colours.
struct Line {
    text: String,
    left: usize,
    style: Style,
}

impl Line {
    fn new(size: Size, style: Style) -> Self {
        Self { text: String::new(), left: size.columns, style }
    }

    /// Adds as much of a text as fits.
    fn put(mut self, color: &str, text: &str) -> Self {
        let fits: String = text.chars().take(self.left).collect();
        self.left -= fits.chars().count();
        match self.style.has_color && !color.is_empty() && !fits.is_empty() {
            true => self.text.push_str(&format!("\x1b[{color}m{fits}\x1b[0m")),
            false => self.text.push_str(&fits),
        }
        self
    }

    fn plain(self, text: &str) -> Self {
        self.put("", text)
    }

    /// A bar of parts of a whole.
    fn bar(self, width: usize, parts: &[(f64, &str)]) -> Self {
        let (full, empty) = if self.style.has_unicode { ("█", "░") } else { ("#", ".") };
        let (mut line, mut used) = (self, 0);
        for (part, color) in parts {
            let cells = ((part * width as f64).round() as usize).min(width - used);
            used += cells;
            line = line.put(color, &full.repeat(cells));
        }
        line.put(SOFT, &empty.repeat(width - used))
    }
}

/// The screen. Never more lines than it has rows, never a line that is wider.
pub(super) fn lines(frame: &Frame, trouble: Option<&str>, size: Size, style: Style) -> Vec<String> {
    let line = || Line::new(size, style);
    let width = (size.columns / 3).clamp(8, 30);
    let (state, color) = match (&frame.degraded, trouble) {
        (_, Some(_)) => ("no answer", RED),
        (Some(_), _) => ("degraded", RED),
        _ => ("ready", GREEN),
    };
    let mut lines =
        vec![line().put(BOLD, &format!("PegaFlow {}", frame.server_version)).plain("  ").put(color, state).put(
            SOFT,
            &format!(
                "  up {}, {} engines, {} clients, {} in flight, load policy {}",
                span(frame.uptime_ms),
                frame.instances,
                frame.sessions,
                frame.operations,
                frame.load_policy
            ),
        )];
    if let Some(why) = trouble {
        lines.push(line().put(RED, why));
    }
    if let Some(reason) = &frame.degraded {
        lines.push(line().put(RED, &format!("blocks live in DRAM only: {reason}")));
    }
    lines.push(line());
    let dram = frame.hit_ratio_dram.unwrap_or(0.0);
    let drive = (frame.hit_ratio.unwrap_or(0.0) - dram).max(0.0);
    lines.push(
        line()
            .plain(&format!("{:<7}", "hits"))
            .bar(width, &[(dram, BLUE), (drive, CYAN)])
            .put(BOLD, &format!(" {:>5}", percent(frame.hit_ratio)))
            .put(
                SOFT,
                &format!(
                    "  DRAM {:.0} %, drive {:.0} %, {:.0} blocks/s asked for",
                    dram * 100.0,
                    drive * 100.0,
                    frame.lookup_blocks_per_second
                ),
            ),
    );
    let dirty = share(frame.dram_dirty_bytes, frame.dram_capacity_bytes);
    let used = share(frame.dram_used_bytes, frame.dram_capacity_bytes);
    let room = |name: &str, parts: &[(f64, &str)], used: u64, capacity: u64, more: &str| {
        let share = percent(Some(share(used, capacity)));
        let of = format!("  {} of {}", bytes(used as f64), bytes(capacity as f64));
        line()
            .plain(&format!("{name:<7}"))
            .bar(width, parts)
            .put(BOLD, &format!(" {share:>5}"))
            .plain(&of)
            .put(SOFT, more)
    };
    lines.push(room(
        "DRAM",
        &[((used - dirty).max(0.0), BLUE), (dirty, YELLOW)],
        frame.dram_used_bytes,
        frame.dram_capacity_bytes,
        &format!(", {} blocks, {} not durable", frame.dram_blocks, bytes(frame.dram_dirty_bytes as f64)),
    ));
    if frame.nvme_capacity_bytes > 0 {
        lines.push(room(
            "drive",
            &[(share(frame.nvme_used_bytes, frame.nvme_capacity_bytes), CYAN)],
            frame.nvme_used_bytes,
            frame.nvme_capacity_bytes,
            &format!(", {} records, {} to write", frame.nvme_records, bytes(frame.nvme_queued_bytes as f64)),
        ));
    }
    if frame.write_budget_day_bytes > 0 {
        let spent = share(frame.written_day_bytes, frame.write_budget_day_bytes);
        lines.push(room("budget", &[(spent, YELLOW)], frame.written_day_bytes, frame.write_budget_day_bytes, " a day"));
    }
    lines.push(line());
    let moved = format!(
        "loaded {}/s from DRAM, {}/s from the drive; saved {}/s",
        bytes(frame.loaded_dram_bytes_per_second),
        bytes(frame.loaded_nvme_bytes_per_second),
        bytes(frame.saved_bytes_per_second)
    );
    lines.push(line().plain(&moved));
    lines.extend(frame.drives.iter().map(|drive| drive_line(drive, line())));
    lines.push(line());
    lines.push(line().put(SOFT, &format!("{:<22}{:>9}{:>9}{:>9}{:>10}", "", "median", "90 %", "99 %", "per s")));
    lines.extend(frame.latencies.iter().map(|times| times_line(times, line())));
    lines.push(line());
    let is_bad = frame.dropped_blocks_per_second > 0.0 || frame.load_failed_blocks + frame.quarantined_records > 0;
    let given_up = format!(
        "evicted {:.0}/s, saves dropped {:.0}/s; since the start {} loads failed, {} records quarantined",
        frame.evicted_blocks_per_second,
        frame.dropped_blocks_per_second,
        frame.load_failed_blocks,
        frame.quarantined_records
    );
    lines.push(line().put(if is_bad { YELLOW } else { SOFT }, &given_up));
    lines.push(line().put(SOFT, "q: quit"));
    lines.truncate(size.rows);
    lines.into_iter().map(|line| line.text).collect()
}

fn drive_line(drive: &DriveOf, line: Line) -> Line {
    let of = |best: u64| if best > 0 { format!(" of {}/s", bytes(best as f64)) } else { String::new() };
    let read = format!("read {}/s{}", bytes(drive.read_bytes_per_second), of(drive.read_best_bytes_per_second));
    let write = format!("write {}/s{}", bytes(drive.write_bytes_per_second), of(drive.write_best_bytes_per_second));
    line.plain(&format!("{read}, {write}, {} in flight", drive.waiting)).put(SOFT, &format!("  {}", drive.path))
}

fn times_line(times: &TimesOf, line: Line) -> Line {
    let name = match times.name {
        "load_dram" => "load from DRAM",
        "load_nvme" => "load from drive",
        "save" => "save until visible",
        "durable" => "visible until durable",
        "drive_read" => "drive read",
        "drive_write" => "drive write",
        "drive_sync" => "drive sync",
        name => name,
    };
    let (p50, p90, p99) = (took(times.p50_us), took(times.p90_us), took(times.p99_us));
    line.plain(&format!("{name:<22}{p50:>9}{p90:>9}{p99:>9}")).put(SOFT, &format!("{:>10.1}", times.per_second))
}

/// One line for files and pipes.
pub(super) fn line(frame: &Frame) -> String {
    let p99 = |name: &str| frame.latencies.iter().find(|times| times.name == name).and_then(|times| times.p99_us);
    let dram = percent(Some(share(frame.dram_used_bytes, frame.dram_capacity_bytes)));
    let drive = match frame.nvme_capacity_bytes {
        0 => "-".to_owned(),
        capacity => percent(Some(share(frame.nvme_used_bytes, capacity))),
    };
    format!(
        "{}  hits {} (DRAM {})  loaded {}/s  saved {}/s  DRAM {dram}  drive {drive}  lookup p99 {}  load p99 {}  in flight {}",
        frame.degraded.as_ref().map_or_else(|| "ready".to_owned(), |reason| format!("degraded:{reason}")),
        percent(frame.hit_ratio),
        percent(frame.hit_ratio_dram),
        bytes(frame.loaded_dram_bytes_per_second + frame.loaded_nvme_bytes_per_second),
        bytes(frame.saved_bytes_per_second),
        took(p99("lookup")),
        took(p99("load_nvme").or_else(|| p99("load_dram"))),
        frame.operations,
    )
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use serde_json::{Value, json};

    fn frame(degraded: &Value) -> Frame {
        let engine = json!({
            "dram_capacity_bytes": 4u64 << 30, "dram_used_bytes": 3u64 << 30, "dram_dirty_bytes": 1u64 << 30,
            "nvme_capacity_bytes": 1u64 << 40, "nvme_used_bytes": 1u64 << 39, "nvme_degraded": degraded,
            "drive_speeds": [{ "path": "/var/lib/pegaflow" }], "drive_uses": [{}], "write_budget_day_bytes": 100,
        });
        let stats = json!({ "engine": engine, "server_version": "1.2.3", "uptime_ms": 7_500_000 });
        Frame::new(&stats, &stats, Duration::from_secs(1))
    }

    fn plain(line: &str) -> String {
        let mut text = String::new();
        for (at, part) in line.split("\x1b[").enumerate() {
            text.push_str(if at == 0 { part } else { part.split_once('m').map_or(part, |(_, rest)| rest) });
        }
        text
    }

    #[test]
    fn no_line_is_wider_than_the_screen_and_none_is_below_it() {
        for columns in [1, 10, 40, 80, 200] {
            for rows in [1, 5, 50] {
                for (has_color, has_unicode) in [(true, true), (false, false)] {
                    let (size, style) = (Size { columns, rows }, Style { has_color, has_unicode });
                    let lines = lines(&frame(&json!("no_space")), Some("no answer: gone"), size, style);
                    assert!(lines.len() <= rows);
                    assert!(lines.iter().all(|line| plain(line).chars().count() <= columns), "{columns}: {lines:?}");
                    assert!(
                        has_color || lines.iter().all(|line| line.is_ascii() && !line.contains('\x1b')),
                        "{lines:?}"
                    );
                }
            }
        }
    }

    #[test]
    fn tiers_and_trouble_are_told() {
        let (size, style) = (Size { columns: 120, rows: 40 }, Style { has_color: false, has_unicode: false });
        let text = lines(&frame(&Value::Null), None, size, style).join("\n");
        assert!(text.contains("ready  up 2 h 5 min") && text.contains("75 %  3.0 GiB of 4.0 GiB"), "{text}");
        assert!(text.contains("50 %  512 GiB of 1.0 TiB") && text.contains("1.0 GiB not durable"), "{text}");
        let text = lines(&frame(&json!("io_error")), None, size, style).join("\n");
        assert!(text.contains("degraded") && text.contains("DRAM only: io_error"), "{text}");
        assert!(line(&frame(&json!("io_error"))).starts_with("degraded:io_error  hits -"));
    }
}
