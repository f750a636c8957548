//! How the columns of a packed `qkv` row are shared out.
use crate::{cpu::LANES, tensor::Spec};

/// The heads of an attention layer. A packed row holds the queries of `heads` heads, then the keys of
/// `kv_heads` heads, then their values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Heads {
    /// Query heads, H.
    pub heads: usize,
    /// Key and value heads, Hkv.
    pub kv_heads: usize,
    /// Width of one head, D.
    pub width: usize,
}

impl Heads {
    /// Columns that hold queries: `H D`.
    pub fn q_columns(&self) -> usize {
        self.heads * self.width
    }

    /// Columns of a packed row: `(H + 2 Hkv) D`.
    pub fn packed_width(&self) -> usize {
        (self.heads + 2 * self.kv_heads) * self.width
    }

    /// Columns that hold queries and keys: `(H + Hkv) D`.
    pub(super) fn qk_columns(&self) -> usize {
        (self.heads + self.kv_heads) * self.width
    }

    /// Columns of all keys; also of all values.
    pub fn kv_columns(&self) -> usize {
        self.kv_heads * self.width
    }

    /// Columns of one head as whole vectors.
    pub(super) fn padded(&self) -> usize {
        self.width.next_multiple_of(LANES)
    }

    /// Query heads that share a key head.
    pub(super) fn group(&self) -> usize {
        self.heads / self.kv_heads
    }

    /// Refuses heads that do not divide.
    pub(super) fn divide(&self) -> Result<(), String> {
        let sane = self.width > 0 && self.kv_heads > 0 && self.heads > 0;
        if sane && self.heads.is_multiple_of(self.kv_heads) {
            Ok(())
        } else {
            Err(format!("{self:?} do not divide"))
        }
    }

    /// Refuses rows that are not packed in this way.
    pub(super) fn check(&self, qkv: Spec) -> Result<(), String> {
        if self.width == 0 || self.heads == 0 || qkv.shape.last() != self.packed_width() {
            return Err(format!("rows of {qkv:?} do not hold {self:?}: q, k and v heads side by side"));
        }
        Ok(())
    }
}
