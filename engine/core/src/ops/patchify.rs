//! Pictures cut into patches of `k x k` positions, and put together again.   Dosovitskiy et al. 2021
//!
//! Element `(dy k + dx) Ch + c` of patch `(py, px)` is `image[py k + dy, px k + dx, c]`; patches follow
//! one another in raster order, each padded with zeros to a multiple of 8 values.
use super::{lots, prelude::*};

#[derive(Debug)]
struct Patchify {
    k: usize,
}

#[derive(Debug)]
struct Unpatchify {
    images: usize,
    grid: Grid,
}

impl Graph {
    /// `images [I, S, S, Ch]` as patches `[I P, Z]`: `P = (S / k)^2` patches of an image, and
    /// `Z = ` [`patch_width`]. `k` is 1, 2, 4 or 8 and divides S.
    #[track_caller]
    pub fn patchify(&mut self, images: Tensor, k: usize) -> Tensor {
        self.push::<1>(Patchify { k }, &[images])[0]
    }

    /// The `images` pictures `[I, size, size, channels]` that [`Graph::patchify`] cut into `patches`;
    /// their padding is not read.
    #[track_caller]
    pub fn unpatchify(
        &mut self,
        patches: Tensor,
        images: usize,
        size: usize,
        channels: usize,
        k: usize,
    ) -> Tensor {
        self.push::<1>(Unpatchify { images, grid: Grid { size, channels, k } }, &[patches])[0]
    }
}

/// Z: values of a patch of `k x k` positions with `channels` channels, padded to a multiple of 8.
pub fn patch_width(channels: usize, k: usize) -> usize {
    (k * k * channels).next_multiple_of(8)
}

/// How a picture is cut.
#[derive(Clone, Copy, Debug)]
struct Grid {
    size: usize,
    channels: usize,
    k: usize,
}

impl Grid {
    fn check(&self) -> Result<(), String> {
        let Grid { size, channels, k } = *self;
        if !matches!(k, 1 | 2 | 4 | 8) {
            return Err(format!("patches of {k} x {k} positions; use 1, 2, 4 or 8"));
        }
        if !size.is_multiple_of(k) || size * channels == 0 {
            return Err(format!("{size} x {size} positions of {channels} channels are no {k} x {k} patches"));
        }
        Ok(())
    }

    /// P: patches of one picture.
    fn patches(&self) -> usize {
        (self.size / self.k).pow(2)
    }

    /// Values of one picture.
    fn values(&self) -> usize {
        self.size * self.size * self.channels
    }

    /// Where the `k` runs of patch `p` begin in its picture, each as long as [`Grid::run`].
    fn runs(&self, p: usize) -> impl Iterator<Item = usize> {
        let Grid { size, channels, k } = *self;
        let (py, px) = (p / (size / k), p % (size / k));
        (0..k).map(move |dy| ((py * k + dy) * size + px * k) * channels)
    }

    /// Values of one row of a patch: they lie side by side in the picture.
    fn run(&self) -> usize {
        self.k * self.channels
    }

    /// The pass over the values of all patches.
    fn launch(&self, pass: &str, patches: Spec, on: &Target) -> Result<Kernels, String> {
        let entry = format!("{pass}_{}", lots::suffix(patches.dtype, patches.dtype)?);
        let count = size(patches.shape.numel())?;
        let sizes = [count, size(self.size)?, size(self.channels)?, size(self.k)?].map(Arg::U32);
        let args = [Arg::output(0), Arg::input(0)].into_iter().chain(sizes).collect();
        let lot = lots::lot(&[patches.dtype]);
        let lot = if size(self.run())?.is_multiple_of(lot) { lot } else { 1 };
        Ok(lots::single(lots::over(entry, count, lot, on, args)))
    }

    fn cut<T: Real>(&self, images: &[T], patches: &mut [T]) {
        let (width, run) = (patch_width(self.channels, self.k), self.run());
        let pictures = patches.par_chunks_mut(self.patches() * width).zip(images.par_chunks(self.values()));
        pictures.for_each(|(patches, image)| {
            for (p, patch) in patches.chunks_mut(width).enumerate() {
                for (to, from) in patch.chunks_mut(run).zip(self.runs(p)) {
                    to.copy_from_slice(&image[from..][..run]);
                }
                patch[self.k * run..].fill(T::ZERO);
            }
        });
    }

    fn join<T: Real>(&self, patches: &[T], images: &mut [T]) {
        let (width, run) = (patch_width(self.channels, self.k), self.run());
        let pictures = images.par_chunks_mut(self.values()).zip(patches.par_chunks(self.patches() * width));
        pictures.for_each(|(image, patches)| {
            for (p, patch) in patches.chunks(width).enumerate() {
                for (from, to) in patch.chunks(run).zip(self.runs(p)) {
                    image[to..][..run].copy_from_slice(from);
                }
            }
        });
    }
}

impl Op for Patchify {
    fn name(&self) -> &'static str {
        "patchify"
    }

    fn infer(&self, ins: &[Spec]) -> Result<Vec<Spec>, String> {
        let [images] = operands(ins)?;
        floats(ins)?;
        let (count, grid) = self.cut_of(images.shape)?;
        let width = patch_width(grid.channels, grid.k);
        Ok(vec![Spec::new([count * grid.patches(), width], images.dtype)])
    }

    fn eval(&self, ins: &[In<'_>], outs: &mut [Out<'_>], _: &Cpu) {
        let Ok((_, grid)) = self.cut_of(ins[0].shape) else { return };
        real!(outs[0], T => grid.cut(T::read(&ins[0]), T::write(&mut outs[0])));
    }

    fn kernels(&self, ins: &[Spec], outs: &[Spec], on: &Target) -> Result<Kernels, String> {
        self.cut_of(ins[0].shape)?.1.launch("patchify_fwd", outs[0], on)
    }

    fn adjoint(&self, g: &mut Graph, n: &Node, d: &[Option<Tensor>]) -> crate::Result<Vec<Grad>> {
        let (Some(dy), Ok((images, grid))) = (d[0], self.cut_of(g.spec(n.ins[0]).shape)) else {
            return Ok(vec![Grad::Stop("no gradient arrived")]);
        };
        Ok(vec![Grad::To(g.push::<1>(Unpatchify { images, grid }, &[dy])[0])])
    }
}

impl Patchify {
    /// How many pictures there are, and how each is cut.
    fn cut_of(&self, images: Shape) -> Result<(usize, Grid), String> {
        let &[count, size, width, channels] = images.dims() else {
            return Err(format!("{images:?} should be [I, S, S, Ch]"));
        };
        let grid = Grid { size, channels, k: self.k };
        if width != size {
            return Err(format!("pictures of {images:?} are not square"));
        }
        grid.check().map(|()| (count, grid))
    }
}

impl Op for Unpatchify {
    fn name(&self) -> &'static str {
        "unpatchify"
    }

    fn infer(&self, ins: &[Spec]) -> Result<Vec<Spec>, String> {
        let [patches] = operands(ins)?;
        floats(ins)?;
        self.grid.check()?;
        let Grid { size, channels, k } = self.grid;
        let want = Shape::from([self.images * self.grid.patches(), patch_width(channels, k)]);
        if patches.shape != want {
            return Err(format!("{patches:?} should be {want:?}"));
        }
        Ok(vec![Spec::new([self.images, size, size, channels], patches.dtype)])
    }

    fn eval(&self, ins: &[In<'_>], outs: &mut [Out<'_>], _: &Cpu) {
        real!(outs[0], T => self.grid.join(T::read(&ins[0]), T::write(&mut outs[0])));
    }

    fn kernels(&self, ins: &[Spec], _: &[Spec], on: &Target) -> Result<Kernels, String> {
        self.grid.launch("unpatchify_fwd", ins[0], on)
    }

    fn adjoint(&self, g: &mut Graph, _: &Node, d: &[Option<Tensor>]) -> crate::Result<Vec<Grad>> {
        let stop = Grad::Stop("no gradient arrived");
        Ok(vec![d[0].map_or(stop, |dy| Grad::To(g.patchify(dy, self.grid.k)))])
    }
}

pub(super) fn cases() -> Vec<Case> {
    let patchify = |name: String, images: usize, size: usize, channels: usize, k: usize| {
        Case::new("patchify", name, move |g, x| vec![g.patchify(x[0], k)])
            .normal([images, size, size, channels])
    };
    let unpatchify = |name: String, images: usize, size: usize, channels: usize, k: usize| {
        Case::new("unpatchify", name, move |g, x| vec![g.unpatchify(x[0], images, size, channels, k)])
            .normal([images * (size / k).pow(2), patch_width(channels, k)])
    };
    let small = [
        patchify("single positions".into(), 1, 3, 1, 1),
        patchify("2 x 2, padded".into(), 3, 6, 3, 2),
        patchify("8 x 8".into(), 2, 24, 5, 8),
        unpatchify("single positions".into(), 1, 3, 1, 1),
        unpatchify("2 x 2, padded".into(), 3, 6, 3, 2),
        unpatchify("4 x 4".into(), 2, 20, 4, 4),
    ];
    // Pictures, patches a side, channels: runs of whole vectors and of others, with padding and without.
    let shapes = [
        (1, 1, 1),
        (2, 3, 2),
        (1, 5, 3),
        (3, 2, 4),
        (2, 7, 5),
        (1, 4, 8),
        (5, 3, 16),
        (2, 11, 7),
        (7, 13, 4),
        // Runs of odd numbers of vectors, and two of two neighbours that are more than a warp moves at once.
        (2, 4, 3),
        (5, 6, 1),
        (1, 2, 9),
    ];
    let large = shapes.into_iter().flat_map(|(images, side, channels)| {
        [1, 2, 4, 8].into_iter().flat_map(move |k| {
            let name = format!("{images} of {side}x{side} patches of {k}x{k}, {channels} channels");
            let joined = unpatchify(name.clone(), images, side * k, channels, k);
            [patchify(name, images, side * k, channels, k).large(), joined.large()]
        })
    });
    small.into_iter().chain(large).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        cases::forward,
        device::{CpuDevice, CpuOptions},
        tensor::Host,
    };

    fn run(case: &Case) -> Vec<f64> {
        let device = CpuDevice::new(CpuOptions { threads: 2, poison: true }).unwrap();
        forward(case, DType::F32, device).unwrap().iter().flat_map(Host::to_f64).collect()
    }

    #[test]
    fn patches_follow_in_raster_order_and_come_back() {
        let numbers = || Fill::Values((1..=32).map(f64::from).collect());
        let patches = Case::new("patchify", "", |g, x| vec![g.patchify(x[0], 2)]);
        let second = [3.0, 4.0, 7.0, 8.0, 0.0, 0.0, 0.0, 0.0];
        assert_eq!(run(&patches.floats([2, 4, 4, 1], numbers()))[8..16], second);
        let there_and_back = Case::new("patchify", "", |g, x| {
            let patches = g.patchify(x[0], 4);
            vec![g.unpatchify(patches, 1, 4, 2, 4)]
        });
        let want: Vec<f64> = (1..=32).map(f64::from).collect();
        assert_eq!(run(&there_and_back.floats([1, 4, 4, 2], numbers())), want);
    }

    #[test]
    fn what_cannot_be_cut_is_refused() {
        for (shape, k, why) in [
            ([1, 6, 6, 1], 3, "use 1, 2, 4 or 8"),
            ([1, 6, 6, 1], 4, "are no 4 x 4 patches"),
            ([1, 8, 4, 1], 4, "not square"),
        ] {
            let mut g = Graph::new();
            let x = g.input("x", shape, DType::F32);
            g.patchify(x, k);
            let error = g.check().unwrap_err().to_string();
            assert!(error.contains(why), "{error}");
        }
    }
}
