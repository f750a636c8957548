//! The forward process of diffusion: `x_t = a x_0 + b noise` and what the model should predict,
//! `c x_0 + d noise`.   Ho et al. 2020; Nichol & Dhariwal 2021; Salimans & Ho 2022; Liu et al. 2022
//!
//! The four coefficients of each image are data, so one op serves every schedule and objective.
use super::{lots, prelude::*};
use crate::random::{Purpose, Stream};

/// Where the noise comes from.
#[derive(Clone, Copy, Debug)]
pub enum Noise {
    /// Philox words: `seed` i32 `[2]` and `keys` i32 `[I, 3]`, the document (low and high word) of
    /// each image and its place among the document's images.
    Counter {
        /// Of the run.
        seed: Tensor,
        /// Of each image.
        keys: Tensor,
    },
    /// A tensor of the images' shape.
    Given(Tensor),
}

#[derive(Debug)]
struct QSample {
    to: DType,
    counter: bool,
}

impl Graph {
    /// `(x_t, target)` as `to` (f64 in an f64 graph), from images `x [I, ..]` and coefficients `(a, b, c, d)` `[I, 4]`.
    #[track_caller]
    pub fn q_sample(&mut self, x: Tensor, coefficients: Tensor, noise: Noise, to: DType) -> [Tensor; 2] {
        match noise {
            Noise::Counter { seed, keys } => {
                self.push(QSample { to, counter: true }, &[x, coefficients, seed, keys])
            }
            Noise::Given(z) => self.push(QSample { to, counter: false }, &[x, coefficients, z]),
        }
    }
}

/// The stream of one image, and its first element in it.
pub(super) fn image_stream(seed: &[i32], key: &[i32], purpose: Purpose, numel: usize) -> (Stream, u32) {
    let first = (key[2].max(0) as usize * numel.next_multiple_of(4)) as u32;
    (Stream::from_words([seed[0], seed[1]], purpose, [key[0], key[1]]), first)
}

impl Op for QSample {
    fn name(&self) -> &'static str {
        "q_sample"
    }

    fn infer(&self, ins: &[Spec]) -> Result<Vec<Spec>, String> {
        let (x, c) = (ins[0], ins[1]);
        floats(&[x, c])?;
        let images = x.shape.dims().first().copied().unwrap_or(0);
        if c.shape.dims() != [images, 4] {
            return Err(format!("{c:?} is not four coefficients for each of {images} images"));
        }
        if self.counter {
            integers(ins[2])?;
            integers(ins[3])?;
            if ins[2].shape.dims() != [2] || ins[3].shape.dims() != [images, 3] {
                return Err(format!("seed {:?} is not [2] or keys {:?} not [{images}, 3]", ins[2], ins[3]));
            }
        } else if ins[2].shape != x.shape {
            return Err(format!("noise {:?} is not of the images' shape {x:?}", ins[2]));
        }
        let to = if x.dtype == DType::F64 { DType::F64 } else { self.to };
        Ok(vec![Spec::new(x.shape, to); 2])
    }

    fn workspace(&self, ins: &[Spec], _: &[Spec], threads: usize) -> Vec<usize> {
        let images = ins[1].shape.rows();
        let noise = ins[0].shape.numel() / images.max(1) * size_of::<f32>();
        vec![noise; if self.counter { threads.min(images) } else { 0 }]
    }

    fn eval(&self, ins: &[In<'_>], outs: &mut [Out<'_>], cpu: &Cpu) {
        let [noised, target] = outs else { return };
        real!(noised, T => {
            let images = ins[1].shape.rows();
            let numel = ins[0].shape.numel() / images.max(1);
            let (x, c) = (T::read(&ins[0]), T::read(&ins[1]));
            let (noised, target) = (T::write(noised), T::write(target));
            let each = noised.par_chunks_mut(numel).zip(target.par_chunks_mut(numel)).enumerate();
            each.for_each(|(i, (noised, target))| {
                let (x, c) = (&x[i * numel..][..numel], &c[i * 4..][..4]);
                let mut mix = |z: &dyn Fn(usize) -> T| {
                    for e in 0..numel {
                        noised[e] = c[0] * x[e] + c[1] * z(e);
                        target[e] = c[2] * x[e] + c[3] * z(e);
                    }
                };
                if self.counter {
                    let (stream, first) =
                        image_stream(ins[2].i32(), &ins[3].i32()[3 * i..], Purpose::Noise, numel);
                    cpu.scratch(numel, |z: &mut [f32]| {
                        stream.fill_normal(first, z);
                        mix(&|e| T::of(f64::from(z[e])));
                    });
                } else {
                    let z = &T::read(&ins[2])[i * numel..][..numel];
                    mix(&|e| z[e]);
                }
            });
        });
    }

    fn kernels(&self, ins: &[Spec], outs: &[Spec], on: &Target) -> Result<Kernels, String> {
        let (x, y) = (ins[0], outs[0]);
        let suffix = lots::suffix(x.dtype, y.dtype)?;
        if x.dtype == DType::Bf16 && y.dtype == DType::F32 {
            return Err("no kernel makes f32 of bf16 images; cast them".into());
        }
        if ins[1].dtype != DType::F32 || !(self.counter || ins[2].dtype == x.dtype) {
            return Err(format!("coefficients should be f32 and noise {}; cast them", x.dtype.name()));
        }
        let images = ins[1].shape.rows();
        let numel = size(x.shape.numel() / images.max(1))?;
        let (variant, lot) = match self.counter {
            true => ("counter", 4),
            false => ("given", lots::lot(&[x.dtype, y.dtype])),
        };
        let operands = [Arg::output(0), Arg::output(1)].into_iter().chain((0..ins.len()).map(Arg::input));
        let args = operands.chain([Arg::U32(numel)]).collect();
        let grid = lots::images(images, numel, lot, on)?;
        let entry = format!("q_sample_fwd_{variant}_{suffix}");
        Ok(lots::single(Launch::kernel(entry, grid, lots::THREADS, 0, args)))
    }

    fn cost(&self, ins: &[Spec], outs: &[Spec]) -> Cost {
        Cost { flops: 6 * outs[0].shape.numel() as u64, bytes: traffic(ins, outs) }
    }

    fn adjoint(&self, _: &mut Graph, n: &Node, _: &[Option<Tensor>]) -> crate::Result<Vec<Grad>> {
        let mut grads = vec![Grad::Stop("images are data"), Grad::Stop("noise levels are data")];
        grads.resize(n.ins.len(), if self.counter { Grad::Integer } else { Grad::Stop("noise is data") });
        Ok(grads)
    }
}

pub(super) fn cases() -> Vec<Case> {
    let coefficients = [0.8, 0.6, -0.6, 0.8, 1.0, 0.0, 0.0, 1.0, 0.1, 0.9, 1.0, -1.0];
    // Results as the storage type; images, too, or f32.
    let counter = |images: usize, numel: usize, single: bool, keys: &[i32]| {
        let build = move |g: &mut Graph, x: &[Tensor]| {
            let dtype = g.spec(x[4]).dtype;
            g.q_sample(x[0], x[1], Noise::Counter { seed: x[2], keys: x[3] }, dtype).to_vec()
        };
        let case = Case::new("q_sample", format!("counter, {images} of {numel}, f32 {single}"), build);
        shaped(case, [images, numel], single)
            .single([images, 4], Fill::Values(coefficients.to_vec()))
            .ints([2], &[7, -1])
            .ints([images, 3], keys)
            .normal([1])
            .without_gradient()
    };
    let given = |images: usize, numel: usize, single: bool| {
        let build = move |g: &mut Graph, x: &[Tensor]| {
            let dtype = g.spec(x[3]).dtype;
            g.q_sample(x[0], x[1], Noise::Given(x[2]), dtype).to_vec()
        };
        let case = Case::new("q_sample", format!("given, {images} of {numel}, f32 {single}"), build);
        let case =
            shaped(case, [images, numel], single).single([images, 4], Fill::Values(coefficients.to_vec()));
        shaped(case, [images, numel], single).normal([1]).without_gradient()
    };
    let keys = [0, 0, 0, 1, 0, 0, 1, 0, 1, -7, 3, 2, i32::MIN, -1, 90_001, 5, 5, -3];
    let mut cases = vec![counter(3, 75, false, &keys), given(3, 7, false)];
    // Values of an image that are no multiple of a lot, that fill a block, and that take several.
    let sizes = [
        (1, 1),
        (2, 3),
        (5, 4),
        (7, 8),
        (4, 31),
        (3, 64),
        (11, 100),
        (2, 1023),
        (6, 1024),
        (3, 4099),
        (61, 192),
        (13, 257),
        (17, 2),
    ];
    for (images, numel) in sizes.into_iter().chain([(2, 12_288), (601, 64), (1, 300_007)]) {
        for single in [false, true] {
            cases.push(counter(images, numel, single, &keys).large());
            cases.push(given(images, numel, single).large());
        }
    }
    cases
}

/// Adds an input of normal numbers, in f32 or in the storage type.
fn shaped(case: Case, shape: [usize; 2], single: bool) -> Case {
    if single { case.single(shape, Fill::Normal(1.0)) } else { case.normal(shape) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        device::{CpuDevice, CpuOptions, Device, Place},
        plan::Plan,
    };

    /// Noise of the images of one document does not overlap, and does not depend on the batch.
    #[test]
    fn noise_is_a_function_of_its_key() {
        let noise = |keys: &[i32]| {
            let images = keys.len() / 3;
            let mut g = Graph::new();
            let x = g.input("x", [images, 7], DType::F32);
            let c = g.input("c", [images, 4], DType::F32);
            let seed = g.input("seed", [2], DType::I32);
            let key = g.input("keys", [images, 3], DType::I32);
            let [noised, _] = g.q_sample(x, c, Noise::Counter { seed, keys: key }, DType::F32);
            g.output("noised", noised);
            let mut device = CpuDevice::new(CpuOptions::default()).unwrap();
            let plan = device.open(Plan::new(&g).unwrap().into()).unwrap();
            let c: Vec<f32> = [0.0, 1.0, 0.0, 0.0].repeat(images);
            device.write(Place::Input(plan, "c"), View::F32(&c)).unwrap();
            device.write(Place::Input(plan, "seed"), View::I32(&[3, 4])).unwrap();
            device.write(Place::Input(plan, "keys"), View::I32(keys)).unwrap();
            device.run(plan).unwrap();
            device.fetch(Place::Output(plan, "noised")).unwrap().to_f64()
        };
        let three = noise(&[5, 0, 0, 5, 0, 1, 6, 0, 0]);
        assert_eq!(three[7..14], noise(&[5, 0, 1])[..]);
        assert_eq!(three[14..], noise(&[6, 0, 0])[..]);
        let mut seen = three.clone();
        seen.sort_by(f64::total_cmp);
        seen.dedup();
        assert_eq!(seen.len(), 21);
    }
}
