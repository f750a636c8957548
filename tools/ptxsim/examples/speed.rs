//! How fast kernels run: `speed FILE KERNEL GRID BLOCK SHARED ARGUMENT...`, without checks and with all.
//!
//! An argument is `u32:N`, `f32:X`, a pointer to zeros `zeros:BYTES`, to words that repeat `words:BYTES:N:N...`, to an
//! output `empty:BYTES`, or a map `map:ROWS:COLUMNS:TILE_ROWS:TILE_COLUMNS` of `bf16` with 128-byte swizzle. For example
//!
//! ```text
//! speed gemm.ptx gemm_nt_bf16 4,4,1 128 0 zeros:131072 zeros:131072 empty:131072 u32:256 u32:256 u32:256 \
//!     u32:256 u32:256 u32:256 f32:1
//! ```

use std::error::Error;
use std::time::Instant;
use transfusion_ptxsim::{
    Access, Argument, Checks, Format, Launch, Memory, MemoryId, Module, Options, Swizzle, TensorMap, Window,
    simulate,
};

fn main() -> Result<(), Box<dyn Error>> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let [file, kernel, grid, block, shared, rest @ ..] = &words[..] else {
        return Err("speed FILE KERNEL GRID BLOCK SHARED ARGUMENT...".into());
    };
    let module = Module::load(file, &std::fs::read_to_string(file)?)?;
    let mut memories = Vec::new();
    let args = rest.iter().map(|word| argument(word, &mut memories)).collect::<Result<Vec<_>, _>>()?;
    let launch = Launch {
        kernel: module.kernel(kernel)?,
        grid: extents(grid)?,
        block: extents(block)?,
        cluster: [1, 1, 1],
        shared: shared.parse()?,
        cooperative: false,
        args: &args,
    };
    let settings = [("bounds only", Checks::cheap(), false), ("all checks", Checks::all(), true)];
    for (name, checks, traffic) in settings {
        let options = Options { checks, traffic, ..Options::default() };
        let mut best = f64::INFINITY;
        let mut outcome = simulate(&mut memories, &launch, &options)?;
        for _ in 0..10 {
            let start = Instant::now();
            outcome = simulate(&mut memories, &launch, &options)?;
            best = best.min(start.elapsed().as_secs_f64());
        }
        let n = outcome.counters.total.thread_instructions;
        println!("{name:12} {:9.3} ms {:8.1} M thread instructions/s", best * 1e3, n as f64 / best / 1e6);
        for finding in outcome.findings {
            println!("{finding}");
        }
    }
    Ok(())
}

fn extents(text: &str) -> Result<[u32; 3], Box<dyn Error>> {
    let mut out = [1; 3];
    for (extent, part) in out.iter_mut().zip(text.split(',')) {
        *extent = part.parse()?;
    }
    Ok(out)
}

fn argument(word: &str, memories: &mut Vec<Memory>) -> Result<Argument<'static>, Box<dyn Error>> {
    let parts: Vec<&str> = word.split(':').collect();
    let mut window = |memory: Memory| {
        let len = memory.len();
        memories.push(memory);
        let memory = MemoryId(memories.len() - 1);
        Window { name: "argument", memory, start: 0, len, offset: 0, access: Access::ReadWrite }
    };
    Ok(match parts[..] {
        ["u32", n] => Argument::U32(n.parse()?),
        ["f32", x] => Argument::F32(x.parse()?),
        ["zeros", n] => Argument::Window(window(Memory::from_bytes(&vec![0; n.parse()?]))),
        ["words", n, ref pattern @ ..] if !pattern.is_empty() => {
            let pattern = pattern.iter().map(|word| word.parse()).collect::<Result<Vec<u32>, _>>()?;
            let bytes = pattern.iter().cycle().take(n.parse::<usize>()? / 4).flat_map(|w| w.to_le_bytes());
            Argument::Window(window(Memory::from_bytes(&bytes.collect::<Vec<_>>())))
        }
        ["empty", n] => Argument::Window(window(Memory::new(n.parse()?))),
        ["map", rows, columns, tile_rows, tile_columns] => {
            let (rows, columns): (u64, u64) = (rows.parse()?, columns.parse()?);
            Argument::TensorMap(TensorMap {
                window: window(Memory::from_bytes(&vec![0; (rows * columns * 2) as usize])),
                element: 2,
                format: Format::Bf16,
                extents: vec![columns, rows],
                strides: vec![columns * 2],
                tile: vec![tile_columns.parse()?, tile_rows.parse()?],
                swizzle: Swizzle::Bytes128,
            })
        }
        _ => return Err(format!("`{word}` is no argument").into()),
    })
}
