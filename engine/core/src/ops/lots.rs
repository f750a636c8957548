//! How the kernels over rows and elements are launched.
use super::prelude::*;

/// Threads of a block.
pub(super) const THREADS: u32 = 256;
/// Warps of a block.
pub(super) const WARPS: u32 = THREADS / 32;
/// Blocks that an SM holds at once where each thread has few registers.
pub(super) const BLOCKS: u32 = 8;

/// Blocks for `items`, `each` to a block; no more than the machine holds at once, since they walk on.
pub(super) fn blocks(items: u32, each: u32, on: &Target) -> u32 {
    items.div_ceil(each).min(on.sms * BLOCKS)
}

/// Elements of a lot: as many as fill 16 bytes of the widest of `dtypes`.
pub(super) fn lot(dtypes: &[DType]) -> u32 {
    16 / dtypes.iter().map(|d| d.size() as u32).max().unwrap_or(4)
}

/// How entries spell what is stored in bf16 or f32: `bf16`, and `bf16_f32` from the one to the other.
pub(super) fn suffix(from: DType, to: DType) -> Result<String, String> {
    match [from, to].iter().find(|d| !matches!(d, DType::Bf16 | DType::F32)) {
        Some(d) => {
            Err(format!("kernels store bf16 and f32, not {}; cast it, or use the CPU device", d.name()))
        }
        None if from == to => Ok(to.name().into()),
        None => Ok(format!("{}_{}", from.name(), to.name())),
    }
}

/// A kernel that shares `count` elements out to the grid, `lot` at a time.
pub(super) fn over(entry: String, count: u32, lot: u32, on: &Target, args: Vec<Arg>) -> Launch {
    Launch::kernel(entry, [blocks(count.div_ceil(lot), THREADS, on), 1, 1], THREADS, 0, args)
}

/// A kernel whose groups of lanes take `rows` rows of `vectors` vectors each, `per_sm` blocks to an SM.
pub(super) fn groups(rows: u32, vectors: u32, per_sm: u32, on: &Target) -> u32 {
    let lanes = vectors.next_power_of_two().min(32);
    rows.div_ceil(THREADS / lanes).min(on.sms * per_sm)
}

/// Words that a row is moved in: vectors of 16 bytes where it is made of whole ones, else elements.
pub(super) fn words(width: u32, dtype: DType) -> u32 {
    let lot = lot(&[dtype]);
    if width.is_multiple_of(lot) { width / lot } else { width }
}

/// One launch, without scratch memory.
pub(super) fn single(launch: Launch) -> Kernels {
    Kernels { scratch: vec![], launches: vec![launch] }
}

/// The grid of a kernel that takes images of `numel` values, `lot` to a thread: images, and blocks to share each.
pub(super) fn images(images: usize, numel: u32, lot: u32, on: &Target) -> Result<[u32; 3], String> {
    let images = size(images)?;
    let share = (on.sms * BLOCKS).div_ceil(images.max(1));
    Ok([images, numel.div_ceil(lot * THREADS).clamp(1, share), 1])
}
