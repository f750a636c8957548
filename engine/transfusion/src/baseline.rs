//! The best linear denoiser of a set of pictures, which a trained model has to beat: of all linear maps of
//! a noisy picture, the one with the least expected squared error over the pictures and the noise
//! (Wiener 1949). It knows how pixels go together, and nothing that a straight line cannot say.
use crate::{
    config::Objective,
    data::{Part, Source},
    diffusion,
    error::Result,
    sample::Cancel,
};
use transfusion_core::{
    cpu::{Cpu, Mat, Precision, matmul_rows},
    random::{Purpose, Stream},
};

/// Most pictures that it is fitted to, and most values of all of them: a gibibyte.
const PICTURES: u64 = 4096;
const VALUES: usize = 1 << 28;
/// Most rounds of conjugate gradients.
const ROUNDS: usize = 3000;
/// Residual at which they end, relative to where they began.
const ENOUGH: f32 = 1e-3;

/// Fitted to pictures `x_1..x_N` of mean `m` and covariance `S`:
/// `x_0 = m + a S (a^2 S + b^2)^-1 (x_t - a m)` for `x_t = a x_0 + b noise`.
pub struct LinearDenoiser {
    mean: Vec<f32>,
    /// Rows `(x_n - m) / sqrt(N)`.
    rows: Vec<f32>,
    count: usize,
}

impl LinearDenoiser {
    /// Fitted to the pictures of a source, of which the first 4096 count, and no more than fill a
    /// gibibyte; `None` if it has none of `values` values each, or no end.
    pub fn fit(source: &dyn Source, values: usize) -> Option<LinearDenoiser> {
        let pictures =
            pictures(source, 0..source.len()?.min(PICTURES).min((VALUES / values.max(1)) as u64), values);
        let count = pictures.len() / values.max(1);
        if count == 0 {
            return None;
        }
        let (mut mean, mut rows) = (vec![0.0; values], pictures);
        for row in rows.chunks(values) {
            mean.iter_mut().zip(row).for_each(|(m, x)| *m += x / count as f32);
        }
        let scale = 1.0 / (count as f32).sqrt();
        for row in rows.chunks_mut(values) {
            row.iter_mut().zip(&mean).for_each(|(x, m)| *x = (*x - m) * scale);
        }
        Some(LinearDenoiser { mean, rows, count })
    }

    /// Mean squared error of what it predicts in place of the model, for the pictures of documents
    /// `range` at noise level `t`; `None` if there are none, or if its equations resist solution.
    ///
    /// # Errors
    /// [`crate::Error::Cancelled`] when `cancel` is set.
    pub fn error(
        &self,
        source: &dyn Source,
        range: std::ops::Range<u64>,
        objective: Objective,
        t: f32,
        seed: u64,
        cancel: Cancel<'_>,
    ) -> Result<Option<f64>> {
        let values = self.mean.len();
        let clean = pictures(source, range, values);
        if clean.is_empty() {
            return Ok(None);
        }
        let mut noise = vec![0.0; clean.len()];
        for (n, noise) in noise.chunks_mut(values).enumerate() {
            Stream::new(seed, Purpose::Noise, n as u64).fill_normal(0, noise);
        }
        let [a, b, c, d] = diffusion::coefficients(objective, t);
        let noisy: Vec<f32> = clean.iter().zip(&noise).map(|(x, e)| a * x + b * e).collect();
        let Some(guess) = self.denoise(&noisy, a, b, cancel)? else { return Ok(None) };
        let error = |i: usize| {
            let target = c * clean[i] + d * noise[i];
            let implied = if b > 0.0 { (noisy[i] - a * guess[i]) / b } else { 0.0 };
            f64::from(c * guess[i] + d * implied - target).powi(2)
        };
        Ok(Some((0..clean.len()).map(error).sum::<f64>() / clean.len() as f64))
    }

    /// The clean pictures that rows `noisy` suggest: `(a^2 S + b^2) z = x_t - a m` by conjugate gradients,
    /// all rows side by side, and `x_0 = m + a S z`.
    fn denoise(&self, noisy: &[f32], a: f32, b: f32, cancel: Cancel<'_>) -> Result<Option<Vec<f32>>> {
        let values = self.mean.len();
        let centred = |(i, x): (usize, &f32)| x - a * self.mean[i % values];
        let mut residual: Vec<f32> = noisy.iter().enumerate().map(centred).collect();
        let (mut z, mut direction) = (vec![0.0; noisy.len()], residual.clone());
        let squares = |x: &[f32]| x.chunks(values).map(|row| inner(row, row)).collect::<Vec<f32>>();
        let first = squares(&residual);
        let mut size = first.clone();
        let solved = |size: &[f32]| size.iter().zip(&first).all(|(s, f)| *s <= ENOUGH * ENOUGH * f);
        for _ in 0..ROUNDS {
            cancel.check()?;
            if solved(&size) {
                break;
            }
            let mut image = self.covariance(&direction);
            image.iter_mut().zip(&direction).for_each(|(i, d)| *i = a * a * *i + b * b * d);
            for (row, size) in size.iter_mut().enumerate() {
                let at = row * values..(row + 1) * values;
                let (image, direction) = (&image[at.clone()], &mut direction[at.clone()]);
                let curvature = inner(image, direction);
                if curvature <= 0.0 {
                    continue;
                }
                let step = *size / curvature;
                z[at.clone()].iter_mut().zip(&*direction).for_each(|(z, d)| *z += step * d);
                let residual = &mut residual[at];
                residual.iter_mut().zip(image).for_each(|(r, i)| *r -= step * i);
                let next = inner(residual, residual);
                let keep = next / *size;
                direction.iter_mut().zip(&*residual).for_each(|(d, r)| *d = r + keep * *d);
                *size = next;
            }
        }
        if !solved(&size) {
            return Ok(None);
        }
        let mut guess = self.covariance(&z);
        guess.iter_mut().enumerate().for_each(|(i, g)| *g = self.mean[i % values] + a * *g);
        Ok(Some(guess))
    }

    /// `x S` for rows `x`.
    fn covariance(&self, x: &[f32]) -> Vec<f32> {
        let (values, cpu) = (self.mean.len(), Cpu::default());
        let n = x.len() / values;
        let rows = Mat::new(&self.rows, self.count, values);
        let (mut shares, mut product) = (vec![0.0; n * self.count], vec![0.0; x.len()]);
        matmul_rows(&mut shares, Mat::new(x, n, values), rows.t(), false, Precision::F32, &cpu);
        matmul_rows(&mut product, Mat::new(&shares, n, self.count), rows, false, Precision::F32, &cpu);
        product
    }
}

/// `x . y`.
fn inner(x: &[f32], y: &[f32]) -> f32 {
    x.iter().zip(y).map(|(x, y)| x * y).sum()
}

/// The pictures of documents `range` that have `values` values, one after the other.
fn pictures(source: &dyn Source, range: std::ops::Range<u64>, values: usize) -> Vec<f32> {
    let mut all = Vec::new();
    for part in range.flat_map(|i| source.document(i).parts) {
        let Part::Image(picture) = part else { continue };
        if picture.rgb().len() == values {
            let at = all.len();
            all.resize(at + values, 0.0);
            picture.to_unit(&mut all[at..]);
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        data::{Document, Documents},
        picture::Picture,
    };
    use std::sync::Arc;

    /// Pictures of one pixel whose three values are `m + w` along one direction only.
    fn along_a_line(n: usize) -> Documents {
        let documents = (0..n).map(|i| {
            let level = (i * 37 % 101) as u8;
            let picture = Picture::filled(1, 1, [100 + level, 60 + level, 140 - level]);
            Document { parts: vec![Part::Image(Arc::new(picture))], stream: false }
        });
        Documents::new(documents.collect(), "a line")
    }

    #[test]
    fn its_error_is_that_of_the_posterior() {
        let source = along_a_line(2000);
        let fitted = LinearDenoiser::fit(&source, 3).unwrap();
        for t in [50.0, 350.0, 950.0] {
            let [a, b, ..] = diffusion::coefficients(Objective::X0, t);
            // A normal variable of variance s along a unit direction, seen with gain a in noise b.
            let s: f64 = fitted.rows.iter().map(|x| f64::from(*x).powi(2)).sum();
            let (a, b) = (f64::from(a), f64::from(b));
            let want = s * b * b / (a * a * s + b * b) / 3.0;
            let have = fitted.error(&source, 0..2000, Objective::X0, t, 7, Cancel(None)).unwrap().unwrap();
            assert!((have - want).abs() <= 0.06 * want, "t {t}: {have} {want}");
            // Errors of noise and of pictures say the same.
            let noise =
                fitted.error(&source, 0..2000, Objective::Epsilon, t, 7, Cancel(None)).unwrap().unwrap();
            assert!((noise * b * b / (a * a) - have).abs() <= 1e-3 * have, "t {t}: {noise} {have}");
        }
    }

    #[test]
    fn nothing_comes_of_nothing() {
        let text =
            Documents::new(vec![Document { parts: vec![Part::Text(b"a".to_vec())], stream: false }], "text");
        assert!(LinearDenoiser::fit(&text, 3).is_none());
        let fitted = LinearDenoiser::fit(&along_a_line(5), 3).unwrap();
        assert!(fitted.error(&text, 0..1, Objective::X0, 50.0, 1, Cancel(None)).unwrap().is_none());
    }
}
