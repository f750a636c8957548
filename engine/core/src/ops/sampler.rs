//! One step of the reverse process, with classifier-free guidance.   Ho & Salimans 2022
//!
//! Every sampler of the family is one linear form, so its coefficients are data:
//!   prediction  p = u + guidance (c - u)
//!   clean image x0 = clip(kx x + kp p),  noise e = (x - a x0) / b
//!   next        x' = c0 x0 + c1 e + c2 x + c3 z + c4 m
//!   memory      m' = m0 x0 + m1 e + m2 x
//! DDIM (Song et al. 2021) uses c0 and c1, ancestral DDPM (Ho et al. 2020) c0, c2 and c3, Euler and
//! Heun on a flow (Liu et al. 2022) c0, c1, c2; the memory carries Heun's first slope.
use super::{prelude::*, q_sample::image_stream};
use crate::random::Purpose;

/// The coefficients of one image's step; see the [module](self).
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[expect(missing_docs, reason = "the formula above names them")]
pub struct SamplerStep {
    pub kx: f32,
    pub kp: f32,
    pub a: f32,
    pub b: f32,
    /// The clean image is clipped to plus or minus this.
    pub clip: f32,
    pub guidance: f32,
    pub next: [f32; 5],
    pub memory: [f32; 3],
}

impl SamplerStep {
    /// Numbers in a row of the coefficient tensor.
    pub const WIDTH: usize = 14;

    /// As a row of the coefficient tensor.
    pub fn row(&self) -> [f32; Self::WIDTH] {
        let [c0, c1, c2, c3, c4] = self.next;
        let [m0, m1, m2] = self.memory;
        [self.kx, self.kp, self.a, self.b, self.clip, self.guidance, c0, c1, c2, c3, c4, m0, m1, m2]
    }
}

#[derive(Debug)]
struct SamplerUpdate;

/// What a sampler step reads and writes.
#[derive(Clone, Copy, Debug)]
pub struct SamplerInputs {
    /// Images being denoised, `[I, ..]`; replaced.
    pub x: Tensor,
    /// Memory of multi-stage samplers, like `x`; replaced.
    pub memory: Tensor,
    /// Predictions: `[I, ..]`, or `[2 I, ..]` with those without the condition last.
    pub prediction: Tensor,
    /// `[I, 14]`, rows of [`SamplerStep`].
    pub steps: Tensor,
    /// i32 `[2]`.
    pub seed: Tensor,
    /// i32 `[I, 3]`: the image (low and high word) and the step, which key its noise.
    pub keys: Tensor,
}

impl Graph {
    /// The next `(x, memory)`.
    #[track_caller]
    pub fn sampler_update(&mut self, s: SamplerInputs) -> [Tensor; 2] {
        self.push(SamplerUpdate, &[s.x, s.memory, s.prediction, s.steps, s.seed, s.keys])
    }
}

/// Threads of a block, elements that a thread takes at once, and blocks that an SM holds.
const THREADS: u32 = 256;
const SPAN: u32 = 4;
const BLOCKS: u32 = 4;
/// The second extent of a grid.
const MOST_IMAGES: u32 = 65_535;

impl Op for SamplerUpdate {
    fn name(&self) -> &'static str {
        "sampler_update"
    }

    fn infer(&self, ins: &[Spec]) -> Result<Vec<Spec>, String> {
        let [x, memory, p, steps, seed, keys] = operands(ins)?;
        floats(&ins[..4])?;
        integers(seed)?;
        integers(keys)?;
        let images = x.shape.dims().first().copied().unwrap_or(0);
        let ratio = p.shape.numel() / x.shape.numel().max(1);
        if memory != x || ratio * x.shape.numel() != p.shape.numel() || !(1..=2).contains(&ratio) {
            return Err(format!("memory {memory:?} or predictions {p:?} do not fit images {x:?}"));
        }
        if steps.shape.dims() != [images, SamplerStep::WIDTH] || keys.shape.dims() != [images, 3] {
            return Err(format!("steps {steps:?} or keys {keys:?} do not fit {images} images"));
        }
        if seed.shape.dims() != [2] { Err(format!("seed {seed:?} is not [2]")) } else { Ok(vec![x; 2]) }
    }

    fn workspace(&self, ins: &[Spec], _: &[Spec], threads: usize) -> Vec<usize> {
        let images = ins[5].shape.rows();
        vec![ins[0].shape.numel() / images.max(1) * size_of::<f32>(); threads.min(images)]
    }

    fn eval(&self, ins: &[In<'_>], outs: &mut [Out<'_>], cpu: &Cpu) {
        let [x, memory] = outs else { return };
        real!(x, T => {
            let images = ins[5].shape.rows();
            let numel = x.shape.numel() / images.max(1);
            let (p, steps) = (T::read(&ins[2]), T::read(&ins[3]));
            let (x, memory) = (T::write(x), T::write(memory));
            let guided = p.len() > x.len();
            let each = x.par_chunks_mut(numel).zip(memory.par_chunks_mut(numel)).enumerate();
            each.for_each(|(i, (x, m))| cpu.scratch(numel, |z: &mut [f32]| {
                let s = &steps[i * SamplerStep::WIDTH..][..SamplerStep::WIDTH];
                let (stream, first) = image_stream(ins[4].i32(), &ins[5].i32()[3 * i..], Purpose::Sampler, numel);
                if s[9] == T::ZERO {
                    z.fill(0.0);
                } else {
                    stream.fill_normal(first, z);
                }
                let with = &p[i * numel..][..numel];
                let without = if guided { &p[(images + i) * numel..][..numel] } else { with };
                for e in 0..numel {
                    let p = without[e] + s[5] * (with[e] - without[e]);
                    let p = if guided { p } else { with[e] };
                    let x0 = (s[0] * x[e] + s[1] * p).min(s[4]).max(-s[4]);
                    let noise = (x[e] - s[2] * x0) / s[3];
                    let z = T::of(f64::from(z[e]));
                    let next = s[6] * x0 + s[7] * noise + s[8] * x[e] + s[9] * z + s[10] * m[e];
                    m[e] = s[11] * x0 + s[12] * noise + s[13] * x[e];
                    x[e] = next;
                }
            }));
        });
    }

    fn kernels(&self, ins: &[Spec], _: &[Spec], on: &Target) -> Result<Kernels, String> {
        if let Some(s) = ins[..4].iter().find(|s| s.dtype != DType::F32) {
            return Err(format!("pictures are sampled in f32, not {s:?}; cast it"));
        }
        let images = ins[5].shape.rows();
        let numel = ins[0].shape.numel() / images.max(1);
        let guided = ins[2].shape.numel() > ins[0].shape.numel();
        let [images, numel] = [size(images)?, size(numel)?];
        if images > MOST_IMAGES {
            return Err(format!(
                "{images} images are more than the kernel's {MOST_IMAGES}; sample fewer at once"
            ));
        }
        let share = (on.sms * BLOCKS).div_ceil(images.max(1));
        let args = (0..2).map(Arg::output).chain((2..6).map(Arg::input));
        let args = args.chain([images, numel, guided.into()].map(Arg::U32)).collect();
        let grid = [numel.div_ceil(THREADS * SPAN).min(share), images, 1];
        let launch = Launch::kernel("sampler_update_f32", grid, THREADS, 0, args);
        Ok(Kernels { scratch: vec![], launches: vec![launch] })
    }

    fn cost(&self, ins: &[Spec], outs: &[Spec]) -> Cost {
        Cost { flops: 24 * outs[0].shape.numel() as u64, bytes: traffic(ins, outs) }
    }

    fn memory(&self, out: usize) -> Memory {
        Memory::InPlace { input: out }
    }
}

pub(super) fn cases() -> Vec<Case> {
    let full = SamplerStep {
        kx: 1.2,
        kp: -0.7,
        a: 0.8,
        b: 0.6,
        clip: 1.0,
        guidance: 3.0,
        next: [0.5, 0.4, 0.3, 0.2, 0.1],
        memory: [0.3, 0.2, 0.1],
    };
    let quiet = SamplerStep { next: [0.5, 0.4, 0.0, 0.0, 0.0], ..full };
    // What the samplers use: DDIM, ancestral DDPM, and the two stages of Heun.
    let ddim = SamplerStep { clip: 1e30, next: [0.9, 0.3, 0.0, 0.0, 0.0], memory: [0.0; 3], ..full };
    let ddpm = SamplerStep { guidance: 1.0, next: [0.2, 0.0, 0.7, 0.3, 0.0], memory: [0.0; 3], ..full };
    let first = SamplerStep { next: [0.1, 0.1, 1.0, 0.0, 0.0], memory: [-1.0, 1.0, 0.0], ..full };
    let second = SamplerStep { next: [-0.1, 0.1, 1.0, 0.0, 0.1], memory: [0.0; 3], ..full };
    let case = |name: String, shape: Vec<usize>, guided: bool, steps: &[SamplerStep]| {
        let images = shape[0];
        let rows: Vec<f64> = steps.iter().flat_map(|s| s.row()).map(f64::from).collect();
        // Documents of more than 32 bits, a step below zero, and steps far along.
        let key = |i: usize| [i as i32, (i % 3) as i32, [5, 0, -1, 1000, 77_777][i % 5]];
        let keys: Vec<i32> = (0..images).flat_map(key).collect();
        let extents = |n: usize| match shape[..] {
            [_, h, c] => Shape::from([n, h, c]),
            [_, h, w, c] => Shape::from([n, h, w, c]),
            _ => Shape::from([n, 1]),
        };
        let predictions = if guided { 2 * images } else { images };
        Case::new("sampler_update", name, |g, x| {
            let [a, b] = g.sampler_update(SamplerInputs {
                x: x[0],
                memory: x[1],
                prediction: x[2],
                steps: x[3],
                seed: x[4],
                keys: x[5],
            });
            vec![a, b]
        })
        .single(extents(images), Fill::Normal(1.0))
        .single(extents(images), Fill::Normal(1.0))
        .single(extents(predictions), Fill::Normal(1.0))
        .single([images, SamplerStep::WIDTH], Fill::Values(rows))
        .ints([2], &[3, 4])
        .ints([images, 3], &keys)
        .without_gradient()
    };
    let mut cases = vec![
        case("plain".into(), vec![2, 7, 3], false, &[full, quiet]),
        case("guided".into(), vec![2, 7, 3], true, &[full, quiet]),
    ];
    // Every tail, whole vectors, more than a block takes, more images than rounds of the grid.
    let shapes: [&[usize]; 16] = [
        &[1, 1, 1],
        &[1, 1, 2],
        &[3, 1, 3],
        &[2, 2, 2],
        &[5, 1, 5],
        &[7, 3, 3],
        &[1, 11, 13],
        &[4, 8, 8, 3],
        &[3, 16, 16, 3],
        &[2, 17, 16, 4],
        &[1, 31, 33, 1],
        &[2, 32, 32, 3],
        &[1, 64, 61, 4],
        &[19, 2, 8],
        &[441, 1, 7],
        &[600, 2, 2],
    ];
    for shape in shapes {
        for guided in [false, true] {
            let name = format!("{shape:?}{}", if guided { ", guided" } else { "" });
            cases.push(case(name, shape.into(), guided, &[ddim, ddpm, first, second, full]).large());
        }
    }
    cases.push(case("a long picture".into(), vec![1, 445_001, 1], false, &[ddpm]).large());
    cases
}
