//! Noise schedules, objectives and samplers, as coefficients.
//!
//! A noise level is a number `t` of schedule steps: 0 is the clean image, [`STEPS`] all but noise.
use crate::config::Objective;
use serde::{Deserialize, Serialize};
use std::f64::consts::FRAC_PI_2;
use transfusion_core::ops::SamplerStep;

/// Steps T of the training schedule.
pub const STEPS: f64 = 1000.0;

/// `(a, b)` of `x_t = a x_0 + b noise`.
fn mix(objective: Objective, t: f64) -> (f64, f64) {
    if objective == Objective::Flow {
        return (1.0 - t / STEPS, t / STEPS);
    }
    let alpha_bar = alpha_bar(t);
    (alpha_bar.sqrt(), (1.0 - alpha_bar).sqrt())
}

/// The cosine schedule with offset 0.008, betas clipped at 0.999 (Nichol & Dhariwal 2021): the clip
/// is the maximum, exact at whole steps.
pub fn alpha_bar(t: f64) -> f64 {
    let f = |t: f64| ((t / STEPS + 0.008) / 1.008 * FRAC_PI_2).cos().powi(2);
    f(t).max(0.001 * f(STEPS - 1.0)) / f(0.0)
}

/// `(a, b, c, d)`: `x_t = a x_0 + b noise`, the model predicts `c x_0 + d noise`.
pub fn coefficients(objective: Objective, t: f32) -> [f32; 4] {
    let (a, b) = mix(objective, f64::from(t));
    let (c, d) = match objective {
        Objective::Epsilon => (0.0, 1.0),
        Objective::X0 => (1.0, 0.0),
        Objective::V => (-b, a),
        Objective::Flow => (-1.0, 1.0),
    };
    [a, b, c, d].map(|x| x as f32)
}

/// How an image is denoised.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Sampler {
    /// Ancestral sampling with the posterior variance (Ho et al. 2020).
    Ddpm,
    /// Deterministic (Song et al. 2021); on a flow it is Euler's method.
    Ddim,
    /// Euler's method, for flows.
    Euler,
    /// Heun's method, for flows: two predictions a step.
    Heun,
}

impl Sampler {
    /// Every sampler by its name.
    pub const ALL: [(&str, Sampler); 4] = [
        ("ddpm", Sampler::Ddpm),
        ("ddim", Sampler::Ddim),
        ("euler", Sampler::Euler),
        ("heun", Sampler::Heun),
    ];

    /// Whether it can be used with a model of this objective.
    pub fn serves(self, objective: Objective) -> bool {
        match self {
            Sampler::Ddim => true,
            Sampler::Ddpm => objective != Objective::Flow,
            Sampler::Euler | Sampler::Heun => objective == Objective::Flow,
        }
    }
}

/// One prediction of the model while sampling: at which noise level, and what follows.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Evaluation {
    /// Noise level that the model is told.
    pub t: f32,
    /// What is done with its prediction.
    pub step: SamplerStep,
}

/// The predictions that a sampler asks for, from noise level `start` to a clean image, in `steps` steps
/// with guidance `guidance`; the implied clean image is clipped to plus or minus `clip`.
pub fn evaluations(
    sampler: Sampler,
    objective: Objective,
    steps: usize,
    guidance: f32,
    clip: f32,
    start: f32,
) -> Vec<Evaluation> {
    let steps = steps.max(1);
    let level = |i: usize| f64::from(start) * (steps - i) as f64 / steps as f64;
    let mut out = Vec::new();
    for i in 0..steps {
        let (t, s) = (level(i), level(i + 1));
        let at = |t: f64, next: [f64; 5], memory: [f64; 3]| Evaluation {
            t: t as f32,
            step: step(objective, t, next, memory, guidance, clip),
        };
        match sampler {
            Sampler::Ddim => {
                let (a, b) = mix(objective, s);
                out.push(at(t, [a, b, 0.0, 0.0, 0.0], [0.0; 3]));
            }
            Sampler::Ddpm => out.push(at(t, ancestral(t, s), [0.0; 3])),
            Sampler::Euler => {
                let h = (s - t) / STEPS;
                out.push(at(t, [-h, h, 1.0, 0.0, 0.0], [0.0; 3]));
            }
            // The slope at noise level 0 is not defined by a prediction of noise: end with Euler.
            Sampler::Heun if s == 0.0 => {
                let h = (s - t) / STEPS;
                out.push(at(t, [-h, h, 1.0, 0.0, 0.0], [0.0; 3]));
            }
            Sampler::Heun => {
                let h = (s - t) / STEPS;
                out.push(at(t, [-h, h, 1.0, 0.0, 0.0], [-h / 2.0, h / 2.0, 1.0]));
                out.push(at(s, [-h / 2.0, h / 2.0, 0.0, 0.0, 1.0], [0.0; 3]));
            }
        }
    }
    out
}

/// Mean and deviation of `x_s` given `x_t` and `x_0`, as coefficients of `x0, e, x, z, m`.
fn ancestral(t: f64, s: f64) -> [f64; 5] {
    let (bar_t, bar_s) = (alpha_bar(t), alpha_bar(s));
    let alpha = bar_t / bar_s;
    let c0 = bar_s.sqrt() * (1.0 - alpha) / (1.0 - bar_t);
    let cx = alpha.sqrt() * (1.0 - bar_s) / (1.0 - bar_t);
    let sigma = ((1.0 - bar_s) / (1.0 - bar_t) * (1.0 - alpha)).sqrt();
    [c0, 0.0, cx, sigma, 0.0]
}

fn step(
    objective: Objective,
    t: f64,
    next: [f64; 5],
    memory: [f64; 3],
    guidance: f32,
    clip: f32,
) -> SamplerStep {
    let (a, b) = mix(objective, t);
    // x0 = kx x + kp p.
    let (kx, kp) = match objective {
        Objective::Epsilon => (1.0 / a, -b / a),
        Objective::X0 => (0.0, 1.0),
        Objective::V => (a, -b),
        Objective::Flow => (1.0, -t / STEPS),
    };
    SamplerStep {
        kx: kx as f32,
        kp: kp as f32,
        a: a as f32,
        b: b.max(1e-6) as f32,
        clip,
        guidance,
        next: next.map(|x| x as f32),
        memory: memory.map(|x| x as f32),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_step_yields_the_clean_image() {
        for objective in [Objective::Epsilon, Objective::X0, Objective::V, Objective::Flow] {
            for (_, sampler) in Sampler::ALL.into_iter().filter(|(_, s)| s.serves(objective)) {
                let all = evaluations(sampler, objective, 7, 1.0, 10.0, 1000.0);
                let s = all.last().unwrap().step;
                // Apply it to x = a x0 + b e with a perfect prediction.
                let (x0, e) = (0.3, -0.8);
                let t = all.last().unwrap().t;
                let [a, b, c, d] = coefficients(objective, t);
                let x = a * x0 + b * e;
                let p = c * x0 + d * e;
                let have0 = s.kx * x + s.kp * p;
                let noise = (x - s.a * have0) / s.b;
                let next = s.next[0] * have0 + s.next[1] * noise + s.next[2] * x;
                assert!((next - x0).abs() < 1e-3, "{sampler:?} {objective:?}: {next}");
                assert_eq!(s.next[3], 0.0);
            }
        }
    }
}
