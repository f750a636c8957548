//! What a tensor is: a handle in a graph, a static type, and a borrowed block of memory.
use half::bf16;
use std::fmt;

/// A value in a graph. [`Tensor::VOID`] stands for the result of an op that was refused.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct Tensor(pub(crate) u32);

impl Tensor {
    /// The result of a refused op: every op on it yields it again.
    pub const VOID: Tensor = Tensor(u32::MAX);

    pub(crate) fn index(self) -> usize {
        self.0 as usize
    }
}

/// What an element is stored as.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum DType {
    /// 64-bit float; for gradient checks, on the CPU device only.
    F64,
    /// 32-bit float.
    F32,
    /// The upper half of a 32-bit float.
    Bf16,
    /// 32-bit signed integer.
    I32,
    /// 8-bit unsigned integer.
    U8,
}

impl DType {
    /// Bytes of one element.
    pub fn size(self) -> usize {
        match self {
            DType::F64 => 8,
            DType::F32 | DType::I32 => 4,
            DType::Bf16 => 2,
            DType::U8 => 1,
        }
    }

    /// Lower-case name, as in kernel entries and listings.
    pub fn name(self) -> &'static str {
        match self {
            DType::F64 => "f64",
            DType::F32 => "f32",
            DType::Bf16 => "bf16",
            DType::I32 => "i32",
            DType::U8 => "u8",
        }
    }

    /// Whether elements are floating-point numbers.
    pub fn is_float(self) -> bool {
        matches!(self, DType::F64 | DType::F32 | DType::Bf16)
    }

    /// What sums over this dtype are kept in: f64 for f64, else f32.
    pub fn accumulator(self) -> DType {
        if self == DType::F64 { DType::F64 } else { DType::F32 }
    }
}

/// Row-major, at most four dimensions.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Shape {
    rank: u8,
    dims: [usize; 4],
}

impl<const N: usize> From<[usize; N]> for Shape {
    fn from(d: [usize; N]) -> Self {
        const { assert!(N <= 4, "at most four dimensions") };
        let mut dims = [1; 4];
        dims[..N].copy_from_slice(&d);
        Shape { rank: N as u8, dims }
    }
}

impl Shape {
    /// The dimensions, outermost first.
    pub fn dims(&self) -> &[usize] {
        &self.dims[..self.rank as usize]
    }

    /// How many elements.
    pub fn numel(&self) -> usize {
        self.dims().iter().product()
    }

    /// The innermost dimension; 1 for a scalar.
    pub fn last(&self) -> usize {
        self.dims().last().copied().unwrap_or(1)
    }

    /// Every dimension but the innermost folded into one.
    pub fn rows(&self) -> usize {
        self.dims().iter().rev().skip(1).product()
    }

    /// The same shape with another innermost dimension.
    pub fn with_last(mut self, last: usize) -> Shape {
        if self.rank > 0 {
            self.dims[self.rank as usize - 1] = last;
        }
        self
    }
}

impl fmt::Debug for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.dims())
    }
}

/// The static type of a tensor.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Spec {
    /// Extents.
    pub shape: Shape,
    /// Element type.
    pub dtype: DType,
}

impl Spec {
    /// A spec of this shape and dtype.
    pub fn new(shape: impl Into<Shape>, dtype: DType) -> Self {
        Spec { shape: shape.into(), dtype }
    }

    /// Bytes of all elements.
    pub fn bytes(&self) -> usize {
        self.shape.numel() * self.dtype.size()
    }
}

impl fmt::Debug for Spec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{:?}", self.dtype.name(), self.shape)
    }
}

/// A tensor's elements, borrowed.
#[derive(Clone, Copy, Debug)]
pub enum View<'a> {
    /// 64-bit floats.
    F64(&'a [f64]),
    /// 32-bit floats.
    F32(&'a [f32]),
    /// Brain floats.
    Bf16(&'a [bf16]),
    /// Integers.
    I32(&'a [i32]),
    /// Bytes.
    U8(&'a [u8]),
}

/// A tensor's elements, borrowed for writing.
#[derive(Debug)]
pub enum ViewMut<'a> {
    /// 64-bit floats.
    F64(&'a mut [f64]),
    /// 32-bit floats.
    F32(&'a mut [f32]),
    /// Brain floats.
    Bf16(&'a mut [bf16]),
    /// Integers.
    I32(&'a mut [i32]),
    /// Bytes.
    U8(&'a mut [u8]),
}

impl<'a> View<'a> {
    /// Element type.
    pub fn dtype(&self) -> DType {
        match self {
            View::F64(_) => DType::F64,
            View::F32(_) => DType::F32,
            View::Bf16(_) => DType::Bf16,
            View::I32(_) => DType::I32,
            View::U8(_) => DType::U8,
        }
    }

    /// How many elements.
    pub fn len(&self) -> usize {
        match self {
            View::F64(v) => v.len(),
            View::F32(v) => v.len(),
            View::Bf16(v) => v.len(),
            View::I32(v) => v.len(),
            View::U8(v) => v.len(),
        }
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The elements as raw bytes, in the machine's order.
    pub fn bytes(&self) -> &'a [u8] {
        match self {
            View::F64(v) => bytemuck::cast_slice(v),
            View::F32(v) => bytemuck::cast_slice(v),
            View::Bf16(v) => bytemuck::cast_slice(v),
            View::I32(v) => bytemuck::cast_slice(v),
            View::U8(v) => v,
        }
    }
}

impl ViewMut<'_> {
    /// The same elements, read-only.
    pub fn as_view(&self) -> View<'_> {
        match self {
            ViewMut::F64(v) => View::F64(v),
            ViewMut::F32(v) => View::F32(v),
            ViewMut::Bf16(v) => View::Bf16(v),
            ViewMut::I32(v) => View::I32(v),
            ViewMut::U8(v) => View::U8(v),
        }
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        self.as_view().dtype()
    }

    /// How many elements.
    pub fn len(&self) -> usize {
        self.as_view().len()
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The elements as raw bytes, in the machine's order.
    pub fn bytes(&mut self) -> &mut [u8] {
        match self {
            ViewMut::F64(v) => bytemuck::cast_slice_mut(v),
            ViewMut::F32(v) => bytemuck::cast_slice_mut(v),
            ViewMut::Bf16(v) => bytemuck::cast_slice_mut(v),
            ViewMut::I32(v) => bytemuck::cast_slice_mut(v),
            ViewMut::U8(v) => v,
        }
    }
}

/// An op's input as `eval` sees it; empty where an output replaces it.
#[derive(Clone, Copy, Debug)]
pub struct In<'a> {
    /// Extents.
    pub shape: Shape,
    /// Elements.
    pub data: View<'a>,
}

impl<'a> In<'a> {
    /// The elements of an integer operand; none of another.
    pub fn i32(&self) -> &'a [i32] {
        if let View::I32(v) = self.data { v } else { &[] }
    }
}

/// An op's output as `eval` sees it.
#[derive(Debug)]
pub struct Out<'a> {
    /// Extents.
    pub shape: Shape,
    /// What the device will store it as, for an op that goes on from a result that it yields.
    pub stored: DType,
    /// Elements.
    pub data: ViewMut<'a>,
}

/// A tensor's elements, owned by the host: what is written to and read from devices.
#[derive(Clone, PartialEq, Debug)]
pub enum Host {
    /// 64-bit floats.
    F64(Vec<f64>),
    /// 32-bit floats.
    F32(Vec<f32>),
    /// Brain floats.
    Bf16(Vec<bf16>),
    /// Integers.
    I32(Vec<i32>),
    /// Bytes.
    U8(Vec<u8>),
}

impl Host {
    /// Zeros of a spec.
    pub fn zeros(spec: Spec) -> Host {
        let n = spec.shape.numel();
        match spec.dtype {
            DType::F64 => Host::F64(vec![0.0; n]),
            DType::F32 => Host::F32(vec![0.0; n]),
            DType::Bf16 => Host::Bf16(vec![bf16::ZERO; n]),
            DType::I32 => Host::I32(vec![0; n]),
            DType::U8 => Host::U8(vec![0; n]),
        }
    }

    /// Floats of `dtype` with these values, rounded to nearest; integers are truncated.
    pub fn from_f64(dtype: DType, values: impl IntoIterator<Item = f64>) -> Host {
        let values = values.into_iter();
        match dtype {
            DType::F64 => Host::F64(values.collect()),
            DType::F32 => Host::F32(values.map(|x| x as f32).collect()),
            // `bf16::from_f64` leaves out the low half of a number before it rounds.
            DType::Bf16 => Host::Bf16(values.map(|x| bf16::from_f32(x as f32)).collect()),
            DType::I32 => Host::I32(values.map(|x| x as i32).collect()),
            DType::U8 => Host::U8(values.map(|x| x as u8).collect()),
        }
    }

    /// The values as f64, whatever they are stored as.
    pub fn to_f64(&self) -> Vec<f64> {
        match self {
            Host::F64(v) => v.clone(),
            Host::F32(v) => v.iter().map(|&x| f64::from(x)).collect(),
            Host::Bf16(v) => v.iter().map(|&x| f64::from(x)).collect(),
            Host::I32(v) => v.iter().map(|&x| f64::from(x)).collect(),
            Host::U8(v) => v.iter().map(|&x| f64::from(x)).collect(),
        }
    }

    /// Borrows the elements.
    pub fn view(&self) -> View<'_> {
        match self {
            Host::F64(v) => View::F64(v),
            Host::F32(v) => View::F32(v),
            Host::Bf16(v) => View::Bf16(v),
            Host::I32(v) => View::I32(v),
            Host::U8(v) => View::U8(v),
        }
    }

    /// Borrows the elements for writing.
    pub fn view_mut(&mut self) -> ViewMut<'_> {
        match self {
            Host::F64(v) => ViewMut::F64(v),
            Host::F32(v) => ViewMut::F32(v),
            Host::Bf16(v) => ViewMut::Bf16(v),
            Host::I32(v) => ViewMut::I32(v),
            Host::U8(v) => ViewMut::U8(v),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_barely_above_the_middle_are_rounded_up() {
        for digits in [9, 12, 20, 23] {
            let x = 1.0 + 2f64.powi(-8) + 2f64.powi(-digits);
            assert_eq!(Host::from_f64(DType::Bf16, [x]).to_f64(), [1.0 + 2f64.powi(-7)], "2^-{digits}");
        }
    }
}
