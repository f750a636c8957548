//! Opens the programs that sampling replays, and writes what they read.
use super::SampleOptions;
use crate::{
    diffusion::{self, Evaluation},
    engine::{Engine, Program, no_images},
    error::Result,
    model::{Extend, ImagePass},
    train::seed_words,
};
use transfusion_core::{
    device::{Place, PlanId},
    op::Kind,
    random::{Purpose, Stream, halves},
    tensor::{View, ViewMut},
};

/// Tokens that go to a slot from a position on.
pub(crate) struct TextRow {
    pub(crate) slot: usize,
    pub(crate) at: usize,
    pub(crate) ids: Vec<i32>,
}

/// Opens the text program over rows of tokens and writes what it reads.
pub(crate) fn text(engine: &mut Engine, e: Extend, rows: &[TextRow]) -> Result<PlanId> {
    let n = e.rows * e.positions;
    let (mut ids, mut positions, mut row_end) = (vec![-1; n], vec![-1; n], vec![0; n]);
    let (mut slots, mut last) = (vec![-1; e.rows], vec![-1; e.rows]);
    for (r, row) in rows.iter().enumerate() {
        slots[r] = row.slot as i32;
        last[r] = (r * e.positions + row.ids.len() - 1) as i32;
        for (j, id) in row.ids.iter().enumerate() {
            let at = r * e.positions + j;
            ids[at] = *id;
            positions[at] = (row.at + j) as i32;
            row_end[at] = positions[at] + 1;
        }
    }
    let plan = engine.open(Program::Text(e))?;
    for (name, values) in [
        ("tokens", &ids),
        ("positions", &positions),
        ("row_end", &row_end),
        ("slots", &slots),
        ("last", &last),
    ] {
        engine.ints(plan, name, values)?;
    }
    Ok(plan)
}

/// Opens the program that caches clean pictures, `[e.rows, S, S, channels]`, and writes what it reads; `rows` are slot
/// and first position of each.
pub(crate) fn commit(
    engine: &mut Engine,
    e: Extend,
    rows: &[(usize, usize)],
    pictures: &[f32],
) -> Result<PlanId> {
    let plan = open_images(engine, e, ImagePass::Commit, e.rows, rows)?;
    write_state(engine, "picture", e.rows, pictures)?;
    engine.floats(plan, "times", &vec![0.0; e.rows])?;
    Ok(plan)
}

/// Images that are denoised together.
pub(crate) struct Drawing {
    pub(crate) plan: PlanId,
    /// What the sampler asks of the model, step by step.
    pub(crate) evaluations: Vec<Evaluation>,
    rows: usize,
    images: usize,
    /// The sequence of each image, and which of its images it is.
    named: Vec<(usize, usize)>,
}

impl Drawing {
    /// Opens the program, and writes noise and all that it reads in every step. `rows` are slot and first position of
    /// each row: of the images, and with guidance of their twins without a condition.
    pub(crate) fn begin(
        engine: &mut Engine,
        e: Extend,
        named: Vec<(usize, usize)>,
        rows: &[(usize, usize)],
        o: &SampleOptions,
    ) -> Result<Drawing> {
        let image = engine.config().image().ok_or_else(no_images)?;
        let (objective, numel) = (image.objective, image.size * image.size * image.channels);
        let guided = o.is_guided();
        let images = if guided { e.rows / 2 } else { e.rows };
        let plan = open_images(engine, e, ImagePass::Denoise { guided }, images, rows)?;
        let [_, start, ..] = diffusion::coefficients(objective, o.start);
        let mut x = vec![0.0; images * numel];
        for (&(i, drawn), x) in named.iter().zip(x.chunks_mut(numel)) {
            let first = (drawn * numel.next_multiple_of(4)) as u32;
            Stream::new(o.seed, Purpose::Noise, i as u64).fill_normal(first, x);
            x.iter_mut().for_each(|x| *x *= start);
        }
        write_state(engine, "picture", images, &x)?;
        write_state(engine, "memory", images, &vec![0.0; images * numel])?;
        engine.ints(plan, "seed", &seed_words(o.seed))?;
        let evaluations = diffusion::evaluations(o.sampler, objective, o.steps, o.guidance, o.clip, o.start);
        Ok(Drawing { plan, evaluations, rows: e.rows, images, named })
    }

    /// Writes what a step reads besides.
    pub(crate) fn prepare(&self, engine: &mut Engine, step: usize) -> Result<()> {
        let Evaluation { t, step: coefficients } = self.evaluations[step];
        let keys: Vec<i32> = (0..self.images)
            .flat_map(|r| {
                let (i, drawn) = self.named.get(r).copied().unwrap_or_default();
                let [low, high] = halves(i as u64 | (drawn as u64) << 40).map(u32::cast_signed);
                [low, high, step as i32]
            })
            .collect();
        engine.ints(self.plan, "keys", &keys)?;
        engine.floats(self.plan, "times", &vec![t; self.rows])?;
        engine.floats(self.plan, "steps", &coefficients.row().repeat(self.images))
    }

    /// The pictures as they are now, of `numel` values each.
    pub(crate) fn pictures(&self, engine: &mut Engine, numel: usize) -> Result<Vec<f32>> {
        let mut x = vec![0.0; self.images * numel];
        let name = state_name("picture", self.images);
        engine.device().read(Place::State(Kind::Cache, &name), ViewMut::F32(&mut x))?;
        Ok(x)
    }
}

/// Opens an image program and writes where its rows go: slot and first position of each; a slot
/// that is none idles.
fn open_images(
    engine: &mut Engine,
    e: Extend,
    pass: ImagePass,
    images: usize,
    rows: &[(usize, usize)],
) -> Result<PlanId> {
    let p = engine.config().image().ok_or_else(no_images)?.patches();
    let e = Extend { positions: p, ..e };
    let (mut slots, mut positions, mut row_end) =
        (vec![-1; e.rows], vec![-1; e.rows * p], vec![0; e.rows * p]);
    for (r, &(slot, at)) in rows.iter().enumerate().filter(|(_, (slot, _))| *slot != usize::MAX) {
        slots[r] = slot as i32;
        for j in 0..p {
            positions[r * p + j] = (at + j) as i32;
            row_end[r * p + j] = (at + p) as i32;
        }
    }
    let copies: Vec<i32> =
        (0..e.rows).flat_map(|r| (0..p).map(move |j| (r % images * p + j) as i32)).collect();
    let plan = engine.open(Program::Image(e, pass))?;
    for (name, values) in
        [("slots", &slots), ("positions", &positions), ("row_end", &row_end), ("copies", &copies)]
    {
        engine.ints(plan, name, values)?;
    }
    Ok(plan)
}

fn write_state(engine: &mut Engine, what: &str, images: usize, values: &[f32]) -> Result<()> {
    let name = state_name(what, images);
    Ok(engine.device().write(Place::State(Kind::Cache, &name), View::F32(values))?)
}

/// The name of a state that holds images being drawn.
fn state_name(what: &str, images: usize) -> String {
    format!("{what}.{images}")
}
