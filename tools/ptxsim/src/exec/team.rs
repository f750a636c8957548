//! Blocks that run together: a cluster, or the whole grid of a cooperative launch.

use super::Machine;
use super::barrier::Barrier;
use super::bulk::Transfer;
use super::mbarrier::Mbarrier;
use super::order::Standing;
use super::shadow::{COLUMNS, Shadow};
use super::warp::{State, Turn, Warp, run_warp};
use crate::counters::Tally;
use crate::finding::{FindingKind, Place};
use crate::launch::Order;
use crate::run::{Run, SHARED_BASE};
use std::collections::BTreeMap;

/// Numbered barriers of a block; those behind the 16 of the hardware join the warps of a warpgroup for `wgmma`.
pub(crate) const BARRIERS: usize = 16;
const WARPGROUPS: usize = 8;

#[repr(C, align(1024))]
#[derive(Clone, Copy)]
struct Line([u8; 1024]);

/// A block: its shared memory and what hangs on it.
pub(crate) struct Cta {
    pub(crate) id: [u32; 3],
    /// Number of its cluster in the grid.
    pub(crate) cluster: u32,
    /// What its cluster knows of others: see `FindingKind::Conflict`. Kept in the first block.
    pub(crate) standing: Standing,
    memory: Vec<Line>,
    pub(crate) shadow: Option<Shadow>,
    pub(crate) barriers: Vec<Barrier>,
    pub(crate) mbarriers: BTreeMap<u32, Mbarrier>,
    /// Bulk loads into this block that have not completed.
    pub(crate) loads: Vec<Transfer>,
    /// Warps of the block, and how many have exited.
    pub(crate) warps: usize,
    pub(crate) exited: usize,
    /// The latest that each warp of other blocks did to this block's memory, by column.
    pub(crate) visits: BTreeMap<u16, Visit>,
    /// Serial numbers of the agents for bulk loads and stores.
    pub(crate) load_serial: u32,
    pub(crate) store_serial: u32,
    pub(crate) columns: Columns,
    /// Of the cluster; kept in its first block.
    pub(crate) cluster_barrier: Barrier,
}

/// What a warp of another block of the cluster did to a block's shared memory.
#[derive(Clone, Copy)]
pub(crate) struct Visit {
    pub(crate) serial: u32,
    pub(crate) cta: [u32; 3],
    pub(crate) thread: u32,
    pub(crate) pc: u32,
}

/// Where the agents of a block have their columns.
#[derive(Clone, Copy)]
pub(crate) struct Columns {
    pub(crate) first_group: u16,
    pub(crate) loads: u16,
    pub(crate) stores: u16,
}

impl Cta {
    fn new(run: &Run<'_>, rank: usize, columns: usize, width: usize) -> Self {
        let warps = warps_of(run);
        let first = (rank * width) as u16;
        let groups = warps.div_ceil(4) as u16;
        let stripes = (run.shared_end as usize).div_ceil(1024);
        Self {
            id: [0; 3],
            cluster: 0,
            standing: Standing::default(),
            memory: vec![Line([0; 1024]); stripes],
            shadow: run.shadowed.then(|| Shadow::new(run.shared_end, columns)),
            barriers: (0..BARRIERS + WARPGROUPS).map(|_| Barrier::new(columns)).collect(),
            mbarriers: BTreeMap::new(),
            loads: Vec::new(),
            visits: BTreeMap::new(),
            warps,
            exited: 0,
            load_serial: 0,
            store_serial: 0,
            columns: Columns {
                first_group: first + warps as u16,
                loads: first + warps as u16 + groups,
                stores: first + warps as u16 + groups + 1,
            },
            cluster_barrier: Barrier::new(columns),
        }
    }

    fn start(&mut self, id: [u32; 3], cluster: u32, base: u32) {
        self.id = id;
        self.cluster = cluster;
        self.standing = Standing::default();
        if let Some(shadow) = &mut self.shadow {
            shadow.reset();
        }
        self.barriers.iter_mut().for_each(Barrier::reset);
        self.cluster_barrier.reset();
        self.mbarriers.clear();
        self.loads.clear();
        self.visits.clear();
        self.exited = 0;
        (self.load_serial, self.store_serial) = (base, base);
    }

    /// Whether all warps have exited.
    pub(crate) fn has_exited(&self) -> bool {
        self.exited == self.warps
    }

    /// Bytes of shared memory from an address that was checked against the block's end.
    #[inline(always)]
    pub(crate) fn shared(&mut self, address: u32) -> *mut u8 {
        // SAFETY: every caller checks the address against `Run::shared_end`, for which this memory was sized.
        unsafe { self.memory.as_mut_ptr().cast::<u8>().add(address as usize) }
    }

    /// Threads that `bar.sync` without a count waits for.
    pub(crate) fn expected(&self) -> u32 {
        ((self.warps - self.exited) * 32) as u32
    }
}

fn warps_of(run: &Run<'_>) -> usize {
    run.block.iter().product::<u32>().div_ceil(32) as usize
}

/// The blocks of a cluster with their warps, reused from cluster to cluster.
pub(crate) struct Team {
    ctas: Vec<Cta>,
    warps: Vec<Warp>,
    /// Serial numbers up to here belong to earlier blocks.
    base: u32,
    progress: u64,
}

impl Team {
    pub(crate) fn new(run: &Run<'_>) -> Self {
        let size = run.cluster.iter().product::<u32>() as usize;
        let warps = warps_of(run);
        // Per block: its warps, its warpgroups, loads and stores.
        let width = warps + warps.div_ceil(4) + 2;
        let columns = if run.shadowed { (size * width).next_multiple_of(COLUMNS) } else { 0 };
        Self {
            ctas: (0..size).map(|rank| Cta::new(run, rank, columns, width)).collect(),
            warps: (0..size * warps)
                .map(|n| {
                    let column = (n / warps * width + n % warps) as u16;
                    Warp::new(run.kernel, n % warps, column, columns)
                })
                .collect(),
            base: 0,
            progress: 0,
        }
    }

    /// Puts cluster `index` of the grid at the start of the kernel.
    pub(crate) fn start(&mut self, run: &Run<'_>, index: u32) {
        let (g, c) = (run.grid, run.cluster);
        let clusters = [g[0] / c[0], g[1] / c[1]];
        let at = [index % clusters[0], index / clusters[0] % clusters[1], index / clusters[0] / clusters[1]];
        let ctas = self.ctas.iter().flat_map(|cta| [cta.load_serial, cta.store_serial]);
        let latest = self.warps.iter().map(|w| w.serial).chain(ctas).max().unwrap_or(0);
        self.base = latest + 1;
        let warps = warps_of(run);
        for (rank, cta) in self.ctas.iter_mut().enumerate() {
            let r = rank as u32;
            let inner = [r % c[0], r / c[0] % c[1], r / c[0] / c[1]];
            cta.start([0, 1, 2].map(|d| at[d] * c[d] + inner[d]), index, self.base);
        }
        for (n, warp) in self.warps.iter_mut().enumerate() {
            warp.start(run, self.ctas[n / warps].id, self.base);
        }
        self.progress = 0;
    }

    /// Whether serial numbers come near their end, so that the team should be replaced.
    pub(crate) fn is_worn(&self) -> bool {
        self.base > 1 << 30
    }

    fn is_done(&self) -> bool {
        self.warps.iter().all(|w| w.state == State::Done)
    }

    /// Lets a warp that waited at a barrier go on if it was released.
    fn wake(&mut self, n: usize) {
        let per_cta = self.ctas[0].warps;
        let warp = &mut self.warps[n];
        let barrier = match warp.state {
            State::Barrier(id, generation) => {
                let barrier = &self.ctas[n / per_cta].barriers[id];
                if barrier.generation() == generation {
                    return;
                }
                barrier
            }
            State::Cluster(generation) => {
                let barrier = &self.ctas[0].cluster_barrier;
                if barrier.generation() == generation {
                    return;
                }
                barrier
            }
            State::Ready | State::Done => return,
        };
        let wgmma = matches!(warp.state, State::Barrier(id, _) if id >= BARRIERS);
        warp.knows.join(barrier.released());
        warp.state = State::Ready;
        if wgmma {
            let columns = self.ctas[n / per_cta].columns;
            super::wgmma::completed(warp, columns);
        }
    }

    /// Gives each warp a turn, in the given order. Returns whether any did more than wait.
    fn round(&mut self, run: &Run<'_>, tally: &mut Tally, order: &[usize]) -> Activity {
        let per_cta = self.ctas[0].warps;
        let mut activity = Activity { busy: false, executed: 0 };
        for &n in order {
            self.wake(n);
            if self.warps[n].state != State::Ready {
                continue;
            }
            let mut machine = Machine {
                run,
                warp: &mut self.warps[n],
                ctas: &mut self.ctas,
                rank: n / per_cta,
                tally,
                active: 0,
                pc: 0,
                progress: &mut self.progress,
            };
            let (turn, executed) = run_warp(&mut machine, run.options.schedule.quantum);
            activity.executed += u64::from(executed);
            activity.busy |= turn != Turn::Yielded || executed > SPIN;
            if self.warps[n].state == State::Done {
                self.finish(run, n);
            }
        }
        activity
    }

    /// A warp has exited: barriers wait for fewer, its copies complete.
    fn finish(&mut self, run: &Run<'_>, n: usize) {
        let rank = n / self.ctas[0].warps;
        super::bulk::finish_stores(run, &mut self.ctas, rank, &mut self.warps[n]);
        self.ctas[rank].exited += 1;
        if self.ctas[rank].has_exited() {
            self.bid_farewell(run, rank);
        }
        let expected = self.ctas[rank].expected();
        for barrier in &mut self.ctas[rank].barriers[..BARRIERS] {
            barrier.exited(expected);
        }
        let left: u32 = self.ctas.iter().map(Cta::expected).sum();
        self.ctas[0].cluster_barrier.exited(left);
    }

    /// A block has exited: what others did to its memory must have come before, as some warp of it knows.
    fn bid_farewell(&self, run: &Run<'_>, rank: usize) {
        let cta = &self.ctas[rank];
        let warps = &self.warps[rank * cta.warps..][..cta.warps];
        let known = |column: u16| warps.iter().filter_map(|w| w.knows.clock.get(column as usize)).max();
        for (_, visit) in cta.visits.iter().filter(|(c, v)| known(**c).is_some_and(|k| *k < v.serial)) {
            let [x, y, z] = cta.id;
            let why = format!(
                "block ({x},{y},{z}) of the cluster may have exited before this touches its shared memory"
            );
            run.report(FindingKind::Race, visit.pc, visit.cta, visit.thread, Place::None, why);
        }
    }

    /// Reports what every warp waits for.
    fn report_deadlock(&self, run: &Run<'_>, why: &str) {
        let per_cta = self.ctas[0].warps;
        let waiting: Vec<usize> =
            (0..self.warps.len()).filter(|n| self.warps[*n].state != State::Done).collect();
        let Some(&first) = waiting.first() else { return };
        let mut lines = Vec::new();
        for &n in &waiting {
            let warp = &self.warps[n];
            let pc = warp.pc.saturating_sub(1) as usize;
            let what = match warp.state {
                State::Barrier(id, _) if id < BARRIERS => format!("barrier {id}"),
                State::Barrier(..) => "wgmma of its warpgroup".to_string(),
                State::Cluster(_) => "the cluster's barrier".to_string(),
                _ => "polling".to_string(),
            };
            let [bx, by, bz] = self.ctas[n / per_cta].id;
            let line = run.kernel.code[pc].line;
            lines.push(format!("block ({bx},{by},{bz}) warp {}: {what} at line {line}", warp.index));
        }
        let warp = &self.warps[first];
        let pc = warp.pc.saturating_sub(1);
        let thread = warp.index as u32 * 32;
        let message = format!("{why}; {}", lines.join("; "));
        run.report(FindingKind::Deadlock, pc, self.ctas[first / per_cta].id, thread, Place::None, message);
    }

    /// Reports bulk loads that nobody waited for.
    fn report_unfinished(&self, run: &Run<'_>) {
        for cta in &self.ctas {
            for load in &cta.loads {
                let message = "the block exits while a bulk copy into its shared memory is under way";
                let place = Place::Shared(i64::from(load.first()) - i64::from(SHARED_BASE));
                run.report(FindingKind::InFlight, load.pc, cta.id, load.thread, place, message.into());
            }
        }
    }
}

struct Activity {
    busy: bool,
    executed: u64,
}

/// Instructions of a turn that ends in a failed try, below which it counts as waiting.
const SPIN: u32 = 64;
/// Rounds without anything but waiting after which nothing will come.
const IDLE_ROUNDS: u32 = 2_000;

/// Runs teams together until all are done or stuck.
pub(crate) fn run_teams(run: &Run<'_>, tally: &mut Tally, teams: &mut [Team], random: &mut Random) {
    let warps = teams[0].warps.len();
    let mut order: Vec<usize> = (0..warps).collect();
    if run.options.schedule.order == Order::Reversed {
        order.reverse();
    }
    let (mut idle, mut fruitless, mut progress, mut executed) = (0, 0, 0, 0);
    let (mut everywhere, mut stuck) = (run.standstill.progress(), None);
    while !teams.iter().all(Team::is_done) {
        let mut busy = false;
        for team in teams.iter_mut() {
            if run.seed().is_some() {
                random.shuffle(&mut order);
            }
            let activity = team.round(run, tally, &order);
            busy |= activity.busy;
            fruitless += activity.executed;
            executed += activity.executed;
        }
        let now: u64 = teams.iter().map(|t| t.progress).sum();
        if now != progress {
            progress = now;
            run.standstill.progressed();
        }
        idle = if busy { 0 } else { idle + 1 };
        let seen = run.standstill.progress();
        if seen != everywhere {
            (everywhere, fruitless, idle) = (seen, 0, 0);
        } else if fruitless > 0 {
            // What these wait for may come from another host thread.
            std::thread::yield_now();
        }
        let waits = idle > IDLE_ROUNDS || fruitless > run.options.patience;
        if waits && run.standstill.is_final(everywhere, &mut stuck) {
            teams.iter().for_each(|team| team.report_deadlock(run, "no warp can go on"));
            return;
        }
        if executed > run.options.limit {
            let why = format!("still running after {executed} warp instructions");
            teams.iter().for_each(|team| team.report_deadlock(run, &why));
            return;
        }
    }
    teams.iter().for_each(|team| team.report_unfinished(run));
}

/// A small generator for schedules (splitmix64).
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    pub(crate) fn shuffle<T>(&mut self, items: &mut [T]) {
        for n in (1..items.len()).rev() {
            items.swap(n, (self.next() % (n as u64 + 1)) as usize);
        }
    }
}
