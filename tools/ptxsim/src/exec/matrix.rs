//! Matrices of a warp in shared memory: `ldmatrix`, `stmatrix`.
//!
//! In a fragment of 16-bit elements, lane `4 g + t` holds elements `2 t` and `2 t + 1` of row `g`: a row of eight
//! elements is four neighbouring lanes, contiguous in a register row.

use super::access::Kind;
use super::lane::{LANES, Row};
use super::memory::narrow_addresses;
use super::{Flow, Inst, Instruction, Machine};

/// `ldmatrix`: `count` matrices into the rows of the list, addresses `a + imm`; `mode` 1 transposes.
pub(crate) struct LoadMatrix;

/// `stmatrix`, likewise.
pub(crate) struct StoreMatrix;

type Tile = [[u16; 8]; 8];

impl Machine<'_> {
    /// The rows of matrix `n` in shared memory, where they may be accessed.
    #[inline(always)]
    fn matrix_rows(&mut self, addresses: &Row<u32>, n: usize, kind: Kind) -> [Option<*mut u8>; 8] {
        let mut rows = [None; 8];
        for (r, row) in rows.iter_mut().enumerate() {
            let lane = n * 8 + r;
            let address = addresses[lane];
            let rank = self.rank;
            if !self.shared_in_bounds(rank, address, 16, lane, kind == Kind::Write) {
                continue;
            }
            if self.run.shadowed {
                self.shadow_access(rank, address, 16, lane, kind);
            }
            *row = Some(self.cta().shared(address));
        }
        if self.run.options.traffic {
            self.count_shared(128, row_wavefronts(&addresses[n * 8..n * 8 + 8]), 1);
        }
        rows
    }
}

/// Passes that eight rows of 16 bytes take: rows in the same four banks wait for each other.
fn row_wavefronts(addresses: &[u32]) -> u32 {
    let mut most = 1;
    for (n, a) in addresses.iter().enumerate() {
        let same = |b: &&u32| (**b ^ a) >> 4 & 7 == 0;
        let mut depth = 1;
        for (m, b) in addresses[..n].iter().enumerate().filter(|(_, b)| same(b)) {
            depth += u32::from(b >> 4 != a >> 4 && !addresses[..m].iter().any(|c| c >> 4 == b >> 4));
        }
        most = most.max(depth);
    }
    most
}

impl Instruction for LoadMatrix {
    #[inline(always)]
    unsafe fn execute(x: &mut Machine<'_>, i: &Inst) -> Flow {
        if !x.converged() {
            return Flow::Next;
        }
        let addresses = narrow_addresses(x, i);
        for n in 0..usize::from(i.count) {
            let rows = x.matrix_rows(&addresses, n, Kind::Read);
            let destination = x.listed(i, n);
            let out = x.warp.registers.words_mut::<u32>(destination);
            // SAFETY: 16 bytes of each row were admitted.
            let row = |g: usize| rows[g].map_or([0; 4], |p| unsafe { p.cast::<[u32; 4]>().read_unaligned() });
            let (quads, _) = out.as_chunks_mut::<4>();
            if i.mode == 0 {
                for (g, quad) in quads.iter_mut().enumerate() {
                    *quad = row(g);
                }
            } else {
                let tile: [[u32; 4]; 8] = [0, 1, 2, 3, 4, 5, 6, 7].map(row);
                for (g, quad) in quads.iter_mut().enumerate() {
                    let half = |r: usize| tile[r][g / 2] >> (16 * (g % 2)) & 0xffff;
                    for (t, word) in quad.iter_mut().enumerate() {
                        *word = half(2 * t) | half(2 * t + 1) << 16;
                    }
                }
            }
        }
        Flow::Next
    }
}

impl Instruction for StoreMatrix {
    #[inline(always)]
    unsafe fn execute(x: &mut Machine<'_>, i: &Inst) -> Flow {
        if !x.converged() {
            return Flow::Next;
        }
        let addresses = narrow_addresses(x, i);
        for n in 0..usize::from(i.count) {
            let words = *x.warp.registers.words::<u32>(x.listed(i, n));
            let mut tile: Tile = [[0; 8]; 8];
            for l in 0..LANES {
                let (g, t) = (l / 4, l % 4);
                let (low, high) = (words[l] as u16, (words[l] >> 16) as u16);
                if i.mode == 1 {
                    (tile[2 * t][g], tile[2 * t + 1][g]) = (low, high);
                } else {
                    (tile[g][2 * t], tile[g][2 * t + 1]) = (low, high);
                }
            }
            let rows = x.matrix_rows(&addresses, n, Kind::Write);
            for (row, to) in tile.iter().zip(rows) {
                if let Some(to) = to {
                    // SAFETY: 16 bytes were admitted.
                    unsafe { to.cast::<[u16; 8]>().write_unaligned(*row) };
                }
            }
        }
        *x.progress += 1;
        Flow::Next
    }
}
