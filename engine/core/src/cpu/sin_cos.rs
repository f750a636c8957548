//! Sine and cosine of angles in f64, in code that vectorises.
use std::f64::consts::{FRAC_2_PI, FRAC_PI_2};

/// `(sin x, cos x)` within 4e-16 for `|x| < 2^31`; NaN for what is not finite. The angle is reduced to
/// an eighth of a turn, then the polynomials of FreeBSD's libm are used.
#[inline(always)]
pub fn sin_cos(x: f64) -> (f64, f64) {
    const ROUND: f64 = 6_755_399_441_055_744.0; // 1.5 * 2^52: adding it rounds to an integer
    const REST: f64 = 6.123_233_995_736_766e-17; // pi / 2 - FRAC_PI_2
    let shifted = x.mul_add(FRAC_2_PI, ROUND);
    let quarter = shifted.to_bits();
    let n = shifted - ROUND;
    let r = (-n).mul_add(REST, (-n).mul_add(FRAC_PI_2, x));
    let z = r * r;
    let s = 1.589_690_995_211_55e-10_f64
        .mul_add(z, -2.505_076_025_340_686_3e-8)
        .mul_add(z, 2.755_731_370_707_006_8e-6)
        .mul_add(z, -1.984_126_982_985_795e-4)
        .mul_add(z, 8.333_333_333_322_49e-3)
        .mul_add(z, -1.666_666_666_666_663_2e-1);
    let c = (-1.135_964_755_778_819_5e-11_f64)
        .mul_add(z, 2.087_572_321_298_175e-9)
        .mul_add(z, -2.755_731_435_139_066_3e-7)
        .mul_add(z, 2.480_158_728_947_673e-5)
        .mul_add(z, -1.388_888_888_887_411e-3)
        .mul_add(z, 4.166_666_666_666_66e-2);
    let (s, c) = ((r * z).mul_add(s, r), (z * z).mul_add(c, z.mul_add(-0.5, 1.0)));
    let (s, c) = if quarter & 1 == 0 { (s, c) } else { (c, s) };
    let s = if quarter & 2 == 0 { s } else { -s };
    let c = if quarter.wrapping_add(1) & 2 == 0 { c } else { -c };
    (s, c)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_quarter_turn_is_close() {
        let near = (-100_000..100_000).map(|i| f64::from(i) * 1.234_567e-3);
        let far = (0..100_000).map(|i| f64::from(i) * 21_474.836 - 1e9);
        for x in near.chain(far) {
            let (s, c) = sin_cos(x);
            assert!((s - x.sin()).abs() <= 4e-16 && (c - x.cos()).abs() <= 4e-16, "{x}: {s} {c}");
        }
        for x in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
            assert!(sin_cos(x).0.is_nan() && sin_cos(x).1.is_nan());
        }
    }
}
