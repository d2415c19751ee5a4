//! Draws hit ratio against size, once as SVG and once as pixels: the same lines on two kinds of paper.

mod paper;

use std::fs;
use std::path::{Path, PathBuf};

use pegaflow_engine::{Error, ErrorKind, Result};

use super::run::{Done, Who};
use paper::{Paper, Pixels, Svg};

const WIDTH: i32 = 960;
const HEIGHT: i32 = 600;
/// Left, top, right, bottom.
const MARGINS: [i32; 4] = [70, 50, 150, 60];
const GREY: u32 = 0xd0_d0_d0;
const BLACK: u32 = 0x20_20_20;

/// Whether there is a folder to draw to.
pub(super) fn check(path: &Path) -> Result<()> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    if folder.is_dir() && path.file_name().is_some() {
        return Ok(());
    }
    let message = format!("cannot draw to {}: {} is no folder", path.display(), folder.display());
    Err(Error::new(ErrorKind::InvalidInput, message))
}

/// Writes both files, and says which.
pub(super) fn write(path: &Path, title: &str, results: &[Done]) -> Result<Vec<PathBuf>> {
    let mut svg = Svg::new(WIDTH, HEIGHT);
    draw(&mut svg, title, results);
    let mut pixels = Pixels::new(WIDTH, HEIGHT);
    draw(&mut pixels, title, results);
    let files = [("svg", svg.finish()), ("png", pixels.finish()?)];
    let mut written = Vec::new();
    for (extension, bytes) in files {
        let mut name = path.as_os_str().to_owned();
        name.push(".");
        name.push(extension);
        let file = PathBuf::from(name);
        fs::write(&file, bytes).map_err(|error| Error::from_io(format!("cannot write {}", file.display()), error))?;
        written.push(file);
    }
    Ok(written)
}

/// From sizes and ratios to places on paper.
struct Axes {
    least: f64,
    most: f64,
    top: f64,
}

impl Axes {
    fn new(results: &[Done]) -> Self {
        let sizes = || results.iter().map(|done| done.size.1 as f64);
        let (least, most) = (sizes().fold(f64::INFINITY, f64::min), sizes().fold(1.0, f64::max));
        let highest = results.iter().map(Done::hit).fold(0.05, f64::max);
        Self { least: least.max(1.0), most: most.max(least * 1.1), top: (highest * 20.0).ceil() / 20.0 }
    }

    /// Sizes are drawn by their logarithm.
    fn x(&self, size: f64) -> i32 {
        let [left, _, right, _] = MARGINS;
        let share = (size / self.least).ln() / (self.most / self.least).ln();
        left + (share * f64::from(WIDTH - left - right)) as i32
    }

    fn y(&self, ratio: f64) -> i32 {
        let [_, top, _, bottom] = MARGINS;
        top + ((1.0 - ratio / self.top) * f64::from(HEIGHT - top - bottom)) as i32
    }
}

fn draw(paper: &mut dyn Paper, title: &str, results: &[Done]) {
    let axes = Axes::new(results);
    let (left, right) = (axes.x(axes.least), axes.x(axes.most));
    let steps = (axes.top * 20.0).round() as i32;
    for step in (0..=steps).filter(|step| steps <= 10 || step % 2 == 0) {
        let ratio = f64::from(step) / 20.0;
        paper.line(&[(left, axes.y(ratio)), (right, axes.y(ratio))], GREY, 1);
        paper.text((left - 45, axes.y(ratio) + 4), &format!("{ratio:.2}"), BLACK);
    }
    let mut sizes: Vec<&(String, u64)> = results.iter().map(|done| &done.size).collect();
    sizes.sort_by_key(|size| size.1);
    sizes.dedup_by_key(|size| size.1);
    for (text, size) in sizes {
        let x = axes.x(*size as f64);
        paper.line(&[(x, axes.y(0.0)), (x, axes.y(axes.top))], GREY, 1);
        paper.text((x - 4 * text.len() as i32, axes.y(0.0) + 20), text, BLACK);
    }
    let name = Path::new(title).file_name().map_or_else(|| title.into(), |name| name.to_string_lossy());
    paper.text((left, 30), &format!("{name}: share of block references served, by size of the tier"), BLACK);
    let is_number = |done: &Done| done.size.0.parse::<u64>().is_ok();
    let unit = if results.iter().all(is_number) { "size of the tier, in blocks" } else { "size of the tier" };
    paper.text(((left + right) / 2 - 4 * unit.len() as i32, HEIGHT - 15), unit, BLACK);
    let mut lines: Vec<Who> = Vec::new();
    for done in results.iter().filter(|done| !matches!(done.who, Who::Hurdle(_))) {
        if !lines.contains(&done.who) {
            lines.push(done.who);
        }
    }
    for (number, who) in lines.into_iter().enumerate() {
        let mut points: Vec<(i32, i32)> = results
            .iter()
            .filter(|done| done.who == who)
            .map(|done| (axes.x(done.size.1 as f64), axes.y(done.hit())))
            .collect();
        points.sort_unstable();
        if let [(x, y)] = points[..] {
            points = vec![(x, y), (x + 12, y)];
        }
        let (colour, thickness) = look(who);
        paper.line(&points, colour, thickness);
        let y = 70 + 24 * number as i32;
        paper.line(&[(right + 15, y), (right + 45, y)], colour, thickness);
        paper.text((right + 52, y + 4), &who.to_string(), BLACK);
    }
}

/// Colours that most can tell apart (Okabe and Ito).
fn look(who: Who) -> (u32, u32) {
    match who.to_string().as_str() {
        "lru" => (0x00_72_b2, 2),
        "fifo" => (0x56_b4_e9, 2),
        "s3fifo" => (0x00_9e_73, 2),
        "arc" => (0xe6_9f_00, 2),
        "pegaflow" => (0xd5_5e_00, 4),
        _ => (0x60_60_60, 2),
    }
}
