//! Global memory: byte arrays that remember which bytes were written.
#![allow(unsafe_code)] // aligned storage is viewed as bytes

use std::ops::Range;

const ALIGN: usize = 256;

#[repr(C, align(256))]
#[derive(Clone, Copy)]
struct Block([u8; ALIGN]);

/// An allocation of global memory, aligned to 256 bytes as a driver aligns it.
///
/// Every byte is known to be initialised or not. A new memory is not; [`write`](Self::write) and the stores of
/// kernels initialise, [`forget`](Self::forget) undoes it.
pub struct Memory {
    blocks: Vec<Block>,
    written: Vec<u8>,
}

impl Memory {
    /// `len` bytes that nothing wrote.
    pub fn new(len: usize) -> Self {
        Self { blocks: vec![Block([0; ALIGN]); len.div_ceil(ALIGN)], written: vec![0; len] }
    }

    /// A memory with these bytes.
    pub fn from_bytes(bytes: &[u8]) -> Self {
        let mut memory = Self::new(bytes.len());
        memory.write(0, bytes);
        memory
    }

    /// Bytes of this memory.
    pub fn len(&self) -> usize {
        self.written.len()
    }

    /// Whether the memory has no byte.
    pub fn is_empty(&self) -> bool {
        self.written.is_empty()
    }

    /// The bytes; those that nothing wrote are zero or left over.
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: the blocks are `len` initialised bytes at least, without padding.
        unsafe { std::slice::from_raw_parts(self.blocks.as_ptr().cast(), self.len()) }
    }

    /// The bytes, to be changed without a change of what counts as initialised.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `bytes`.
        unsafe { std::slice::from_raw_parts_mut(self.blocks.as_mut_ptr().cast(), self.len()) }
    }

    /// Copies `bytes` to `offset` and marks them as initialised.
    ///
    /// # Panics
    ///
    /// If they do not fit.
    pub fn write(&mut self, offset: usize, bytes: &[u8]) {
        let range = offset..offset + bytes.len();
        self.bytes_mut()[range.clone()].copy_from_slice(bytes);
        self.mark(range);
    }

    /// Marks bytes as initialised.
    ///
    /// # Panics
    ///
    /// If the range is not within the memory.
    pub fn mark(&mut self, range: Range<usize>) {
        self.written[range].fill(1);
    }

    /// Marks bytes as never written: what was there must not be read before it is written again.
    ///
    /// # Panics
    ///
    /// If the range is not within the memory.
    pub fn forget(&mut self, range: Range<usize>) {
        self.written[range].fill(0);
    }

    /// Whether all bytes of a range are initialised.
    ///
    /// # Panics
    ///
    /// If the range is not within the memory.
    pub fn is_initialised(&self, range: Range<usize>) -> bool {
        self.written[range].iter().all(|w| *w != 0)
    }

    /// The first byte and its mark, for the windows of a launch.
    pub(crate) fn pointers(&mut self) -> (*mut u8, *mut u8) {
        (self.blocks.as_mut_ptr().cast(), self.written.as_mut_ptr())
    }
}
