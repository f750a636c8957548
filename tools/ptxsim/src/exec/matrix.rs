//! Matrices of a warp in shared memory: `ldmatrix`, `stmatrix`.
//!
//! In a fragment of 16-bit elements, lane `4 g + t` holds elements `2 t` and `2 t + 1` of row `g`: a row of eight
//! elements is four neighbouring lanes, contiguous in a register row.

use super::access::{Kind, NO_POINTERS, Pointers};
use super::lane::{FULL, LANES, lanes};
use super::memory::narrow_addresses;
use super::{Flow, Inst, Instruction, Machine};

/// `ldmatrix`: `count` matrices into the rows of the list, addresses `a + imm`; `mode` 1 transposes.
pub(crate) struct LoadMatrix;

/// `stmatrix`, likewise.
pub(crate) struct StoreMatrix;

/// Eight rows of eight 16-bit elements, two in a word.
type Tile = [[u32; 4]; 8];

impl Machine<'_> {
    /// The lanes whose rows of 16 bytes may be accessed, and where those lie: eight for each of `count` matrices.
    #[inline(always)]
    fn matrix_rows(&mut self, i: &Inst, kind: Kind, pointers: &mut Pointers) -> u32 {
        let addresses = narrow_addresses(self, i);
        let named = FULL >> (LANES - 8 * usize::from(i.count));
        let mut admitted = named;
        if self.refused_shared(&addresses, 16) & named != 0 {
            let write = kind == Kind::Write;
            admitted = lanes(named)
                .filter(|l| self.shared_in_bounds(self.rank, addresses[*l], 16, *l, write))
                .fold(0, |all, l| all | 1 << l);
        }
        if self.run.shadowed {
            self.shadow_accesses(&addresses, admitted, 16, kind);
        }
        if self.run.options.traffic {
            let (matrices, _) = addresses.as_chunks::<8>();
            let wavefronts = matrices[..usize::from(i.count)].iter().map(row_wavefronts).sum();
            self.count_shared(128 * u32::from(i.count), wavefronts, i.count.into());
        }
        self.shared_pointers(&addresses, pointers);
        admitted
    }
}

/// Passes that eight rows of 16 bytes take: rows in the same four banks wait for each other.
#[inline(always)]
fn row_wavefronts(addresses: &[u32; 8]) -> u32 {
    let banks = addresses.iter().fold(0u32, |all, a| all | 1 << (a >> 4 & 7));
    if banks == 0xff { 1 } else { conflicting_rows(addresses) }
}

#[inline(never)]
fn conflicting_rows(addresses: &[u32; 8]) -> u32 {
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

/// The transposed tile.
#[inline(always)]
fn transposed(tile: &Tile) -> Tile {
    let mut out = [[0; 4]; 8];
    for (g, row) in out.iter_mut().enumerate() {
        let half = |r: usize| tile[r][g / 2] >> (16 * (g % 2)) & 0xffff;
        for (t, word) in row.iter_mut().enumerate() {
            *word = half(2 * t) | half(2 * t + 1) << 16;
        }
    }
    out
}

impl Instruction for LoadMatrix {
    #[inline(always)]
    unsafe fn execute(x: &mut Machine<'_>, i: &Inst) -> Flow {
        if !x.converged() {
            return Flow::Next;
        }
        let mut pointers = NO_POINTERS;
        let admitted = x.matrix_rows(i, Kind::Read, &mut pointers);
        for n in 0..usize::from(i.count) {
            let mut tile: Tile = [[0; 4]; 8];
            for (r, row) in tile.iter_mut().enumerate() {
                if admitted >> (8 * n + r) & 1 != 0 {
                    // SAFETY: 16 bytes were admitted.
                    *row = unsafe { pointers[8 * n + r].cast::<[u32; 4]>().read_unaligned() };
                }
            }
            if i.mode == 1 {
                tile = transposed(&tile);
            }
            let destination = x.listed(i, n);
            x.warp.registers.words_mut::<u32>(destination).as_chunks_mut::<4>().0.copy_from_slice(&tile);
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
        let mut pointers = NO_POINTERS;
        let admitted = x.matrix_rows(i, Kind::Write, &mut pointers);
        for n in 0..usize::from(i.count) {
            let mut tile: Tile = [[0; 4]; 8];
            tile.copy_from_slice(x.warp.registers.words::<u32>(x.listed(i, n)).as_chunks::<4>().0);
            if i.mode == 1 {
                tile = transposed(&tile);
            }
            for (r, row) in tile.iter().enumerate().filter(|(r, _)| admitted >> (8 * n + r) & 1 != 0) {
                // SAFETY: 16 bytes were admitted.
                unsafe { pointers[8 * n + r].cast::<[u32; 4]>().write_unaligned(*row) };
            }
        }
        *x.progress += 1;
        Flow::Next
    }
}
