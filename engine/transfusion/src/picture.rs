//! Pictures: decoding with limits, cropping and resizing, conversion to the model's range, PNG out.
use crate::error::{Error, Result};
use std::{
    fs::File,
    io::{Cursor, Read},
    path::Path,
};
use zune_jpeg::{
    JpegDecoder,
    zune_core::{bytestream::ZCursor, colorspace::ColorSpace, options::DecoderOptions},
};

/// An opaque picture: `height` rows of `width` pixels of red, green and blue, one byte each.
///
/// Neither side is zero and the bytes are always `3 * width * height`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Picture {
    width: usize,
    height: usize,
    rgb: Vec<u8>,
}

/// What a picture may cost, checked from its header before anything is allocated for it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Limits {
    /// Pixels of a decoded picture.
    pub pixels: u64,
    /// Bytes of a decoded picture, in the channels and bit depth of its file.
    pub bytes: u64,
    /// Bytes of the file.
    pub file: u64,
}

impl Default for Limits {
    /// 64 million pixels, 256 MiB decoded, 256 MiB of file.
    fn default() -> Self {
        Limits { pixels: 64 << 20, bytes: 256 << 20, file: 256 << 20 }
    }
}

impl Limits {
    /// Refuses a picture of `width x height` with `bytes` per pixel that is empty or over a limit.
    fn admit(&self, width: u64, height: u64, bytes: u64) -> std::result::Result<(), String> {
        let pixels = width.saturating_mul(height);
        if pixels == 0 {
            return Err(format!("the picture is empty ({width} x {height})"));
        }
        if pixels > self.pixels {
            return Err(format!(
                "{width} x {height} pixels are over the limit of {} million; scale the picture down",
                self.pixels >> 20
            ));
        }
        if pixels.saturating_mul(bytes) > self.bytes {
            return Err(format!(
                "{width} x {height} pixels of {bytes} bytes are over the limit of {} MiB; \
                 scale the picture down or store it with 8 bits per channel",
                self.bytes >> 20
            ));
        }
        Ok(())
    }
}

impl Picture {
    /// A picture from its bytes; `None` unless both sides are positive and `rgb` has three bytes per
    /// pixel.
    pub fn new(width: usize, height: usize, rgb: Vec<u8>) -> Option<Picture> {
        let bytes = width.checked_mul(height)?.checked_mul(3)?;
        (bytes > 0 && bytes == rgb.len()).then_some(Picture { width, height, rgb })
    }

    /// A picture of one colour; a side of zero becomes one.
    pub fn filled(width: usize, height: usize, colour: [u8; 3]) -> Picture {
        let (width, height) = (width.max(1), height.max(1));
        Picture { width, height, rgb: colour.repeat(width * height) }
    }

    /// Pixels in a row.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Rows.
    pub fn height(&self) -> usize {
        self.height
    }

    /// The bytes: rows from the top, pixels from the left, then red, green, blue.
    pub fn rgb(&self) -> &[u8] {
        &self.rgb
    }

    /// The pixels in raster order.
    pub fn pixels(&self) -> &[[u8; 3]] {
        self.rgb.as_chunks().0
    }

    /// The pixels in raster order, to be changed.
    pub fn pixels_mut(&mut self) -> &mut [[u8; 3]] {
        self.rgb.as_chunks_mut().0
    }

    /// Reads and decodes a file.
    ///
    /// # Errors
    /// [`Error::File`] where the file cannot be read, is too large, or does not [`decode`](Self::decode).
    pub fn load(path: &Path, limits: &Limits) -> Result<Picture> {
        let bytes = read_at_most(path, limits.file).map_err(|why| Error::file(path, why))?;
        Picture::decode(&bytes, limits).map_err(|why| Error::file(path, why))
    }

    /// Decodes a PNG (of an animation the first frame) or a JPEG, known by its first bytes. What is
    /// transparent is laid over white; 16-bit channels keep their upper byte.
    ///
    /// # Errors
    /// The reason, where the bytes are neither, broken, or over a limit.
    pub fn decode(bytes: &[u8], limits: &Limits) -> std::result::Result<Picture, String> {
        match bytes {
            [] => Err("the file is empty".into()),
            [0x89, b'P', b'N', b'G', ..] => decode_png(bytes, limits),
            [0xff, 0xd8, ..] => decode_jpeg(bytes, limits),
            [b'R', b'I', b'F', b'F', ..] => Err(foreign("WebP")),
            [b'G', b'I', b'F', b'8', ..] => Err(foreign("GIF")),
            _ => Err("neither PNG nor JPEG by its first bytes".into()),
        }
    }

    /// The centre square, resized to `size x size`.
    pub fn square(&self, size: usize) -> Picture {
        let side = self.width.min(self.height);
        let columns = Taps::new((self.width - side) / 2, side, size.max(1));
        let rows = Taps::new((self.height - side) / 2, side, size.max(1));
        if side == size {
            return self.crop(columns.first, rows.first, side);
        }
        let wide = rows.source().flat_map(|y| columns.apply(move |x| self.pixel(x, y))).collect::<Vec<_>>();
        let n = columns.len();
        let mut square = Picture::filled(n, n, [0; 3]);
        for x in 0..n {
            let column = rows.apply(|y| wide[(y - rows.first) * n + x]);
            for (y, value) in column.enumerate() {
                square.pixels_mut()[y * n + x] = value.map(|v| (v + 0.5) as u8);
            }
        }
        square
    }

    fn pixel(&self, x: usize, y: usize) -> [f32; 3] {
        self.pixels()[y * self.width + x].map(f32::from)
    }

    fn crop(&self, x: usize, y: usize, side: usize) -> Picture {
        let rows = self.rgb.chunks_exact(3 * self.width).skip(y).take(side);
        let rgb = rows.flat_map(|row| &row[3 * x..3 * (x + side)]).copied().collect();
        Picture { width: side, height: side, rgb }
    }

    /// Writes the bytes scaled to `[-1, 1]`, in the same order, as far as `out` reaches.
    pub fn to_unit(&self, out: &mut [f32]) {
        for (value, &byte) in out.iter_mut().zip(&self.rgb) {
            *value = f32::from(byte) / 127.5 - 1.0;
        }
    }

    /// The picture of values in `[-1, 1]`; what lies outside is clipped. `None` unless both sides are
    /// positive and there are three values per pixel.
    pub fn from_unit(width: usize, height: usize, values: &[f32]) -> Option<Picture> {
        let rgb = values.iter().map(|v| ((v + 1.0) * 127.5 + 0.5) as u8).collect();
        Picture::new(width, height, rgb)
    }

    /// The pictures in reading order, `columns` to a row, `gap` white pixels between and around them.
    pub fn grid(pictures: &[Picture], columns: usize, gap: usize) -> Picture {
        let columns = columns.clamp(1, pictures.len().max(1));
        let cell = |side: fn(&Picture) -> usize| gap + pictures.iter().map(side).max().unwrap_or(0);
        let (wide, high) = (cell(Picture::width), cell(Picture::height));
        let rows = pictures.len().div_ceil(columns);
        let mut grid = Picture::filled(gap + columns * wide, gap + rows * high, [255; 3]);
        for (i, picture) in pictures.iter().enumerate() {
            grid.paste(picture, gap + i % columns * wide, gap + i / columns * high);
        }
        grid
    }

    /// Lays `picture` over this one at `(x, y)`; what sticks out is left out.
    pub fn paste(&mut self, picture: &Picture, x: usize, y: usize) {
        let width = self.width;
        let rows = self.pixels_mut().chunks_exact_mut(width).skip(y);
        for (to, from) in rows.zip(picture.pixels().chunks_exact(picture.width)) {
            for (to, from) in to.iter_mut().skip(x).zip(from) {
                *to = *from;
            }
        }
    }

    /// The bytes of a PNG file.
    ///
    /// # Errors
    /// [`Error::Data`] where a side does not fit into 32 bits.
    pub fn encode_png(&self) -> Result<Vec<u8>> {
        let side = |n: usize| u32::try_from(n).map_err(|_| Error::Data(format!("a PNG cannot be {n} wide")));
        let mut bytes = Vec::new();
        let mut encoder = png::Encoder::new(&mut bytes, side(self.width)?, side(self.height)?);
        encoder.set_color(png::ColorType::Rgb);
        let written = encoder.write_header().and_then(|mut writer| writer.write_image_data(&self.rgb));
        written.map_err(|e| Error::Data(format!("PNG: {e}")))?;
        Ok(bytes)
    }

    /// Writes a PNG file.
    ///
    /// # Errors
    /// [`Error::File`] where it cannot be written.
    pub fn save(&self, path: &Path) -> Result<()> {
        std::fs::write(path, self.encode_png()?).map_err(|e| Error::file(path, e))
    }
}

fn foreign(format: &str) -> String {
    format!("a {format} file; convert it to PNG or JPEG")
}

/// The bytes of a file, unless there are more than `limit`.
pub(crate) fn read_at_most(path: &Path, limit: u64) -> std::result::Result<Vec<u8>, String> {
    let file = File::open(path).map_err(|e| e.to_string())?;
    let meta = file.metadata().map_err(|e| e.to_string())?;
    if !meta.is_file() {
        return Err("not a regular file".into());
    }
    let mut bytes = Vec::new();
    // A file may grow, and some report no length: the length read is the one that counts.
    if meta.len() <= limit {
        file.take(limit.saturating_add(1)).read_to_end(&mut bytes).map_err(|e| e.to_string())?;
    }
    if meta.len().max(bytes.len() as u64) > limit {
        return Err(format!("larger than the limit of {limit} bytes"));
    }
    Ok(bytes)
}

fn decode_png(bytes: &[u8], limits: &Limits) -> std::result::Result<Picture, String> {
    let broken = |e: png::DecodingError| format!("broken PNG: {e}");
    let room = usize::try_from(limits.bytes).unwrap_or(usize::MAX);
    let mut decoder = png::Decoder::new_with_limits(Cursor::new(bytes), png::Limits { bytes: room });
    decoder.set_ignore_text_chunk(true);
    decoder.set_ignore_iccp_chunk(true);
    decoder.set_transformations(png::Transformations::normalize_to_color8());
    let header = decoder.read_header_info().map_err(broken)?;
    // Palettes and grey levels below 8 bits are expanded, so a pixel is never less than three bytes.
    let bytes_per_pixel = header.bytes_per_pixel().max(3) as u64;
    limits.admit(header.width.into(), header.height.into(), bytes_per_pixel)?;
    let mut reader = decoder.read_info().map_err(broken)?;
    // The decoder slices the palette by threes without looking at its length.
    if reader.info().palette.as_ref().is_some_and(|p| p.is_empty() || p.len() % 3 != 0 || p.len() > 768) {
        return Err("broken PNG: its palette is not made of 1 to 256 colours".into());
    }
    let size = reader.output_buffer_size().ok_or("too large for this machine")?;
    let mut pixels = vec![0; size];
    let frame = reader.next_frame(&mut pixels).map_err(broken)?;
    pixels.truncate(frame.buffer_size());
    let rgb = match frame.color_type {
        png::ColorType::Grayscale => pixels.iter().flat_map(|&v| [v; 3]).collect(),
        png::ColorType::Rgb => pixels,
        png::ColorType::GrayscaleAlpha => {
            let grey = pixels.as_chunks().0.iter();
            grey.flat_map(|&[v, a]| over_white([v; 3], a)).collect()
        }
        png::ColorType::Rgba => {
            let colour = pixels.as_chunks().0.iter();
            colour.flat_map(|&[r, g, b, a]| over_white([r, g, b], a)).collect()
        }
        png::ColorType::Indexed => return Err("broken PNG: a palette that is not expanded".into()),
    };
    Picture::new(frame.width as usize, frame.height as usize, rgb)
        .ok_or_else(|| format!("broken PNG: its first frame is not {} x {}", frame.width, frame.height))
}

fn over_white(colour: [u8; 3], alpha: u8) -> [u8; 3] {
    let (alpha, clear) = (u32::from(alpha), u32::from(255 - alpha));
    colour.map(|v| ((u32::from(v) * alpha + 255 * clear + 127) / 255) as u8)
}

fn decode_jpeg(bytes: &[u8], limits: &Limits) -> std::result::Result<Picture, String> {
    let broken = |e: zune_jpeg::errors::DecodeErrors| {
        let why = e.to_string();
        format!("broken JPEG: {}", why.split_whitespace().collect::<Vec<_>>().join(" "))
    };
    let side = usize::from(u16::MAX);
    // Not strict, the decoder would paint what a truncated file lacks in grey.
    let options = DecoderOptions::default()
        .set_strict_mode(true)
        .set_max_width(side)
        .set_max_height(side)
        .jpeg_set_out_colorspace(ColorSpace::RGB);
    let mut decoder = JpegDecoder::new_with_options(ZCursor::new(bytes), options);
    decoder.decode_headers().map_err(broken)?;
    let (width, height) = decoder.dimensions().ok_or("broken JPEG: no dimensions")?;
    limits.admit(width as u64, height as u64, 3)?;
    let pixels = decoder.decode().map_err(broken)?;
    Picture::new(width, height, pixels)
        .ok_or_else(|| "JPEG in colours that do not become RGB; convert it to RGB".into())
}

/// The weights of a one-dimensional resampling: a triangle as wide as the coarser of the two grids,
/// so that reducing averages over all pixels and enlarging interpolates linearly.
struct Taps {
    first: usize,
    length: usize,
    outputs: Vec<(usize, Vec<f32>)>,
}

impl Taps {
    /// From `length` samples beginning at `first` to `outputs` samples.
    fn new(first: usize, length: usize, outputs: usize) -> Taps {
        let scale = length as f64 / outputs as f64;
        let reach = scale.max(1.0);
        let tap = |o: usize| {
            let centre = (o as f64 + 0.5) * scale;
            let from = (centre - reach).max(0.0) as usize;
            let to = ((centre + reach).ceil() as usize).min(length);
            let weight = |i: usize| (1.0 - ((i as f64 + 0.5 - centre) / reach).abs()).max(0.0);
            let total: f64 = (from..to).map(weight).sum();
            (first + from, (from..to).map(|i| (weight(i) / total) as f32).collect())
        };
        Taps { first, length, outputs: (0..outputs).map(tap).collect() }
    }

    fn len(&self) -> usize {
        self.outputs.len()
    }

    fn source(&self) -> std::ops::Range<usize> {
        self.first..self.first + self.length
    }

    fn apply(&self, sample: impl Fn(usize) -> [f32; 3]) -> impl Iterator<Item = [f32; 3]> {
        self.outputs.iter().map(move |(from, weights)| {
            weights.iter().enumerate().fold([0.0; 3], |sum, (i, &weight)| {
                let value = sample(from + i);
                std::array::from_fn(|c| sum[c] + weight * value[c])
            })
        })
    }
}

#[cfg(test)]
mod tests;
