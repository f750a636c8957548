//! A folder for what the two sides hand to each other.
use crate::error::Result;
use std::{
    fs,
    path::{Path, PathBuf},
    sync::atomic::{AtomicU32, Ordering},
};
use transfusion::{Error, batch::Batch, train::TrainOptions};
use transfusion_core::{
    checkpoint::weights,
    random::{Purpose, Stream, halves},
    tensor::{Host, Spec, ViewMut},
};

/// A folder of its own among the system's temporary ones, which goes away with this.
#[derive(Debug)]
pub struct Folder(PathBuf);

impl Folder {
    /// An empty one.
    ///
    /// # Errors
    /// If it cannot be made.
    pub fn new() -> Result<Folder> {
        static MADE: AtomicU32 = AtomicU32::new(0);
        let nth = MADE.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("transfusion-bench-{}-{nth}", std::process::id()));
        fs::create_dir(&path).map_err(|e| Error::file(&path, format!("cannot be made: {e}")))?;
        Ok(Folder(path))
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Writes a text, and says where.
    ///
    /// # Errors
    /// If the disk refuses.
    pub fn text(&self, name: &str, text: &str) -> Result<PathBuf> {
        let path = self.0.join(name);
        fs::write(&path, text).map_err(|e| Error::file(&path, format!("cannot be written: {e}")))?;
        Ok(path)
    }

    /// Writes tensors as safetensors, and says where.
    ///
    /// # Errors
    /// If the disk refuses.
    pub fn tensors(&self, name: &str, tensors: &[(String, Spec, Host)]) -> Result<PathBuf> {
        let path = self.0.join(name);
        let listed: Vec<(&str, Spec)> = tensors.iter().map(|(n, s, _)| (n.as_str(), *s)).collect();
        weights::write(&path, &listed, |name, into| {
            if let Some((_, _, host)) = tensors.iter().find(|(n, ..)| n == name) {
                copy(host, into);
            }
            Ok(())
        })?;
        Ok(path)
    }

    /// Writes the tensors of a micro-batch and the noise that a step of a trainer adds to its images.
    ///
    /// # Errors
    /// If the disk refuses.
    pub fn batch(&self, name: &str, batch: &Batch, options: &TrainOptions) -> Result<PathBuf> {
        self.tensors(name, &batch_tensors(batch, options.seed))
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn copy(from: &Host, mut into: ViewMut<'_>) {
    let (from, into) = (from.view().bytes(), into.bytes());
    let n = from.len().min(into.len());
    into[..n].copy_from_slice(&from[..n]);
}

fn batch_tensors(b: &Batch, seed: u64) -> Vec<(String, Spec, Host)> {
    let g = b.geometry;
    let mut all = Vec::new();
    let mut add = |name: &str, shape: [usize; 2], host: Host| {
        all.push((name.to_string(), Spec::new(shape, host.view().dtype()), host));
    };
    let rows = [g.rows, g.positions];
    for (name, shape, values) in [
        ("tokens", rows, &b.tokens),
        ("positions", rows, &b.positions),
        ("row_start", rows, &b.row_start),
        ("row_end", rows, &b.row_end),
        ("text_rows", [1, g.text_rows], &b.text_rows),
        ("targets", [1, g.text_rows], &b.targets),
    ] {
        add(name, shape, Host::I32(values.clone()));
    }
    add("text_count", [1, 1], Host::F32(vec![b.text_count as f32]));
    if g.images == 0 {
        return all;
    }
    add("image_rows", [g.images, g.patches()], Host::I32(b.image_rows.clone()));
    add("coefficients", [g.images, 4], Host::F32(b.coefficients.clone()));
    for (name, values) in [("times", &b.times), ("image_weights", &b.image_weights)] {
        add(name, [1, g.images], Host::F32(values.clone()));
    }
    add("image_count", [1, 1], Host::F32(vec![b.image_count as f32]));
    let pictures = [("images", b.images.clone()), ("noise", noise(b, seed))];
    for (name, values) in pictures {
        let spec = [g.images, g.resolution, g.resolution, g.channels];
        let host = Host::F32(values);
        all.push((name.to_string(), Spec::new(spec, host.view().dtype()), host));
    }
    all
}

/// The noise of the op `q_sample`, keyed as there.
fn noise(b: &Batch, seed: u64) -> Vec<f32> {
    let (n, seed) = (b.geometry.values(), halves(seed).map(u32::cast_signed));
    let mut all = vec![0.0; b.geometry.images * n];
    for (key, noise) in b.noise_keys.chunks_exact(3).zip(all.chunks_mut(n.max(1))) {
        let stream = Stream::from_words(seed, Purpose::Noise, [key[0], key[1]]);
        stream.fill_normal((key[2].max(0) as usize * n.next_multiple_of(4)) as u32, noise);
    }
    all
}
