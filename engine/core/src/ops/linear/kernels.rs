//! What `kernels-cu/linear.cu` and, for few rows, `linear_few.cu` are launched with; on Hopper `linear_wgmma.cu`.
use super::super::prelude::*;
use super::{Activation, Linear, Rope};
use crate::launch::Geometry;

/// The part of a product that one block makes, and what is known of the kernels that make it.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Tile {
    /// Rows and columns, as entries spell them.
    name: &'static str,
    rows: u32,
    columns: u32,
    threads: u32,
    /// Dynamic shared memory, bytes.
    shared: u32,
    /// Depth of one pipeline stage.
    stage: u32,
    /// Whether there is a kernel for a part of the depth.
    splits: bool,
    /// Blocks with tiles one below the other that share a right factor. More than one: operands come as tensor maps,
    /// and a block makes one tile after another.
    cluster: u32,
    /// Multiply-adds per time, against the best of Ampere's on the same machine.
    rate: f64,
    /// Depth that passes while nothing is multiplied: at every tile, and once in a block.
    idle: [u32; 2],
}

/// Of Ampere and everything newer.
const TILES: [Tile; 3] = {
    let large = Tile {
        name: "128x256",
        rows: 128,
        columns: 256,
        threads: 256,
        shared: 96 << 10,
        stage: 32,
        splits: false,
        cluster: 1,
        rate: 1.0,
        idle: [64, 0],
    };
    let medium = Tile {
        name: "128x128",
        columns: 128,
        threads: 128,
        shared: 64 << 10,
        splits: true,
        rate: 0.9,
        ..large
    };
    let small = Tile { name: "64x64", rows: 64, columns: 64, shared: 32 << 10, rate: 0.5, ..medium };
    [large, medium, small]
};
/// The tiles that every pass has; the first lacks rare passes.
const COMMON: &[Tile] = TILES.split_at(1).1;
/// Of Hopper, for every pass. Rates count the bytes that a tile asks of the L2 cache for its multiply-adds; in the second
/// and third one warpgroup multiplies while the other finishes its tile. Set before anybody has timed them.
const HOPPER: [Tile; 3] = {
    let together = Tile {
        name: "wgmma_128x256",
        rows: 128,
        columns: 256,
        threads: 384,
        shared: 230_480,
        stage: BOX,
        splits: true,
        cluster: 2,
        rate: 1.7,
        idle: [192, 64],
    };
    let apart =
        Tile { name: "wgmma_128x192", columns: 192, shared: 230_496, rate: 1.57, idle: [0, 256], ..together };
    let few = Tile { name: "wgmma_64x128", rows: 64, columns: 128, shared: 230_544, rate: 1.0, ..apart };
    [together, apart, few]
};
impl Tile {
    /// A matrix of bf16, as this tile's kernels take it: on Hopper in boxes of so many rows.
    fn matrix(&self, of: &Arg, rows: u32, columns: u32, height: u32) -> Arg {
        let &Arg::Address(operand, offset) = of else { return of.clone() };
        if self.cluster == 1 {
            return of.clone();
        }
        let geometry = Geometry {
            offset,
            element: 2,
            extents: vec![columns.into(), rows.into()],
            strides: vec![u64::from(columns) * 2],
            tile: vec![BOX, height],
            swizzle: 128,
        };
        Arg::Map(operand, geometry)
    }

    /// A result, as kernels that let the copy engine store it take it.
    fn result(&self, of: &Arg, rows: u32, columns: u32) -> Arg {
        self.matrix(of, rows, columns, FINISHED)
    }
}

/// Rows that a warp of Hopper stores at once.
const FINISHED: u32 = 16;
/// Elements of a row that a tensor map copies at once: as many as its swizzle spans, 128 bytes.
const BOX: u32 = 64;
/// Most parts that the depth is split into, and the least depth of a part.
const PARTS: u32 = 16;
const PART_DEPTH: u32 = 128;
/// Bytes of dw that a block of the pass over the parts writes: 16 a thread.
const SUM_BYTES: u32 = 256 * 16;
/// What a byte moved and a launch cost, in multiply-adds of one SM: about 1.5 T/s of the one against
/// 4 TB/s and 2 us shared by all.
const BYTE_COST: f64 = 0.35;
const LAUNCH_COST: f64 = 3e6;

/// `n` without what is left over of whole clusters.
fn whole(n: u32, cluster: u32) -> u32 {
    n / cluster * cluster
}

/// `rows x columns`, summed over `depth`.
#[derive(Clone, Copy)]
struct Product {
    rows: u32,
    columns: u32,
    depth: u32,
}

impl Product {
    fn new(rows: usize, columns: usize, depth: usize) -> Result<Product, String> {
        Ok(Product { rows: size(rows)?, columns: size(columns)?, depth: size(depth)? })
    }

    /// Tiles, in whole clusters of them.
    fn tiles(&self, tile: &Tile) -> u32 {
        self.rows.div_ceil(tile.rows).next_multiple_of(tile.cluster) * self.columns.div_ceil(tile.columns)
    }

    /// The time of the busiest SM, in multiply-adds, with the depth in `parts`.
    fn time(&self, tile: &Tile, parts: u32, on: &Target) -> f64 {
        let rounds = f64::from((self.tiles(tile) * parts).div_ceil(whole(on.sms, tile.cluster)));
        let area = f64::from(tile.rows * tile.columns);
        // A stage is the least that a block works.
        let depth = self.depth.div_ceil(parts).next_multiple_of(tile.stage);
        let [each, once] = tile.idle;
        let sum = match parts {
            1 => 0.0,
            _ => {
                f64::from(parts) * f64::from(self.rows) * f64::from(self.columns) * 8.0 * BYTE_COST
                    + LAUNCH_COST
            }
        };
        (rounds * f64::from(depth + each) + f64::from(once)) * area / tile.rate + sum
    }

    /// The tile and the number of parts that take the least time.
    fn choose(
        &self,
        tiles: &'static [Tile],
        parts: u32,
        on: &Target,
    ) -> Result<(&'static Tile, u32), String> {
        let most = |tile: &Tile| match tile.splits {
            false => 1,
            true => parts.min(self.depth / PART_DEPTH).max(1),
        };
        // A tensor map is never empty.
        let hopper = if on.arch == Target::H200.arch && self.depth > 0 { &HOPPER[..] } else { &[] };
        let fits = |tile: &&Tile| tile.shared <= on.shared && tile.cluster <= on.sms;
        tiles
            .iter()
            .chain(hopper)
            .filter(fits)
            .flat_map(|tile| (1..=most(tile)).map(move |parts| (tile, parts)))
            .min_by(|a, b| self.time(a.0, a.1, on).total_cmp(&self.time(b.0, b.1, on)))
            .ok_or(format!(
                "{} has too little shared memory for matrix products; use the CPU device",
                on.name
            ))
    }

    /// The blocks that make all tiles of so many parts.
    fn grid(&self, tile: &Tile, parts: u32, on: &Target) -> [u32; 3] {
        match tile.cluster {
            1 => [self.tiles(tile), parts, 1],
            blocks => [(self.tiles(tile) * parts).min(whole(on.sms, blocks)), 1, 1],
        }
    }

    /// The left factor, as kernels of this tile take it: rows that run along the depth or across it.
    fn left(&self, of: &Arg, along: bool, tile: &Tile) -> Arg {
        self.factor(of, self.rows, along, tile, [tile.rows, tile.stage])
    }

    /// The right factor, likewise; every block of a cluster copies its share of a tile.
    fn right(&self, of: &Arg, along: bool, tile: &Tile) -> Arg {
        let share = [tile.columns, tile.stage].map(|n| n / tile.cluster);
        self.factor(of, self.columns, along, tile, share)
    }

    /// `height`: rows of a box, along the depth and across it.
    fn factor(&self, of: &Arg, vectors: u32, along: bool, tile: &Tile, height: [u32; 2]) -> Arg {
        match along {
            true => tile.matrix(of, vectors, self.depth, height[0]),
            false => tile.matrix(of, self.depth, vectors, height[1]),
        }
    }

    /// What makes all tiles of so many parts.
    fn launch(&self, entry: String, tile: &Tile, parts: u32, args: Vec<Arg>, on: &Target) -> Launch {
        let grid = self.grid(tile, parts, on);
        Launch::kernel(entry, grid, tile.threads, tile.shared, args).clustered(tile.cluster)
    }

    /// No launch where there is nothing to make.
    fn launches(&self, launches: Vec<Launch>) -> Vec<Launch> {
        if self.rows == 0 || self.columns == 0 { vec![] } else { launches }
    }
}

/// Refuses what the kernels cannot read.
pub(in crate::ops) fn check(operands: &[Spec], widths: &[usize]) -> Result<(), String> {
    if let Some(s) = operands.iter().find(|s| s.dtype != DType::Bf16) {
        return Err(format!("the tensor cores multiply bf16, not {s:?}; cast it, or use the CPU device"));
    }
    match widths.iter().find(|w| !w.is_multiple_of(8)) {
        Some(w) => Err(format!("a width of {w} is no multiple of 8; pad it, or use the CPU device")),
        None => Ok(()),
    }
}

/// What a product is made of, and what follows it.
struct Forward {
    y: Arg,
    x: Arg,
    w: Arg,
    /// The product before the activation, where there is one.
    pre: Option<Arg>,
    bias: Option<Arg>,
    residual: Option<Arg>,
    activation: Activation,
    /// The rotation of the result, its positions, and what it turns.
    rotary: Option<(Rope, Arg, Spec)>,
}

/// Numbers of rows that there are kernels for, which read the weight once and leave the tensor cores alone, and the
/// columns of their blocks.
const FEW: [u32; 4] = [1, 2, 4, 8];
const FEW_COLUMNS: u32 = 8;

impl Forward {
    fn launches(&self, product: Product, on: &Target) -> Result<Vec<Launch>, String> {
        // Operands that are not there are named all the same, and not read.
        let bias = self.bias.as_ref().unwrap_or(&self.w).clone();
        let residual = self.residual.as_ref().unwrap_or(&self.x).clone();
        let sizes = [product.rows, product.columns, product.depth].map(Arg::U32);
        let flags = [self.bias.is_some(), self.residual.is_some()].map(|has| Arg::U32(has.into()));
        let launch = match FEW.iter().find(|&&rows| product.rows <= rows) {
            Some(rows) => {
                let pre = self.pre.as_ref().unwrap_or(&self.y).clone();
                let activation = match self.activation {
                    Activation::None if self.rotary.is_some() => 3,
                    Activation::None => 0,
                    Activation::Silu => 1,
                    Activation::SwiGlu => 2,
                };
                let (positions, turning) = match &self.rotary {
                    None => (self.x.clone(), [Arg::U32(0), Arg::U32(0), Arg::U64(0)]),
                    Some((rope, positions, _)) => (positions.clone(), Self::turning(rope)?),
                };
                let operands =
                    [self.y.clone(), pre, self.x.clone(), self.w.clone(), bias, residual, positions];
                let args = operands.into_iter().chain(sizes).chain([Arg::U32(activation)]).chain(flags);
                let args = args.chain(turning);
                let grid = [product.columns.div_ceil(FEW_COLUMNS), 1, 1];
                Launch::kernel(format!("linear_fwd_few_{rows}_bf16"), grid, 64, 0, args.collect())
            }
            None => {
                let (variant, tiles) = match self.activation {
                    Activation::None => ("", &TILES[..]),
                    Activation::Silu => ("silu_", COMMON),
                    Activation::SwiGlu => ("swiglu_", &TILES[..]),
                };
                let (tile, _) = product.choose(tiles, 1, on)?;
                let writes = [Some(self.y.clone()), self.pre.clone()].into_iter().flatten();
                let factors = [product.left(&self.x, true, tile), product.right(&self.w, true, tile)];
                let reads = factors.into_iter().chain([bias, residual]);
                let args = writes.chain(reads).chain(sizes).chain(flags).collect();
                let entry = format!("linear_fwd_{variant}{}_bf16", tile.name);
                product.launch(entry, tile, 1, args, on)
            }
        };
        Ok(product.launches(vec![launch]))
    }

    /// The width of heads that turn, the columns of all of them, and the ratio of their frequencies.
    fn turning(rope: &Rope) -> Result<[Arg; 3], String> {
        Ok([Arg::size(rope.heads.width)?, Arg::size(rope.heads.qk_columns())?, Arg::U64(rope.ratio()?)])
    }

    /// The same, and the heads of the result turn: in the product where rows are few, and on Hopper, where each comes in
    /// whole vectors.
    fn rotated(&self, product: Product, on: &Target) -> Result<Vec<Launch>, String> {
        let few = FEW.iter().any(|&rows| product.rows <= rows);
        let Some((rope, positions, qkv)) = self.rotary.as_ref().filter(|_| !few) else {
            return self.launches(product, on);
        };
        let extents =
            Extents { n: product.rows as usize, k: product.depth as usize, m: product.columns as usize };
        let Some(ending) = Ending::of(extents, on)?.filter(|_| rope.heads.width <= MOST_WIDTH) else {
            let turned = rope.forward(self.y.clone(), positions.clone(), *qkv, on)?;
            return Ok(self
                .launches(product, on)?
                .into_iter()
                .chain(product.launches(vec![turned]))
                .collect());
        };
        let bias = self.bias.as_ref().unwrap_or(&self.w).clone();
        let sizes = [product.rows, product.columns, product.depth, self.bias.is_some().into()].map(Arg::U32);
        let rest = [bias, positions.clone()].into_iter().chain(sizes).chain(Self::turning(rope)?).collect();
        let (outs, factors) = (vec![self.y.clone()], [&self.x, &self.w]);
        Ok(vec![ending.launch("linear_fwd_rope", outs, factors, rest, on)])
    }
}

/// Columns of a head whose frequencies kernels have room for.
const MOST_WIDTH: usize = 256;

pub(super) fn forward(op: &Linear, ins: &[Spec], outs: &[Spec], on: &Target) -> Result<Kernels, String> {
    let (n, k, m) = (ins[0].shape.rows(), ins[0].shape.last(), ins[1].shape.rows());
    check(&ins[..ins.len() - usize::from(op.rotary.is_some())], &[k, m])?;
    let forward = Forward {
        y: Arg::output(0),
        x: Arg::input(0),
        w: Arg::input(1),
        pre: (op.activation != Activation::None).then(|| Arg::output(1)),
        bias: op.bias.then(|| Arg::input(2)),
        residual: op.residual_at().map(Arg::input),
        activation: op.activation,
        rotary: op.rotary_at().map(|(rope, at)| (rope, Arg::input(at), outs[0])),
    };
    Ok(Kernels { scratch: vec![], launches: forward.rotated(Product::new(n, m, k)?, on)? })
}

/// Extents of a product and its gradients: `x [N, K]`, `w [M, K]`.
pub(in crate::ops) struct Extents {
    pub n: usize,
    pub k: usize,
    pub m: usize,
}

/// `y = x w^T` alone, of bf16 operands wherever they lie.
pub(in crate::ops) fn product(
    y: Arg,
    x: Arg,
    w: Arg,
    e: Extents,
    on: &Target,
) -> Result<Vec<Launch>, String> {
    let none = Activation::None;
    let forward = Forward { y, x, w, pre: None, bias: None, residual: None, activation: none, rotary: None };
    forward.launches(Product::new(e.n, e.m, e.k)?, on)
}

/// A product on Hopper that ends in kernels of another op.
pub(in crate::ops) struct Ending {
    product: Product,
    tile: &'static Tile,
}

impl Ending {
    /// That of `x w^T`, where these kernels are the ones to take.
    pub(in crate::ops) fn of(e: Extents, on: &Target) -> Result<Option<Ending>, String> {
        let product = Product::new(e.n, e.m, e.k)?;
        let (tile, _) = product.choose(&TILES, 1, on)?;
        let many = FEW.iter().all(|&rows| product.rows > rows) && product.columns > 0;
        Ok((tile.cluster > 1 && many).then_some(Ending { product, tile }))
    }

    /// Tiles of a row.
    pub(in crate::ops) fn across(&self) -> u32 {
        self.product.columns.div_ceil(self.tile.columns)
    }

    /// A result with rows of so many columns, for kernels that let the copy engine store it.
    pub(in crate::ops) fn result(&self, of: &Arg, columns: u32) -> Arg {
        self.tile.result(of, self.product.rows, columns)
    }

    /// Runs `pass`'s kernel of this tile, whose arguments are outputs, both factors, and `rest`.
    pub(in crate::ops) fn launch(
        &self,
        pass: &str,
        outs: Vec<Arg>,
        [x, w]: [&Arg; 2],
        rest: Vec<Arg>,
        on: &Target,
    ) -> Launch {
        let factors = [self.product.left(x, true, self.tile), self.product.right(w, true, self.tile)];
        let args = outs.into_iter().chain(factors).chain(rest).collect();
        self.product.launch(format!("{pass}_{}_bf16", self.tile.name), self.tile, 1, args, on)
    }
}

/// `dx = dy w`, of bf16 operands wherever they lie.
pub(in crate::ops) fn input_gradient(
    dx: Arg,
    dy: Arg,
    w: Arg,
    e: Extents,
    on: &Target,
) -> Result<Vec<Launch>, String> {
    input_or_gate_gradient(dx, dy, w, None, e, on)
}

/// The same; or of what SwiGLU made `x` of, from that.
fn input_or_gate_gradient(
    to: Arg,
    dy: Arg,
    w: Arg,
    pre: Option<Arg>,
    e: Extents,
    on: &Target,
) -> Result<Vec<Launch>, String> {
    let product = Product::new(e.n, e.k, e.m)?;
    let (tile, _) = product.choose(&TILES, 1, on)?;
    let variant = if pre.is_some() { "swiglu_" } else { "" };
    let sizes = [product.rows, product.depth, product.columns].map(Arg::U32);
    let factors = [product.left(&dy, true, tile), product.right(&w, false, tile)];
    // What reads gates beside is stored in vectors.
    let to = if pre.is_some() { to } else { tile.result(&to, product.rows, product.columns) };
    let args = [to].into_iter().chain(factors).chain(pre).chain(sizes).collect();
    let launch = product.launch(format!("linear_dx_{variant}{}_bf16", tile.name), tile, 1, args, on);
    Ok(product.launches(vec![launch]))
}

/// Where the gradient of a weight goes.
pub(in crate::ops) struct WeightGradient {
    /// Its place.
    pub to: Arg,
    /// How it is stored.
    pub dtype: DType,
    /// Whether it is added to what is there.
    pub accumulate: bool,
    /// A scratch buffer for the parts of a split depth.
    pub parts: Arg,
}

/// `dw = dy^T x`, of bf16 operands wherever they lie; and the bytes that its parts take.
pub(in crate::ops) fn weight_gradient(
    dw: &WeightGradient,
    dy: Arg,
    x: Arg,
    e: Extents,
    on: &Target,
) -> Result<(usize, Vec<Launch>), String> {
    if !matches!(dw.dtype, DType::Bf16 | DType::F32) {
        return Err(format!("no kernel sums into {}; use f32", dw.dtype.name()));
    }
    let product = Product::new(e.m, e.k, e.n)?;
    let (tile, parts) = product.choose(&TILES, PARTS, on)?;
    let sizes = [Arg::U32(product.depth), Arg::U32(product.rows), Arg::U32(product.columns)];
    let kernel = |entry: String, parts: u32, to: &Arg, last: Arg| {
        let operands = [to.clone(), product.left(&dy, false, tile), product.right(&x, false, tile)];
        let args = operands.into_iter().chain(sizes.clone()).chain([last]).collect();
        product.launch(entry, tile, parts, args, on)
    };
    if parts == 1 {
        let entry = format!("linear_dw_{}_{}", tile.name, dw.dtype.name());
        let launch = kernel(entry, 1, &dw.to, Arg::U32(dw.accumulate.into()));
        return Ok((0, product.launches(vec![launch])));
    }
    let depth = product.depth.div_ceil(parts).next_multiple_of(tile.stage);
    let parts = product.depth.div_ceil(depth);
    let entry = format!("linear_dw_split_{}_f32", tile.name);
    let split = kernel(entry, parts, &dw.parts, Arg::U32(depth));
    let sum = sum_parts(dw, e.m * e.k, parts)?;
    Ok((parts as usize * e.m * e.k * 4, product.launches(vec![split, sum])))
}

/// `dw (+)=` the sum of so many parts of `count` numbers.
pub(in crate::ops) fn sum_parts(dw: &WeightGradient, count: usize, parts: u32) -> Result<Launch, String> {
    let count = size(count)?;
    let sizes = [count, parts, dw.accumulate.into()].map(Arg::U32);
    let args = [dw.to.clone(), dw.parts.clone()].into_iter().chain(sizes).collect();
    let entry = format!("linear_dw_sum_{}", dw.dtype.name());
    Ok(Launch::kernel(entry, [count.div_ceil(SUM_BYTES / dw.dtype.size() as u32), 1, 1], 256, 0, args))
}

pub(super) fn backward_input(ins: &[Spec], on: &Target) -> Result<Kernels, String> {
    let (n, m, k) = (ins[0].shape.rows(), ins[0].shape.last(), ins[1].shape.last());
    check(ins, &[k, m])?;
    let [to, dy, w] = [Arg::output(0), Arg::input(0), Arg::input(1)];
    let pre = ins.get(2).map(|_| Arg::input(2));
    let launches = input_or_gate_gradient(to, dy, w, pre, Extents { n, k, m }, on)?;
    Ok(Kernels { scratch: vec![], launches })
}

pub(super) fn backward_weight(
    ins: &[Spec],
    outs: &[Spec],
    accumulate: bool,
    on: &Target,
) -> Result<Kernels, String> {
    let (n, m, k) = (ins[0].shape.rows(), ins[0].shape.last(), ins[1].shape.last());
    check(&ins[..2], &[k, m])?;
    let (to, parts) = (Arg::output(0), Arg::scratch(0));
    let dw = WeightGradient { to, dtype: outs[0].dtype, accumulate, parts };
    let (bytes, launches) = weight_gradient(&dw, Arg::input(0), Arg::input(1), Extents { n, k, m }, on)?;
    let scratch = if bytes > 0 { vec![bytes] } else { vec![] };
    Ok(Kernels { scratch, launches })
}

#[cfg(test)]
mod tests {
    use super::{super::Gated, *};
    use crate::launch::Operand;

    fn spec<const N: usize>(dims: [usize; N]) -> Spec {
        Spec::new(dims, DType::Bf16)
    }

    fn launches(kernels: &Kernels) -> Vec<(&str, [u32; 3])> {
        let of = |l| match l {
            &Launch::Kernel { ref entry, grid, .. } => (entry.as_str(), grid),
            other => panic!("{other:?}"),
        };
        kernels.launches.iter().map(of).collect()
    }

    fn forward(op: &Linear, ins: &[Spec], on: &Target) -> Result<Kernels, String> {
        super::forward(op, ins, &op.infer(ins)?, on)
    }

    const PLAIN: Linear = Linear {
        bias: false,
        activation: Activation::None,
        residual: false,
        rotary: None,
        precision: crate::cpu::Precision::F32,
        gated: Gated(None),
    };

    #[test]
    fn large_products_take_large_tiles() {
        let on = Target::A100;
        let k = forward(&PLAIN, &[spec([8192, 8192]), spec([8192, 8192])], &on).unwrap();
        assert_eq!(launches(&k), [("linear_fwd_128x256_bf16", [2048, 1, 1])]);
        let k = forward(&PLAIN, &[spec([100, 64]), spec([136, 64])], &on).unwrap();
        assert_eq!(launches(&k), [("linear_fwd_64x64_bf16", [6, 1, 1])]);
        let poor = Target { shared: 64 << 10, ..on };
        let k = forward(&PLAIN, &[spec([8192, 8192]), spec([8192, 8192])], &poor).unwrap();
        assert_eq!(launches(&k), [("linear_fwd_128x128_bf16", [4096, 1, 1])]);
    }

    #[test]
    fn hopper_walks_over_tiles_that_copy_themselves() {
        let on = Target::H200;
        let k = forward(&PLAIN, &[spec([8192, 2048]), spec([4096, 2048])], &on).unwrap();
        assert_eq!(launches(&k), [("linear_fwd_wgmma_128x256_bf16", [132, 1, 1])]);
        let Launch::Kernel { args, .. } = &k.launches[0] else { panic!("{k:?}") };
        let map = |rows, height| Geometry {
            offset: 0,
            element: 2,
            extents: vec![2048, rows],
            strides: vec![4096],
            tile: vec![64, height],
            swizzle: 128,
        };
        let maps = [(0, map(8192, 128)), (1, map(4096, 128))].map(|(i, g)| Arg::Map(Operand::In(i), g));
        assert_eq!(args[1..3], maps);
        // Ampere's kernels where there is no depth, no room, or too little work.
        let entry = |n, k, on: &Target| {
            let k = forward(&PLAIN, &[spec([n, k]), spec([4096, k])], on).unwrap();
            launches(&k)[0].0.to_string()
        };
        assert_eq!(entry(8192, 0, &on), "linear_fwd_128x256_bf16");
        assert_eq!(entry(8192, 2048, &Target { shared: 96 << 10, ..on }), "linear_fwd_128x256_bf16");
        assert_eq!(entry(16, 64, &on), "linear_fwd_64x64_bf16");
    }

    #[test]
    fn operands_and_results_are_copied_box_by_box() {
        let (n, k, m) = (4096, 2048, 8192);
        let e = || Extents { n, k, m };
        let dx = Arg::Address(Operand::Out(0), 64);
        let [dy, w] = [Arg::Address(Operand::In(0), 32), Arg::input(1)];
        let launches = input_gradient(dx, dy, w, e(), &Target::H200).unwrap();
        let Launch::Kernel { args, .. } = &launches[0] else { panic!("{launches:?}") };
        let boxes: Vec<_> = args
            .iter()
            .filter_map(|a| match a {
                Arg::Map(_, g) => Some((g.offset, g.extents.clone(), g.tile.clone())),
                _ => None,
            })
            .collect();
        let factors = [(32, vec![8192, 4096], vec![64, 128]), (0, vec![2048, 8192], vec![64, 32])];
        assert_eq!(boxes[1..], factors);
        assert_eq!(boxes[0], (64, vec![2048, 4096], vec![64, 16]));
    }

    #[test]
    fn what_is_gated_takes_no_pass_of_its_own() {
        let ins = [spec([8192, 2048]), spec([2048, 5504]), spec([8192, 11_008])];
        for (on, entry) in [
            (Target::A100, "linear_dx_swiglu_128x256_bf16"),
            (Target::H200, "linear_dx_swiglu_wgmma_128x256_bf16"),
        ] {
            let k = backward_input(&ins, &on).unwrap();
            assert_eq!((k.scratch.len(), k.launches.len(), launches(&k)[0].0), (0, 1, entry));
        }
    }

    #[test]
    fn few_rows_read_the_weight_once() {
        for (rows, entry) in
            [(1, "linear_fwd_few_1_bf16"), (3, "linear_fwd_few_4_bf16"), (8, "linear_fwd_few_8_bf16")]
        {
            let k = forward(&PLAIN, &[spec([rows, 768]), spec([2304, 768])], &Target::H200).unwrap();
            assert_eq!(launches(&k), [(entry, [288, 1, 1])]);
        }
        let k = forward(&PLAIN, &[spec([9, 768]), spec([2304, 768])], &Target::H200).unwrap();
        assert_eq!(launches(&k)[0].0, "linear_fwd_64x64_bf16");
        assert_eq!(
            forward(&PLAIN, &[spec([0, 768]), spec([2304, 768])], &Target::H200).unwrap().launches,
            []
        );
    }

    #[test]
    fn weight_gradients_of_many_rows_are_split() {
        let ins = [spec([65536, 768]), spec([65536, 768])];
        let dw = Spec::new([768, 768], DType::F32);
        let k = backward_weight(&ins, &[dw], true, &Target::A100).unwrap();
        let [(split, [36, parts, 1]), ("linear_dw_sum_f32", sum)] = launches(&k)[..] else { panic!("{k:?}") };
        assert_eq!((split, sum), ("linear_dw_split_128x128_f32", [576, 1, 1]));
        assert!(parts >= 3 && k.scratch == [parts as usize * 768 * 768 * 4], "{k:?}");
        let k = backward_weight(&ins, &[dw], true, &Target::H200).unwrap();
        let [("linear_dw_split_wgmma_128x256_f32", blocks), ("linear_dw_sum_f32", _)] = launches(&k)[..]
        else {
            panic!("{k:?}")
        };
        assert!(blocks[0] <= 132 && blocks[0] > 100 && blocks[1] == 1, "{k:?}");
        let few = [spec([100, 768]), spec([100, 768])];
        assert_eq!(backward_weight(&few, &[dw], true, &Target::H200).unwrap().launches.len(), 1);
    }

    #[test]
    fn parts_cover_the_depth() {
        for n in [1000, 4097, 65536] {
            let k = backward_weight(&[spec([n, 64]), spec([n, 64])], &[spec([64, 64])], false, &Target::A100);
            let k = k.unwrap();
            let Launch::Kernel { grid, args, .. } = &k.launches[0] else { panic!("{k:?}") };
            let Some(Arg::U32(depth)) = args.last() else { panic!("{k:?}") };
            assert!(grid[1] * depth >= n as u32 && (grid[1] - 1) * depth < n as u32, "{n}: {k:?}");
        }
    }

    #[test]
    fn refusals_name_the_remedy() {
        let refused = |ins: &[Spec]| forward(&PLAIN, ins, &Target::H200).unwrap_err();
        assert!(refused(&[spec([3, 12]), spec([8, 12])]).contains("pad"));
        assert!(refused(&[spec([3, 8]), spec([12, 8])]).contains("pad"));
        let f32s = Spec::new([8, 8], DType::F32);
        assert!(refused(&[f32s, f32s]).contains("cast"));
        let poor = Target { shared: 16 << 10, ..Target::H200 };
        assert!(forward(&PLAIN, &[spec([16, 8]), spec([8, 8])], &poor).unwrap_err().contains("CPU"));
    }
}
