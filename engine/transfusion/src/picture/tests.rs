use super::*;
use transfusion_core::random::{Purpose, Stream};

const LIMITS: Limits = Limits { pixels: 64 << 20, bytes: 256 << 20, file: 256 << 20 };

fn decode(bytes: &[u8]) -> std::result::Result<Picture, String> {
    Picture::decode(bytes, &LIMITS)
}

fn refusal(bytes: &[u8]) -> String {
    decode(bytes).expect_err("must be refused")
}

fn bytes_of(hex: &str) -> Vec<u8> {
    let digits = hex.as_bytes().chunks_exact(2);
    digits.map(|d| u8::from_str_radix(std::str::from_utf8(d).unwrap(), 16).unwrap()).collect()
}

/// Red, green and blue change along x, along y and along both.
fn ramp(width: usize, height: usize) -> Picture {
    let mut picture = Picture::filled(width, height, [0; 3]);
    for (i, pixel) in picture.pixels_mut().iter_mut().enumerate() {
        let (x, y) = (i % width, i / width);
        *pixel = [(x * 255 / width) as u8, (y * 255 / height) as u8, ((x + y) * 5) as u8];
    }
    picture
}

fn chunk(kind: &[u8; 4], body: &[u8]) -> Vec<u8> {
    let mut crc = u32::MAX;
    for &byte in kind.iter().chain(body) {
        crc ^= u32::from(byte);
        for _ in 0..8 {
            crc = (crc >> 1) ^ (0xedb8_8320 * (crc & 1));
        }
    }
    [&(body.len() as u32).to_be_bytes(), &kind[..], body, &(!crc).to_be_bytes()].concat()
}

fn header(width: u32, height: u32, depth: u8, colour: u8) -> Vec<u8> {
    let body = [&width.to_be_bytes()[..], &height.to_be_bytes(), &[depth, colour, 0, 0, 0]].concat();
    [b"\x89PNG\r\n\x1a\n".to_vec(), chunk(b"IHDR", &body)].concat()
}

/// Zlib without compression, for chunks written by hand.
fn stored(body: &[u8]) -> Vec<u8> {
    let (mut a, mut b) = (1u32, 0u32);
    for &byte in body {
        a = (a + u32::from(byte)) % 65_521;
        b = (b + a) % 65_521;
    }
    let length = (body.len() as u16).to_le_bytes();
    let complement = (!(body.len() as u16)).to_le_bytes();
    [&[0x78, 1, 1], &length[..], &complement, body, &((b << 16) | a).to_be_bytes()].concat()
}

fn encoded(width: u32, height: u32, colour: png::ColorType, depth: png::BitDepth, data: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut encoder = png::Encoder::new(&mut bytes, width, height);
    encoder.set_color(colour);
    encoder.set_depth(depth);
    if colour == png::ColorType::Indexed {
        encoder.set_palette(vec![10, 20, 30, 200, 100, 0]);
        encoder.set_trns(vec![255, 0]);
    }
    encoder.write_header().unwrap().write_image_data(data).unwrap();
    bytes
}

#[test]
fn png_round_trip_is_exact() {
    let picture = ramp(13, 7);
    assert_eq!(decode(&picture.encode_png().unwrap()), Ok(picture));
}

#[test]
fn every_kind_of_png() {
    use png::{BitDepth::*, ColorType::*};
    for (colour, depth, data, want) in [
        (Grayscale, One, &[0b0100_0000][..], [[0; 3], [255; 3]]),
        (Grayscale, Four, &[0x3f], [[0x33; 3], [255; 3]]),
        (Grayscale, Sixteen, &[0x12, 0xff, 0x80, 0], [[0x12; 3], [0x80; 3]]),
        (GrayscaleAlpha, Eight, &[100, 255, 100, 0], [[100; 3], [255; 3]]),
        (Rgb, Eight, &[1, 2, 3, 4, 5, 6], [[1, 2, 3], [4, 5, 6]]),
        (Rgb, Sixteen, &[1, 0, 2, 0, 3, 0, 4, 0, 5, 0, 6, 0], [[1, 2, 3], [4, 5, 6]]),
        (Rgba, Eight, &[0, 100, 200, 51, 9, 8, 7, 255], [[204, 224, 244], [9, 8, 7]]),
        (Indexed, One, &[0b0100_0000], [[10, 20, 30], [255; 3]]),
        (Indexed, Eight, &[0, 1], [[10, 20, 30], [255; 3]]),
    ] {
        let picture = decode(&encoded(2, 1, colour, depth, data)).unwrap();
        assert_eq!(picture.pixels(), want, "{colour:?} {depth:?}");
    }
}

#[test]
fn interlaced_and_animated_png() {
    // Adam7 puts the only pixel of a 1 x 1 picture into its first pass.
    let mut interlaced = header(1, 1, 8, 2);
    let flag = interlaced.len() - 5;
    let body = [&interlaced[16..flag], &[1]].concat();
    interlaced.truncate(8);
    interlaced.extend(chunk(b"IHDR", &body));
    interlaced.extend(chunk(b"IDAT", &stored(&[0, 7, 8, 9])));
    interlaced.extend(chunk(b"IEND", &[]));
    assert_eq!(decode(&interlaced).unwrap().pixels(), [[7, 8, 9]]);

    let mut animated = Vec::new();
    let mut encoder = png::Encoder::new(&mut animated, 1, 1);
    encoder.set_color(png::ColorType::Rgb);
    encoder.set_animated(2, 0).unwrap();
    let mut writer = encoder.write_header().unwrap();
    writer.write_image_data(&[1, 2, 3]).unwrap();
    writer.write_image_data(&[4, 5, 6]).unwrap();
    writer.finish().unwrap();
    assert_eq!(decode(&animated).unwrap().pixels(), [[1, 2, 3]]);
}

#[test]
fn every_kind_of_jpeg() {
    for (name, hex, red) in [
        ("baseline", JPEG, [220, 20, 30]),
        ("progressive", JPEG_PROGRESSIVE, [220, 20, 30]),
        ("grey", JPEG_GREY, [81; 3]),
        ("CMYK", JPEG_CMYK, [220, 20, 30]),
    ] {
        let picture = decode(&bytes_of(hex)).unwrap();
        assert_eq!((picture.width(), picture.height()), (8, 8), "{name}");
        for (x, want) in [(1, red), (6, [255; 3])] {
            let got = picture.pixels()[3 * 8 + x];
            let near = got.iter().zip(want).all(|(a, b)| a.abs_diff(b) < 30);
            assert!(near, "{name} at {x}: {got:?}, not {want:?}");
        }
    }
}

#[test]
fn bombs_are_refused_by_their_headers() {
    let small = Limits { pixels: 100, bytes: 250, file: 1000 };
    let rest = [chunk(b"IDAT", &stored(&[0; 1000])), chunk(b"IEND", &[])].concat();
    let png = |w, h, depth, colour| [header(w, h, depth, colour), rest.clone()].concat();
    assert!(refusal(&png(20_000, 20_000, 8, 2)).contains("20000 x 20000 pixels are over"));
    assert!(refusal(&png(0x7fff_ffff, 0x7fff_ffff, 16, 6)).contains("over the limit"));
    refusal(&png(1 << 31, 1, 8, 2));
    assert!(refusal(&png(8000, 8000, 16, 6)).contains("8 bits per channel"));
    for empty in [png(0, 0, 8, 2), png(5, 0, 8, 2), png(0, 5, 8, 2)] {
        refusal(&empty);
    }
    for (width, why) in [(11, "11 x 10 pixels are over"), (10, "10 x 10 pixels of 3 bytes are over")] {
        let picture = ramp(width, 10).encode_png().unwrap();
        assert!(Picture::decode(&picture, &small).unwrap_err().contains(why));
    }
    let mut jpeg = bytes_of(JPEG);
    let frame = jpeg.windows(2).position(|w| w == [0xff, 0xc0]).unwrap();
    jpeg[frame + 5..frame + 9].fill(0xff);
    assert!(refusal(&jpeg).contains("65535 x 65535"));
    jpeg[frame + 5..frame + 9].fill(0);
    refusal(&jpeg);
}

#[test]
fn hostile_pictures_are_refused() {
    let good = ramp(9, 9).encode_png().unwrap();
    let jpeg = bytes_of(JPEG);
    let mut wrong_crc = good.clone();
    wrong_crc[30] ^= 1;
    let palette = |length: usize| {
        [header(1, 1, 8, 3), chunk(b"PLTE", &vec![9; length]), chunk(b"IDAT", &stored(&[0, 0]))].concat()
    };
    for (name, bytes) in [
        ("empty", vec![]),
        ("one byte", vec![0x89]),
        ("text", b"a small red circle".to_vec()),
        ("signature alone", good[..8].to_vec()),
        ("header alone", good[..33].to_vec()),
        ("cut in the header", good[..20].to_vec()),
        ("cut in the data", good[..good.len() / 2].to_vec()),
        ("wrong CRC", wrong_crc),
        ("no data", [header(2, 2, 8, 2), chunk(b"IEND", &[])].concat()),
        (
            "too little data",
            [header(2, 2, 8, 2), chunk(b"IDAT", &stored(&[0; 5])), chunk(b"IEND", &[])].concat(),
        ),
        ("depth 3", [header(1, 1, 3, 0), chunk(b"IDAT", &stored(&[0, 0]))].concat()),
        ("colour type 5", [header(1, 1, 8, 5), chunk(b"IDAT", &stored(&[0, 0]))].concat()),
        ("no palette", [header(1, 1, 8, 3), chunk(b"IDAT", &stored(&[0, 0]))].concat()),
        ("palette of nothing", palette(0)),
        ("palette of 4 bytes", palette(4)),
        ("palette of 900 bytes", palette(900)),
        ("filter 9", [header(1, 1, 8, 0), chunk(b"IDAT", &stored(&[9, 0]))].concat()),
        ("data before the header", [&good[..8], &chunk(b"IDAT", &stored(&[0, 0]))].concat()),
        ("chunk of 4 GiB", [&good[..33], &[0xff; 8]].concat()),
        ("GIF", b"GIF89a\x01\0\x01\0".to_vec()),
        ("WebP", b"RIFF\0\0\0\0WEBP".to_vec()),
        ("JPEG start alone", jpeg[..2].to_vec()),
        ("JPEG cut in its tables", jpeg[..60].to_vec()),
        ("JPEG cut before its data", jpeg[..jpeg.len() - 40].to_vec()),
        ("JPEG of markers", [0xff, 0xd8].repeat(500)),
    ] {
        let why = decode(&bytes).expect_err(name);
        assert!(!why.contains('\n') && why.len() > 8, "{name}: {why:?}");
    }
}

#[test]
fn odd_but_harmless_pictures_are_read() {
    let pixel = [chunk(b"IDAT", &stored(&[0, 1])), chunk(b"IEND", &[])].concat();
    let palette = [header(1, 1, 8, 3), chunk(b"PLTE", &[9; 3]), pixel.clone()].concat();
    // An index beyond the palette: the decoder paints it black.
    assert_eq!(decode(&palette).unwrap().pixels(), [[0; 3]]);
    for kind in [b"iCCP", b"zTXt", b"tEXt", b"eXIf"] {
        let huge = [header(1, 1, 8, 0), chunk(kind, &vec![b'x'; 1 << 20]), pixel.clone()].concat();
        if let Ok(picture) = decode(&huge) {
            assert_eq!(picture.pixels(), [[1; 3]]);
        }
    }
    let trailing = [ramp(3, 3).encode_png().unwrap(), vec![0xaa; 100]].concat();
    assert_eq!(decode(&trailing), Ok(ramp(3, 3)));
}

/// The same file with every CRC made right, so that changed bytes reach what lies behind the checks.
fn resealed(mut bytes: Vec<u8>) -> Vec<u8> {
    let mut at = 8;
    while let Some(&[a, b, c, d]) = bytes.get(at..).and_then(|rest| rest.first_chunk()) {
        let end = at + 8 + u32::from_be_bytes([a, b, c, d]) as usize;
        let Some(&[k, i, n, e]) = bytes.get(at + 4..end).and_then(|rest| rest.first_chunk()) else { break };
        let sealed = chunk(&[k, i, n, e], &bytes[at + 8..end]);
        let reach = sealed.len().min(bytes.len() - at);
        bytes[at..at + reach].copy_from_slice(&sealed[..reach]);
        at = end + 4;
    }
    bytes
}

#[test]
fn no_bytes_make_the_decoders_panic() {
    let indexed = encoded(5, 2, png::ColorType::Indexed, png::BitDepth::Two, &[0b00_01_00_01, 0, 0, 0]);
    let deep = encoded(2, 2, png::ColorType::GrayscaleAlpha, png::BitDepth::Sixteen, &[77; 16]);
    let pngs = [ramp(9, 9).encode_png().unwrap(), indexed, deep];
    let jpegs = [JPEG, JPEG_PROGRESSIVE, JPEG_CMYK].map(bytes_of);
    for (which, good) in pngs.iter().chain(&jpegs).enumerate() {
        for length in 0..good.len() {
            let _ = decode(&good[..length]);
        }
        for case in 0..2000 {
            let random = Stream::new(which as u64, Purpose::Test, case);
            let mut bytes = good.clone();
            for flip in 0..=random.below(0, 8) {
                let at = random.below(2 * flip + 1, bytes.len() as u32) as usize;
                bytes[at] ^= 1 << random.below(2 * flip + 2, 8);
            }
            let _ = decode(&bytes);
            let _ = decode(&resealed(bytes.clone()));
            // Garbage behind a valid start.
            let start = if which < pngs.len() { 33 } else { 4 };
            for (i, byte) in bytes.iter_mut().enumerate().skip(start) {
                *byte = random.word(i as u32) as u8;
            }
            let _ = decode(&bytes);
        }
    }
}

#[test]
fn files() {
    let folder = std::env::temp_dir().join(format!("transfusion-picture-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let path = folder.join("a.png");
    ramp(5, 4).save(&path).unwrap();
    assert_eq!(Picture::load(&path, &LIMITS).unwrap(), ramp(5, 4));
    let tight = Limits { file: 20, ..LIMITS };
    assert!(Picture::load(&path, &tight).unwrap_err().to_string().contains("larger than the limit of 20"));
    for (path, why) in [(folder.join("none.png"), "none.png"), (folder.clone(), "not a regular file")] {
        assert!(Picture::load(&path, &LIMITS).unwrap_err().to_string().contains(why));
    }
    std::fs::remove_dir_all(&folder).unwrap();
}

#[test]
fn square_crops_the_centre_and_averages() {
    let mut wide = Picture::filled(6, 2, [9; 3]);
    for (x, v) in [(2, 0), (3, 100)] {
        wide.pixels_mut()[x] = [v; 3];
        wide.pixels_mut()[6 + x] = [v; 3];
    }
    assert_eq!(wide.square(2).pixels(), [[0; 3], [100; 3], [0; 3], [100; 3]]);
    assert_eq!(wide.square(1).pixels(), [[50; 3]]);
    // A chequerboard becomes flat grey, away from the edges, instead of a moire.
    let mut fine = Picture::filled(96, 96, [0; 3]);
    for (i, pixel) in fine.pixels_mut().iter_mut().enumerate() {
        *pixel = [if (i % 96 + i / 96) % 2 == 0 { 255 } else { 0 }; 3];
    }
    for size in [7, 16, 31] {
        let small = fine.square(size);
        assert!(small.pixels().iter().all(|p| p[0].abs_diff(127) < 12), "{size}");
    }
    // Neither direction moves or darkens a flat or a linear picture.
    assert_eq!(Picture::filled(50, 30, [7, 80, 255]).square(17), Picture::filled(17, 17, [7, 80, 255]));
    let (large, small) = (ramp(64, 64).square(128), ramp(64, 64).square(16));
    for (picture, scale) in [(large, 2.0), (small, 0.25)] {
        let n = picture.width() as f64;
        let inside = (picture.width() / 4)..(picture.width() * 3 / 4);
        for x in inside {
            let want = ((x as f64 + 0.5) / scale - 0.5) * 255.0 / 64.0;
            let got = f64::from(picture.pixels()[(n as usize / 2) * n as usize + x][0]);
            assert!((got - want).abs() < 1.6, "{n} {x}: {got} {want}");
        }
    }
}

#[test]
fn unit_range_round_trip() {
    let picture = ramp(16, 16);
    let mut values = vec![f32::NAN; 768];
    picture.to_unit(&mut values);
    assert!(values.iter().all(|v| (-1.0..=1.0).contains(v)));
    assert_eq!(Picture::from_unit(16, 16, &values).as_ref(), Some(&picture));
    let wild = Picture::from_unit(1, 1, &[f32::NAN, 9.0, -9.0]).unwrap();
    assert_eq!(wild.pixels(), [[0, 255, 0]]);
    assert_eq!(Picture::from_unit(2, 1, &[0.0; 3]), None);
    assert_eq!(Picture::from_unit(0, 0, &[]), None);
    assert_eq!(Picture::new(usize::MAX, 2, vec![]), None);
}

#[test]
fn grid_places_in_reading_order() {
    let cells = [[1; 3], [2; 3], [3; 3]].map(|c| Picture::filled(2, 2, c));
    let grid = Picture::grid(&cells, 2, 1);
    assert_eq!((grid.width(), grid.height()), (7, 7));
    let at = |x: usize, y: usize| grid.pixels()[y * 7 + x][0];
    assert_eq!([at(0, 0), at(1, 1), at(4, 2), at(1, 5), at(4, 4)], [255, 1, 2, 3, 255]);
    assert_eq!(Picture::grid(&[], 0, 0), Picture::filled(1, 1, [255; 3]));
}

// The fixtures: 8 x 8 pixels, (220, 20, 30) on the left and white on the right, written by Pillow.

const JPEG: &str = "\
    ffd8ffe000104a46494600010100000100010000ffdb0043000a07070807060a0808080b0a0a0b0e18100e0d0d0e1d15\
    161118231f2524221f2221262b372f26293429212230413134393b3e3e3e252e4449433c48373d3e3bffdb0043010a0b\
    0b0e0d0e1c10101c3b2822283b3b3b3b3b3b3b3b3b3b3b3b3b3b3b3b3b3b3b3b3b3b3b3b3b3b3b3b3b3b3b3b3b3b3b3b\
    3b3b3b3b3b3b3b3b3b3b3b3b3b3bffc00011080008000803012200021101031101ffc400150001010000000000000000\
    0000000000000006ffc40018100100030100000000000000000000000000074583c2ffc4001501010100000000000000\
    000000000000000305ffc4001c11000200070000000000000000000000000001020305333481b1ffda000c0301000211\
    0311003f00a0896db1ec00c8b68a957cd8f5c47fffd9\
";

const JPEG_GREY: &str = "\
    ffd8ffe000104a46494600010100000100010000ffdb0043000a07070807060a0808080b0a0a0b0e18100e0d0d0e1d15\
    161118231f2524221f2221262b372f26293429212230413134393b3e3e3e252e4449433c48373d3e3bffc0000b080008\
    000801011100ffc40014000100000000000000000000000000000006ffc4001810000203000000000000000000000000\
    0000074583c2ffda0008010100003f0040a596a767ffd9\
";

const JPEG_CMYK: &str = "\
    ffd8ffee000e41646f626500640000000000ffdb0043000a07070807060a0808080b0a0a0b0e18100e0d0d0e1d151611\
    18231f2524221f2221262b372f26293429212230413134393b3e3e3e252e4449433c48373d3e3bffc000140800080008\
    044311004d11005911004b1100ffc4001500010100000000000000000000000000000407ffc4001c1000010403010000\
    00000000000000000000074584c3054381c1ffda000e0443004d0059004b00003f00ac637673d1082bf47b46214fb1ec\
    2cc7ffd9\
";

const JPEG_PROGRESSIVE: &str = "\
    ffd8ffe000104a46494600010100000100010000ffdb0043000a07070807060a0808080b0a0a0b0e18100e0d0d0e1d15\
    161118231f2524221f2221262b372f26293429212230413134393b3e3e3e252e4449433c48373d3e3bffdb0043010a0b\
    0b0e0d0e1c10101c3b2822283b3b3b3b3b3b3b3b3b3b3b3b3b3b3b3b3b3b3b3b3b3b3b3b3b3b3b3b3b3b3b3b3b3b3b3b\
    3b3b3b3b3b3b3b3b3b3b3b3b3b3bffc20011080008000803012200021101031101ffc400150001010000000000000000\
    0000000000000005ffc4001501010100000000000000000000000000000204ffda000c03010002100310000001a0055f\
    ffc4001510010100000000000000000000000000000005ffda000801010001050292ffc4001711000301000000000000\
    0000000000000000010433ffda0008010301013f01af667fffc400161100030000000000000000000000000000000232\
    ffda0008010201013f01493fffc400161000030000000000000000000000000000000381ffda0008010100063f026c3f\
    ffc4001610000300000000000000000000000000000081f0ffda0008010100013f21bb3fffda000c0301000200030000\
    001003ffc400161101010100000000000000000000000000b10001ffda0008010301013f103997ffc400151101010000\
    0000000000000000000000000031ffda0008010201013f1093ffc40014100100000000000000000000000000000000ff\
    da0008010100013f100fffd9\
";
