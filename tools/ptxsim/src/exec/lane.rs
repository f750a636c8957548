//! The register file of a warp: one row of 32 lanes per register, read and written as arrays of a [`Lane`] type.

use crate::math::{bf16_to_f32, f16_to_f32, f32_to_bf16, f32_to_f16};

/// Lanes of a warp.
pub(crate) const LANES: usize = 32;

/// 32 values, one per lane.
pub(crate) type Row<T> = [T; LANES];

/// All lanes.
pub(crate) const FULL: u32 = u32::MAX;

/// A value that a register holds in each lane. Narrow types occupy a 32-bit row, wide ones a pair of rows.
pub(crate) trait Lane: Copy {
    /// The word of the register row: `u32` or `u64`.
    type Word: Copy + Default;
    /// Whether the word has 64 bits.
    const WIDE: bool;
    /// The value in a word; bits beyond the type are ignored.
    fn unpack(word: Self::Word) -> Self;
    /// The word of a value; bits beyond the type are zero.
    fn pack(self) -> Self::Word;
    /// `new` if `bit` is one, `old` if it is zero: by masks, since a branch for each lane is slow and large.
    fn choose(bit: u32, new: Self::Word, old: Self::Word) -> Self::Word;
}

macro_rules! lane {
    ($type:ty, $word:ty, $wide:expr, |$w:ident| $unpack:expr, |$v:ident| $pack:expr) => {
        impl Lane for $type {
            type Word = $word;
            const WIDE: bool = $wide;
            #[inline(always)]
            fn unpack($w: $word) -> Self {
                $unpack
            }
            #[inline(always)]
            fn pack(self) -> $word {
                let $v = self;
                $pack
            }
            #[inline(always)]
            fn choose(bit: u32, new: $word, old: $word) -> $word {
                let mask = <$word>::from(bit).wrapping_neg();
                new & mask | old & !mask
            }
        }
    };
}

lane!(u32, u32, false, |w| w, |v| v);
lane!(i32, u32, false, |w| w as i32, |v| v as u32);
lane!(u16, u32, false, |w| w as u16, |v| v.into());
lane!(i16, u32, false, |w| w as i16, |v| (v as u16).into());
lane!(u8, u32, false, |w| w as u8, |v| v.into());
lane!(i8, u32, false, |w| w as i8, |v| (v as u8).into());
lane!(f32, u32, false, |w| f32::from_bits(w), |v| v.to_bits());
lane!(u64, u64, true, |w| w, |v| v);
lane!(i64, u64, true, |w| w as i64, |v| v as u64);
lane!(f64, u64, true, |w| f64::from_bits(w), |v| v.to_bits());

/// An `f32` of an `.ftz` instruction: subnormals are zero on the way in and out.
#[derive(Clone, Copy)]
pub(crate) struct Flushed(pub(crate) f32);

lane!(Flushed, u32, false, |w| Flushed(f32::from_bits(flush(w))), |v| flush(v.0.to_bits()));

#[inline(always)]
fn flush(bits: u32) -> u32 {
    if bits & 0x7f80_0000 == 0 { bits & 0x8000_0000 } else { bits }
}

/// A bfloat16, computed with as `f32`.
#[derive(Clone, Copy)]
pub(crate) struct Bf16(pub(crate) f32);

lane!(Bf16, u32, false, |w| Bf16(bf16_to_f32(w as u16)), |v| f32_to_bf16(v.0).into());

/// A half-precision float, computed with as `f32`.
#[derive(Clone, Copy)]
pub(crate) struct F16(pub(crate) f32);

lane!(F16, u32, false, |w| F16(f16_to_f32(w as u16)), |v| f32_to_f16(v.0).into());

/// Two bfloat16 in one register, the low half first.
#[derive(Clone, Copy)]
pub(crate) struct Bf16x2(pub(crate) f32, pub(crate) f32);

lane!(Bf16x2, u32, false, |w| Bf16x2(bf16_to_f32(w as u16), bf16_to_f32((w >> 16) as u16)), |v| u32::from(
    f32_to_bf16(v.0)
) | u32::from(
    f32_to_bf16(v.1)
) << 16);

/// Two half-precision floats in one register, the low half first.
#[derive(Clone, Copy)]
pub(crate) struct F16x2(pub(crate) f32, pub(crate) f32);

lane!(F16x2, u32, false, |w| F16x2(f16_to_f32(w as u16), f16_to_f32((w >> 16) as u16)), |v| u32::from(
    f32_to_f16(v.0)
) | u32::from(
    f32_to_f16(v.1)
) << 16);

#[repr(C, align(256))]
#[derive(Clone, Copy)]
struct Pair([u32; 2 * LANES]);

/// The registers of one warp.
pub(crate) struct Registers {
    rows: Vec<Pair>,
    predicates: Vec<u32>,
}

impl Registers {
    /// `rows` narrow rows and `predicates` predicate masks, all zero.
    pub(crate) fn new(rows: u32, predicates: u32) -> Self {
        Self {
            rows: vec![Pair([0; 2 * LANES]); (rows as usize).div_ceil(2)],
            predicates: vec![0; predicates as usize],
        }
    }

    /// The row as words. Rows are numbered in narrow rows; the number of a wide row is even.
    #[inline(always)]
    pub(crate) fn words<T: Lane>(&self, row: u32) -> &Row<T::Word> {
        debug_assert!((row as usize) + usize::from(T::WIDE) < self.rows.len() * 2);
        // SAFETY: rows come from the register allocation of the kernel that sized this file; wide rows are even
        // and therefore lie within one pair; any bits are a valid word.
        unsafe { &*self.rows.as_ptr().cast::<Row<u32>>().add(row as usize).cast() }
    }

    /// The row as words, to be changed.
    #[inline(always)]
    pub(crate) fn words_mut<T: Lane>(&mut self, row: u32) -> &mut Row<T::Word> {
        debug_assert!((row as usize) + usize::from(T::WIDE) < self.rows.len() * 2);
        // SAFETY: as in `words`.
        unsafe { &mut *self.rows.as_mut_ptr().cast::<Row<u32>>().add(row as usize).cast() }
    }

    /// All lanes of a register.
    #[inline(always)]
    pub(crate) fn get<T: Lane>(&self, row: u32) -> Row<T> {
        let words = self.words::<T>(row);
        let mut out = [T::unpack(words[0]); LANES];
        for l in 0..LANES {
            out[l] = T::unpack(words[l]);
        }
        out
    }

    /// One lane of a register.
    #[inline(always)]
    pub(crate) fn lane<T: Lane>(&self, row: u32, lane: usize) -> T {
        T::unpack(self.words::<T>(row)[lane])
    }

    /// Writes the lanes that `active` names.
    #[inline(always)]
    pub(crate) fn put<T: Lane>(&mut self, row: u32, values: Row<T>, active: u32) {
        let words = self.words_mut::<T>(row);
        if active == FULL {
            for l in 0..LANES {
                words[l] = values[l].pack();
            }
        } else {
            for l in 0..LANES {
                words[l] = T::choose(active >> l & 1, values[l].pack(), words[l]);
            }
        }
    }

    /// The mask of a predicate.
    #[inline(always)]
    pub(crate) fn predicate(&self, index: u32) -> u32 {
        debug_assert!((index as usize) < self.predicates.len());
        // SAFETY: the decoder numbers predicates and sizes this file by their count.
        unsafe { *self.predicates.get_unchecked(index as usize) }
    }

    /// Writes the lanes of a predicate that `active` names.
    #[inline(always)]
    pub(crate) fn put_predicate(&mut self, index: u32, mask: u32, active: u32) {
        debug_assert!((index as usize) < self.predicates.len());
        // SAFETY: as in `predicate`.
        let p = unsafe { self.predicates.get_unchecked_mut(index as usize) };
        *p = *p & !active | mask & active;
    }
}

/// The lanes that a mask names, in order.
#[inline(always)]
pub(crate) fn lanes(mask: u32) -> impl Iterator<Item = usize> {
    let mut rest = mask;
    std::iter::from_fn(move || {
        (rest != 0).then(|| {
            let lane = rest.trailing_zeros() as usize;
            rest &= rest - 1;
            lane
        })
    })
}
