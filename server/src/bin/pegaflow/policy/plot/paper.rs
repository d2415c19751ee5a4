//! What can be drawn on: text that browsers draw, or pixels.

use std::fmt::Write;

use embedded_graphics::Drawable;
use embedded_graphics::geometry::{OriginDimensions, Point, Size};
use embedded_graphics::mono_font::MonoTextStyle;
use embedded_graphics::mono_font::ascii::FONT_8X13;
use embedded_graphics::pixelcolor::{Rgb888, RgbColor};
use embedded_graphics::prelude::{DrawTarget, Pixel, Primitive};
use embedded_graphics::primitives::{Polyline, PrimitiveStyle};
use embedded_graphics::text::Text;
use pegaflow_engine::{Error, ErrorKind, Result};

/// Somewhere to draw on. Places are pixels from the upper left corner, colours 0xRRGGBB.
pub(super) trait Paper {
    /// A line through all points.
    fn line(&mut self, points: &[(i32, i32)], colour: u32, thickness: u32);
    /// Text that begins at a point, on its base line.
    fn text(&mut self, at: (i32, i32), text: &str, colour: u32);
}

pub(super) struct Svg(String);

impl Svg {
    pub(super) fn new(width: i32, height: i32) -> Self {
        Self(format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" width=\"{width}\" height=\"{height}\" \
             font-family=\"monospace\" font-size=\"13\">\n<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n"
        ))
    }

    pub(super) fn finish(mut self) -> Vec<u8> {
        self.0.push_str("</svg>\n");
        self.0.into_bytes()
    }
}

impl Paper for Svg {
    fn line(&mut self, points: &[(i32, i32)], colour: u32, thickness: u32) {
        let points: Vec<String> = points.iter().map(|(x, y)| format!("{x},{y}")).collect();
        let _ = writeln!(
            self.0,
            "<polyline points=\"{}\" fill=\"none\" stroke=\"#{colour:06x}\" stroke-width=\"{thickness}\"/>",
            points.join(" ")
        );
    }

    fn text(&mut self, (x, y): (i32, i32), text: &str, colour: u32) {
        let text = text.replace('&', "&amp;").replace('<', "&lt;");
        let _ = writeln!(self.0, "<text x=\"{x}\" y=\"{y}\" fill=\"#{colour:06x}\">{text}</text>");
    }
}

pub(super) struct Pixels {
    width: i32,
    height: i32,
    bytes: Vec<u8>,
}

impl Pixels {
    pub(super) fn new(width: i32, height: i32) -> Self {
        Self { width, height, bytes: vec![0xff; (width * height * 3) as usize] }
    }

    /// The picture as PNG.
    pub(super) fn finish(self) -> Result<Vec<u8>> {
        let mut file = Vec::new();
        let mut encoder = png::Encoder::new(&mut file, self.width as u32, self.height as u32);
        encoder.set_color(png::ColorType::Rgb);
        encoder.set_compression(png::Compression::High);
        let written = encoder.write_header().and_then(|mut writer| writer.write_image_data(&self.bytes));
        written
            .map_err(|error| Error::new(ErrorKind::InvalidInput, format!("the picture cannot be encoded: {error}")))?;
        Ok(file)
    }
}

impl OriginDimensions for Pixels {
    fn size(&self) -> Size {
        Size::new(self.width as u32, self.height as u32)
    }
}

impl DrawTarget for Pixels {
    type Color = Rgb888;
    type Error = std::convert::Infallible;

    fn draw_iter<I: IntoIterator<Item = Pixel<Rgb888>>>(&mut self, pixels: I) -> std::result::Result<(), Self::Error> {
        for Pixel(Point { x, y }, colour) in pixels {
            if (0..self.width).contains(&x) && (0..self.height).contains(&y) {
                let at = (y * self.width + x) as usize * 3;
                if let Some(place) = self.bytes.get_mut(at..at + 3) {
                    place.copy_from_slice(&[colour.r(), colour.g(), colour.b()]);
                }
            }
        }
        Ok(())
    }
}

fn rgb(colour: u32) -> Rgb888 {
    let [_, red, green, blue] = colour.to_be_bytes();
    Rgb888::new(red, green, blue)
}

impl Paper for Pixels {
    fn line(&mut self, points: &[(i32, i32)], colour: u32, thickness: u32) {
        let points: Vec<Point> = points.iter().map(|(x, y)| Point::new(*x, *y)).collect();
        let style = PrimitiveStyle::with_stroke(rgb(colour), thickness);
        let Ok(()) = Polyline::new(&points).into_styled(style).draw(self);
    }

    fn text(&mut self, (x, y): (i32, i32), text: &str, colour: u32) {
        let Ok(_) = Text::new(text, Point::new(x, y), MonoTextStyle::new(&FONT_8X13, rgb(colour))).draw(self);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_papers_take_the_same_lines() {
        let mut svg = Svg::new(100, 50);
        let mut pixels = Pixels::new(100, 50);
        for paper in [&mut svg as &mut dyn Paper, &mut pixels] {
            paper.line(&[(10, 10), (90, 40)], 0xd5_5e_00, 2);
            paper.text((5, 20), "a < b", 0);
        }
        let text = String::from_utf8(svg.finish()).expect("text");
        assert!(text.contains("10,10 90,40") && text.contains("a &lt; b") && text.ends_with("</svg>\n"), "{text}");
        let file = pixels.finish().expect("a picture");
        let mut reader = png::Decoder::new(std::io::Cursor::new(file)).read_info().expect("png");
        let mut bytes = vec![0; reader.output_buffer_size().expect("small")];
        reader.next_frame(&mut bytes).expect("one frame");
        assert!(bytes.chunks(3).any(|pixel| pixel == [0xd5, 0x5e, 0x00]));
    }
}
