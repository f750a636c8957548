//! Transposes from rows into panels, with the shuffles of AVX where there are any: compilers find none.
use super::Real;
use crate::tensor::DType;

/// `to[p][w] = rows[w][p]`. To be called from code compiled for the vector instructions at hand.
///
/// # Panics
/// If a row is shorter than `to`.
#[inline(always)]
pub fn transpose<T: Real, const W: usize>(rows: [&[T]; W], to: &mut [[T; W]]) {
    let mut done = 0;
    #[cfg(target_arch = "x86_64")]
    if T::DTYPE == DType::F32
        && W.is_multiple_of(8)
        && let Some(v3) = pulp::x86::V3::try_new()
    {
        done = to.len() / 8 * 8;
        for p in (0..done).step_by(8) {
            for w in (0..W).step_by(8) {
                let mut block = [v3.avx._mm256_setzero_ps(); 8];
                for (block, row) in block.iter_mut().zip(&rows[w..w + 8]) {
                    let row: &[f32] = bytemuck::cast_slice(&row[p..p + 8]);
                    *block = pulp::cast::<[f32; 8], _>(std::array::from_fn(
                        #[inline(always)]
                        |i| row[i],
                    ));
                }
                for (u, column) in transpose_8x8(v3, block).into_iter().enumerate() {
                    let to = bytemuck::cast_slice_mut::<T, f32>(&mut to[p + u][w..w + 8]);
                    to.copy_from_slice(&pulp::cast::<_, [f32; 8]>(column));
                }
            }
        }
    }
    for (p, to) in to.iter_mut().enumerate().skip(done) {
        for w in 0..W {
            to[w] = rows[w][p];
        }
    }
}

/// By pairs, by fours, by halves.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
pub(super) fn transpose_8x8(
    v3: pulp::x86::V3,
    x: [std::arch::x86_64::__m256; 8],
) -> [std::arch::x86_64::__m256; 8] {
    let avx = v3.avx;
    let mut pairs = x;
    for i in [0, 2, 4, 6] {
        pairs[i] = avx._mm256_unpacklo_ps(x[i], x[i + 1]);
        pairs[i + 1] = avx._mm256_unpackhi_ps(x[i], x[i + 1]);
    }
    let mut fours = pairs;
    for i in [0, 4] {
        fours[i] = avx._mm256_shuffle_ps::<0x44>(pairs[i], pairs[i + 2]);
        fours[i + 1] = avx._mm256_shuffle_ps::<0xee>(pairs[i], pairs[i + 2]);
        fours[i + 2] = avx._mm256_shuffle_ps::<0x44>(pairs[i + 1], pairs[i + 3]);
        fours[i + 3] = avx._mm256_shuffle_ps::<0xee>(pairs[i + 1], pairs[i + 3]);
    }
    let mut whole = fours;
    for i in 0..4 {
        whole[i] = avx._mm256_permute2f128_ps::<0x20>(fours[i], fours[i + 4]);
        whole[i + 4] = avx._mm256_permute2f128_ps::<0x31>(fours[i], fours[i + 4]);
    }
    whole
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check<T: Real, const W: usize>() {
        for n in [0, 1, 7, 8, 9, 31] {
            let all: Vec<T> = (0..W * 40).map(|i| T::of(i as f64)).collect();
            let rows: [&[T]; W] = std::array::from_fn(|w| &all[w * 40 + 3..][..n]);
            let mut to = vec![[T::ZERO; W]; n];
            crate::cpu::simd!(transpose(rows, &mut to));
            for p in 0..n {
                for w in 0..W {
                    assert_eq!(to[p][w], rows[w][p], "{W} rows of {n}: {p}, {w}");
                }
            }
        }
    }

    #[test]
    fn every_element_arrives() {
        check::<f32, 16>();
        check::<f32, 8>();
        check::<f32, 4>();
        check::<f64, 16>();
        check::<f64, 8>();
    }
}
