//! Counter-based random numbers: Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy
//! as 1, 2, 3") and Gaussians made from its words.
//!
//! A number is a function of `(seed, purpose, document, element)` alone, so it depends on neither
//! batching, nor threads, nor device, nor resumption. Every Gaussian is computed with the same
//! multiply-adds on every machine, so that a GPU kernel can reproduce it bit for bit.

/// What a stream of random numbers is used for; keeps the streams of one document apart.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
pub enum Purpose {
    /// Initial weights.
    Init = 1,
    /// The order in which documents are visited.
    Order = 2,
    /// Which part of a long text, or which built-in picture, a document is.
    Data = 3,
    /// The noise level of an image.
    Time = 4,
    /// The noise of an image.
    Noise = 5,
    /// Whether a document loses its condition, and whether its image comes first.
    Drop = 6,
    /// Noise added while sampling images.
    Sampler = 7,
    /// Choice of a text token while sampling.
    Token = 8,
    /// Tests and benchmarks.
    Test = 9,
}

/// The random numbers of one `(seed, purpose, document)`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Stream {
    key: [u32; 2],
    purpose: u32,
    document: [u32; 2],
}

impl Stream {
    /// The stream of `document` for `purpose` under `seed`.
    pub fn new(seed: u64, purpose: Purpose, document: u64) -> Self {
        Stream { key: halves(seed), purpose: purpose as u32, document: halves(document) }
    }

    /// The stream that the words of an `i32` tensor name, as kernels receive it.
    pub fn from_words(seed: [i32; 2], purpose: Purpose, document: [i32; 2]) -> Self {
        Stream {
            key: seed.map(i32::cast_unsigned),
            purpose: purpose as u32,
            document: document.map(i32::cast_unsigned),
        }
    }

    /// Block `block` of the stream: four words.
    #[inline(always)]
    pub fn words(&self, block: u32) -> [u32; 4] {
        philox4x32_10([block, self.purpose, self.document[0], self.document[1]], self.key)
    }

    /// The 32-bit word of `element`.
    pub fn word(&self, element: u32) -> u32 {
        self.words(element / 4)[(element % 4) as usize]
    }

    /// Uniform in `[0, 1)`, 24 bits.
    pub fn uniform(&self, element: u32) -> f32 {
        unit(self.word(element))
    }

    /// Uniform in `0..n`; `n` must not be zero (0 is returned then). Multiplication instead of
    /// remainder: the bias is below `n / 2^32`.
    pub fn below(&self, element: u32, n: u32) -> u32 {
        ((u64::from(self.word(element)) * u64::from(n)) >> 32) as u32
    }

    /// Standard normal.
    pub fn normal(&self, element: u32) -> f32 {
        self.normals(element / 4)[(element % 4) as usize]
    }

    /// Fills `out` with the normals of elements `first..`; `first` must be a multiple of four.
    pub fn fill_normal(&self, first: u32, out: &mut [f32]) {
        debug_assert!(first.is_multiple_of(4));
        crate::cpu::simd!({
            for (i, four) in out.chunks_mut(4).enumerate() {
                let z = self.normals(first / 4 + i as u32);
                four.copy_from_slice(&z[..four.len()]);
            }
        });
    }

    /// Four standard normals from one block, by Box and Muller (1958).
    #[inline(always)]
    pub fn normals(&self, block: u32) -> [f32; 4] {
        let w = self.words(block);
        let [a, b] = box_muller(w[0], w[1]);
        let [c, d] = box_muller(w[2], w[3]);
        [a, b, c, d]
    }
}

/// Splits a 64-bit number into its low and high words.
pub fn halves(x: u64) -> [u32; 2] {
    [x as u32, (x >> 32) as u32]
}

/// Ten rounds of Philox 4x32.
#[inline(always)]
pub fn philox4x32_10(counter: [u32; 4], key: [u32; 2]) -> [u32; 4] {
    let [mut a, mut b, mut c, mut d] = counter;
    let [mut k0, mut k1] = key;
    for _ in 0..10 {
        let p = u64::from(a) * 0xD251_1F53;
        let q = u64::from(c) * 0xCD9E_8D57;
        [a, b, c, d] = [(q >> 32) as u32 ^ b ^ k0, q as u32, (p >> 32) as u32 ^ d ^ k1, p as u32];
        k0 = k0.wrapping_add(0x9E37_79B9);
        k1 = k1.wrapping_add(0xBB67_AE85);
    }
    [a, b, c, d]
}

#[inline(always)]
fn unit(word: u32) -> f32 {
    (word >> 8) as f32 * (1.0 / 16_777_216.0)
}

#[inline(always)]
fn box_muller(radius: u32, angle: u32) -> [f32; 2] {
    let u = ((radius >> 8) + 1) as f32 * (1.0 / 16_777_216.0);
    let r = (-2.0 * ln(u)).max(0.0).sqrt();
    let (sin, cos) = sin_cos_turn(unit(angle));
    [r * cos, r * sin]
}

/// Natural logarithm of a normal number in `(0, 1]`, to about 2 units in the last place.
#[inline(always)]
fn ln(x: f32) -> f32 {
    // x = m 2^e with m in [sqrt(1/2), sqrt(2)); ln m = 2 atanh((m-1)/(m+1)).
    let bits = x.to_bits();
    let e = ((bits.wrapping_sub(0x3f35_04f3)) as i32) >> 23;
    let m = f32::from_bits(bits.wrapping_sub((e << 23).cast_unsigned()));
    let s = (m - 1.0) / (m + 1.0);
    let z = s * s;
    let p = 0.222_221_98_f32.mul_add(z, 0.285_714_3);
    let p = p.mul_add(z, 0.4).mul_add(z, 0.666_666_7);
    let p = p.mul_add(z * s, 2.0 * s);
    (e as f32).mul_add(std::f32::consts::LN_2, p)
}

/// `(sin 2 pi u, cos 2 pi u)` for `u` in `[0, 1)`.
#[inline(always)]
fn sin_cos_turn(u: f32) -> (f32, f32) {
    // Nearest quarter turn q, remainder x in [-pi/4, pi/4]; Taylor polynomials to x^9 and x^10.
    let q = (u * 4.0 + 0.5).floor();
    let x = (u - q * 0.25) * std::f32::consts::TAU;
    let z = x * x;
    let s = 2.755_731_9e-6_f32.mul_add(z, -1.984_127e-4).mul_add(z, 8.333_334e-3);
    let s = s.mul_add(z, -0.166_666_67).mul_add(z * x, x);
    let c = (-2.755_732e-7_f32).mul_add(z, 2.480_158_7e-5).mul_add(z, -1.388_888_9e-3);
    let c = c.mul_add(z, 4.166_666_8e-2).mul_add(z, -0.5).mul_add(z, 1.0);
    let (swap, neg_s, neg_c) = match q as i32 & 3 {
        0 => (false, false, false),
        1 => (true, false, true),
        2 => (false, true, true),
        _ => (true, true, false),
    };
    let (s, c) = if swap { (c, s) } else { (s, c) };
    (if neg_s { -s } else { s }, if neg_c { -c } else { c })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Known-answer vectors of the Random123 distribution (kat_vectors, philox4x32 10).
    #[test]
    fn philox_known_answers() {
        let ff = u32::MAX;
        let pi = ([0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344], [0xa409_3822, 0x299f_31d0]);
        for (counter, key, want) in [
            ([0; 4], [0; 2], [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]),
            ([ff; 4], [ff; 2], [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]),
            (pi.0, pi.1, [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]),
        ] {
            assert_eq!(philox4x32_10(counter, key), want);
        }
    }

    #[test]
    fn normals_follow_box_muller_and_have_unit_moments() {
        let s = Stream::new(7, Purpose::Test, 3);
        let n = 200_000;
        let mut z = vec![0.0; n];
        s.fill_normal(0, &mut z);
        for i in [0, 1, 2, 3, 777, 199_999] {
            assert_eq!(z[i], s.normal(i as u32));
            let w = s.words(i as u32 / 4);
            let (a, b) = if i % 4 < 2 { (w[0], w[1]) } else { (w[2], w[3]) };
            let r = (-2.0 * (f64::from((a >> 8) + 1) / 16_777_216.0).ln()).sqrt();
            let angle = std::f64::consts::TAU * f64::from(b >> 8) / 16_777_216.0;
            let want = r * if i % 2 == 0 { angle.cos() } else { angle.sin() };
            assert!((f64::from(z[i]) - want).abs() < 1e-5, "{i}: {} {want}", z[i]);
        }
        let moment = |k: i32| z.iter().map(|&x| f64::from(x).powi(k)).sum::<f64>() / n as f64;
        for (k, want, slack) in [(1, 0.0, 0.01), (2, 1.0, 0.015), (3, 0.0, 0.04), (4, 3.0, 0.1)] {
            assert!((moment(k) - want).abs() < slack, "moment {k}: {}", moment(k));
        }
    }
}
