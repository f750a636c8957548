//! What the tests share: kernels in a frame of declarations, launches on one memory per operand.
#![allow(dead_code)] // each test file uses a part

use std::error::Error;
use transfusion_ptxsim::*;

pub(crate) type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// A module with one kernel `test`, whose parameters are pointers of these names.
pub(crate) fn kernel(parameters: &[&str], declarations: &str, body: &str) -> String {
    let parameters: Vec<String> = parameters.iter().map(|p| format!(".param .u64 {p}")).collect();
    format!(
        ".version 8.0\n.target sm_90a\n.address_size 64\n.visible .entry test({})\n{{\n\
         .reg .pred %p<16>; .reg .b16 %h<16>; .reg .b32 %r<64>; .reg .f32 %f<160>; .reg .b64 %rd<32>;\n\
         {declarations}\n{body}\nret;\n}}\n",
        parameters.join(", ")
    )
}

/// A launch of `test` with one operand for each memory.
pub(crate) struct Bench<'a> {
    pub(crate) text: &'a str,
    pub(crate) names: &'a [&'a str],
    pub(crate) grid: u32,
    pub(crate) block: u32,
    pub(crate) cluster: u32,
    pub(crate) cooperative: bool,
    pub(crate) options: Options,
}

impl<'a> Bench<'a> {
    pub(crate) fn new(text: &'a str, names: &'a [&'a str]) -> Self {
        let options = Options::default();
        Self { text, names, grid: 1, block: 32, cluster: 1, cooperative: false, options }
    }

    pub(crate) fn block(mut self, threads: u32) -> Self {
        self.block = threads;
        self
    }

    pub(crate) fn grid(mut self, blocks: u32) -> Self {
        self.grid = blocks;
        self
    }

    pub(crate) fn run(&self, memories: &mut [Memory]) -> Result<Outcome> {
        let windows = self.names.iter().enumerate().map(|(n, name)| {
            Argument::Window(Window {
                name,
                memory: MemoryId(n),
                start: 0,
                len: memories[n].len(),
                offset: 0,
                access: Access::ReadWrite,
            })
        });
        self.run_with(&windows.collect::<Vec<_>>(), memories)
    }

    pub(crate) fn run_with(&self, args: &[Argument<'_>], memories: &mut [Memory]) -> Result<Outcome> {
        let module = Module::load("test.ptx", self.text)?;
        let launch = Launch {
            kernel: module.kernel("test")?,
            grid: [self.grid, 1, 1],
            block: [self.block, 1, 1],
            cluster: [self.cluster, 1, 1],
            shared: 0,
            cooperative: self.cooperative,
            args,
        };
        Ok(simulate(memories, &launch, &self.options)?)
    }
}

pub(crate) fn words(memory: &Memory) -> Vec<u32> {
    memory.bytes().as_chunks::<4>().0.iter().map(|w| u32::from_le_bytes(*w)).collect()
}

pub(crate) fn bytes_of(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|w| w.to_le_bytes()).collect()
}

/// A bfloat16 of a number that has one.
pub(crate) fn bf16(x: f32) -> [u8; 2] {
    let [_, _, low, high] = x.to_le_bytes();
    [low, high]
}

pub(crate) fn bf16_bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| bf16(*v)).collect()
}

/// Small whole numbers without pattern; sums of their products are exact.
pub(crate) fn small(seed: u32, count: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(2654435761).wrapping_add(1);
    let mut next = || {
        state = state.wrapping_mul(1664525).wrapping_add(1013904223);
        (state >> 28) as f32 - 8.0
    };
    (0..count).map(|_| next()).collect()
}

/// All four schedules.
pub(crate) fn schedules() -> impl Iterator<Item = Options> {
    Schedule::SEVERAL.into_iter().map(|schedule| Options { schedule, ..Options::default() })
}
