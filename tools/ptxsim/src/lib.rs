//! A simulator for NVIDIA's PTX: it runs kernels on the host, checks every access that they make, and counts what
//! they do.
//!
//! ```
//! use transfusion_ptxsim::*;
//!
//! let text = "
//! .version 7.0
//! .target sm_80
//! .address_size 64
//! .visible .entry twice(.param .u64 values) {
//!     .reg .b32 %r<3>;
//!     .reg .b64 %rd<5>;
//!     ld.param.u64 %rd1, [values];
//!     cvta.to.global.u64 %rd2, %rd1;
//!     mov.u32 %r1, %tid.x;
//!     mul.wide.u32 %rd3, %r1, 4;
//!     add.s64 %rd4, %rd2, %rd3;
//!     ld.global.u32 %r2, [%rd4];
//!     add.s32 %r2, %r2, %r2;
//!     st.global.u32 [%rd4], %r2;
//!     ret;
//! }";
//! let module = Module::load("twice.ptx", text)?;
//! let mut memory = [Memory::from_bytes(&[1, 0, 0, 0, 2, 0, 0, 0])];
//! let window = Window { name: "values", memory: MemoryId(0), start: 0, len: 8, offset: 0, access: Access::ReadWrite };
//! let launch = Launch {
//!     kernel: module.kernel("twice")?,
//!     grid: [1, 1, 1],
//!     block: [3, 1, 1], // one thread too many
//!     cluster: [1, 1, 1],
//!     shared: 0,
//!     cooperative: false,
//!     args: &[Argument::Window(window)],
//! };
//! let outcome = simulate(&mut memory, &launch, &Options::default())?;
//! assert_eq!(memory[0].bytes(), [2, 0, 0, 0, 4, 0, 0, 0]);
//! assert_eq!(outcome.findings[0].kind, FindingKind::OutOfBounds);
//! assert_eq!(outcome.findings[0].line, 13);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod allocate;
mod counters;
mod decode;
mod device;
mod error;
mod exec;
mod finding;
mod flow;
mod kernel;
mod launch;
mod math;
mod memory;
mod run;
mod syntax;
mod touched;

pub use counters::{Class, Counters, Counts};
pub use device::{SimDevice, SimOptions};
pub use error::{LaunchError, LoadError};
pub use finding::{Checks, Finding, FindingKind, Place};
pub use kernel::{Kernel, Module, Parameter};
pub use launch::{
    Access, Argument, Format, Launch, MemoryId, Options, Order, Schedule, Swizzle, TensorMap, Window,
};
pub use memory::Memory;

use counters::Tally;
use exec::team::{Random, Team, run_teams};
use run::Run;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

/// What a simulation brought to light.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// Faults, by line of the PTX. Empty for a kernel without any that this run could show.
    pub findings: Vec<Finding>,
    /// What the kernel did.
    pub counters: Counters,
}

/// Runs a launch to its end, or until it is stuck. `memories` hold what windows refer to.
///
/// A faulty access does nothing, so that the kernel goes on and further faults come to light.
///
/// # Errors
///
/// If the launch does not fit the kernel: arguments, block, shared memory, windows.
pub fn simulate(
    memories: &mut [Memory],
    launch: &Launch<'_>,
    options: &Options,
) -> Result<Outcome, LaunchError> {
    let run = Run::new(memories, launch, options)?;
    let tally = run_grid(&run, launch.cooperative);
    let counters = Counters::new(run.kernel, &tally);
    Ok(Outcome { findings: run.into_findings(), counters })
}

/// Runs all blocks; returns the counts.
fn run_grid(run: &Run<'_>, cooperative: bool) -> Tally {
    let size: u32 = run.cluster.iter().product();
    let clusters = run.grid.iter().product::<u32>() / size;
    let order = grid_order(run, clusters);
    let together = if cooperative { order.len() } else { run.options.together.clamp(1, order.len()) };
    let lots: Vec<&[u32]> = order.chunks(together).collect();
    let total = Mutex::new(Tally::new(run.kernel));
    let next = AtomicUsize::new(0);
    let work = || {
        let mut tally = Tally::new(run.kernel);
        let mut random = Random(run.seed().unwrap_or(0));
        let mut teams: Vec<Team> = (0..together).map(|_| Team::new(run)).collect();
        while let Some(here) = lots.get(next.fetch_add(1, Ordering::Relaxed)) {
            for (team, at) in teams.iter_mut().zip(*here) {
                if team.is_worn() {
                    *team = Team::new(run);
                }
                team.start(run, *at);
            }
            run_teams(run, &mut tally, &mut teams[..here.len()], &mut random);
        }
        run.standstill.leave();
        total.lock().unwrap_or_else(|e| e.into_inner()).add(&tally);
    };
    let threads = run.options.threads.clamp(1, lots.len());
    run.standstill.enter(threads);
    if threads <= 1 {
        work();
    } else {
        std::thread::scope(|scope| (0..threads).for_each(|_| drop(scope.spawn(work))));
    }
    total.into_inner().unwrap_or_else(|e| e.into_inner())
}

/// The order in which clusters start.
fn grid_order(run: &Run<'_>, clusters: u32) -> Vec<u32> {
    let mut order: Vec<u32> = (0..clusters).collect();
    match run.options.schedule.order {
        Order::InOrder => {}
        Order::Reversed => order.reverse(),
        Order::Shuffled(seed) => Random(seed).shuffle(&mut order),
    }
    order
}
