//! Hugging Face folders: `config.json` and `model.safetensors` under Llama names and layouts, in and
//! out. What Llama lacks goes under `transfusion.*`, which other programs pass over.
//!
//! Our layouts differ by the order of rows alone: rotary pairs lie adjacent where Hugging Face keeps
//! half a head between them, and gate and up are interleaved. So every external tensor is a list of
//! rows of an internal one, and the round trip is exact.
use crate::{
    config::ModelConfig,
    engine::Engine,
    error::{Error, Result},
    model::weights,
};
use serde_json::{Map, Value, json};
use std::path::Path;
use transfusion_core::{
    checkpoint::{Writer, weights::Weights},
    device::Device,
    op::Kind,
    tensor::{DType, Host, Shape, Spec, ViewMut},
};

/// A tensor under its external name.
#[derive(Clone, Debug)]
pub struct External {
    /// Its name in a folder.
    pub name: String,
    /// The weight whose rows it holds.
    pub internal: String,
    /// The internal row of each external row.
    rows: Vec<usize>,
    /// Elements of a row; 1 for a vector, whose elements are its rows.
    width: usize,
    vector: bool,
}

/// Every external tensor of a model.
pub fn externals(c: &ModelConfig) -> Vec<External> {
    let heads = c.heads();
    let (q, kv, d) = (heads.heads * heads.width, heads.kv_heads * heads.width, heads.width);
    // Element j of a head there is element 2j (first half) or 2(j - D/2) + 1 (second half) here.
    let pair = |j: usize| if j < d / 2 { 2 * j } else { 2 * (j - d / 2) + 1 };
    let rotary = |at: usize, n: usize| (0..n).map(|r| at + r / d * d + pair(r % d)).collect::<Vec<_>>();
    let mut all = Vec::new();
    for w in weights(c) {
        let (rows, width) = (w.shape[0], w.shape.get(1).copied().unwrap_or(1));
        let vector = w.shape.len() == 1;
        let mut add = |name: String, rows: Vec<usize>| {
            all.push(External { name, internal: w.name.clone(), rows, width, vector });
        };
        let prefix = w.name.rsplit_once('.').and_then(|(s, _)| s.rsplit_once('.')).map_or("", |(s, _)| s);
        if w.name.ends_with("self_attn.qkv.weight") {
            add(format!("{prefix}.q_proj.weight"), rotary(0, q));
            add(format!("{prefix}.k_proj.weight"), rotary(q, kv));
            add(format!("{prefix}.v_proj.weight"), (q + kv..q + 2 * kv).collect());
        } else if w.name.ends_with("mlp.gate_up.weight") {
            add(format!("{prefix}.gate_proj.weight"), (0..rows / 2).map(|f| 2 * f).collect());
            add(format!("{prefix}.up_proj.weight"), (0..rows / 2).map(|f| 2 * f + 1).collect());
        } else if w.name.ends_with("q_norm.weight") || w.name.ends_with("k_norm.weight") {
            add(w.name.clone(), rotary(0, d));
        } else {
            add(w.name.clone(), (0..rows).collect());
        }
    }
    all
}

impl External {
    /// Its type, stored as `dtype`.
    pub fn spec(&self, dtype: DType) -> Spec {
        let rows = self.rows.len();
        let shape: Shape = if self.vector { [rows].into() } else { [rows, self.width].into() };
        Spec::new(shape, dtype)
    }

    /// Its elements, out of those of the whole weight; none where the weight is shorter.
    pub fn take<'a>(&'a self, internal: &'a [f32]) -> impl Iterator<Item = f32> + 'a {
        let row = |&r: &usize| internal.get(r * self.width..(r + 1) * self.width).unwrap_or_default();
        self.rows.iter().flat_map(row).copied()
    }

    /// Puts its elements where they belong among those of the whole weight.
    pub fn put(&self, external: &[f32], internal: &mut [f32]) {
        for (r, from) in self.rows.iter().zip(external.chunks_exact(self.width)) {
            if let Some(to) = internal.get_mut(r * self.width..(r + 1) * self.width) {
                to.copy_from_slice(from);
            }
        }
    }
}

/// Writes a new folder that `transformers` loads: the running means where there are any, else the
/// weights.
///
/// # Errors
/// If the folder exists, or the disk refuses.
pub fn export(engine: &mut Engine, folder: &Path) -> Result<()> {
    let config = engine.config().clone();
    let kind = if engine.has_ema() { Kind::Ema } else { Kind::Param };
    let all = externals(&config);
    let specs: Vec<(&str, Spec)> = all.iter().map(|e| (e.name.as_str(), e.spec(config.dtype()))).collect();
    let mut writer = Writer::create(folder)?;
    writer.tensors("model.safetensors", &specs, |name, into| {
        let Some(e) = all.iter().find(|e| e.name == name) else { return Ok(()) };
        let values = engine.read_weight(kind, &e.internal).map_err(|why| transfusion_core::Error::Place {
            what: e.internal.clone(),
            why: why.to_string(),
        })?;
        let rows = e.take(&values);
        match into {
            ViewMut::F32(to) => to.iter_mut().zip(rows).for_each(|(to, x)| *to = x),
            ViewMut::Bf16(to) => to.iter_mut().zip(rows).for_each(|(to, x)| *to = half::bf16::from_f32(x)),
            _ => {}
        }
        Ok(())
    })?;
    let text =
        serde_json::to_string_pretty(&exported_config(&config)?).map_err(|e| Error::file(folder, e))?;
    writer.text("config.json", &text)?;
    Ok(writer.commit()?)
}

/// The configuration with the keys that `transformers` looks for. Query and key norms make it a
/// Qwen3, whose tensors have the same names.
fn exported_config(c: &ModelConfig) -> Result<Value> {
    let mut value = serde_json::to_value(c).map_err(|e| Error::Config(e.to_string()))?;
    let (kind, class) =
        if c.qk_norm() { ("qwen3", "Qwen3ForCausalLM") } else { ("llama", "LlamaForCausalLM") };
    if let Some(map) = value.as_object_mut() {
        let mut set = |key: &str, value: Value| map.insert(key.into(), value);
        set("architectures", json!([class]));
        set("model_type", json!(kind));
        set("hidden_act", json!("silu"));
        set("attention_bias", json!(false));
        set("mlp_bias", json!(false));
    }
    Ok(value)
}

/// Reads a Hugging Face `config.json`: a Llama, a Qwen3, or one of ours.
///
/// # Errors
/// Names the file, the key and its value.
pub fn read_config(path: &Path) -> Result<ModelConfig> {
    let text =
        std::fs::read_to_string(path).map_err(|e| Error::file(path, format!("cannot be read: {e}")))?;
    let mut map: Map<String, Value> =
        serde_json::from_str(&text).map_err(|e| Error::file(path, format!("is no JSON object: {e}")))?;
    settle(&mut map);
    let config: ModelConfig = serde_json::from_value(Value::Object(map))
        .map_err(|e| Error::file(path, format!("is no configuration of a model: {e}")))?;
    config.check().map_err(|e| Error::file(path, e))?;
    Ok(config)
}

/// Newer spellings of what older files say, in the older spelling.
fn settle(map: &mut Map<String, Value>) {
    if let Some(rope) = map.remove("rope_parameters") {
        match rope.get("rope_type").and_then(Value::as_str) {
            None | Some("default") => {
                if let Some(theta) = rope.get("rope_theta") {
                    map.insert("rope_theta".into(), theta.clone());
                }
            }
            Some(_) => {
                map.insert("rope_scaling".into(), rope);
            }
        }
    }
    if let Some(dtype) = map.remove("dtype") {
        map.entry("torch_dtype").or_insert(dtype);
    }
    // Half precision is widened when it is read.
    if map.get("torch_dtype").is_some_and(|d| d == "float16") {
        map.insert("torch_dtype".into(), "float32".into());
    }
}

/// Loads a folder of `config.json` and `model.safetensors` (or its shards). Tensors that the model
/// does not have are passed over.
///
/// # Errors
/// Names the file or the tensor that is missing, and shapes that do not fit.
pub fn import(folder: &Path, device: Box<dyn Device>) -> Result<Engine> {
    let config = read_config(&folder.join("config.json"))?;
    let files = Weights::open(folder)?;
    let mut engine = Engine::new(config.clone(), device)?;
    let all = externals(&config);
    for w in engine.weights().to_vec() {
        let mut values = vec![0.0; w.shape.iter().product()];
        for e in all.iter().filter(|e| e.internal == w.name) {
            let have = files.spec(&e.name).map_err(|why| Error::file(folder, why))?;
            let want = e.spec(have.dtype);
            if have.shape != want.shape {
                let (have, want) = (have.shape, want.shape);
                let why = format!("tensor {} is {have:?}, config.json makes it {want:?}", e.name);
                return Err(Error::file(folder, why));
            }
            let host = match files.read(&e.name)? {
                Host::F32(values) => values,
                other => other.to_f64().iter().map(|x| *x as f32).collect(),
            };
            e.put(&host, &mut values);
        }
        engine.write_weight(Kind::Param, &w.name, &values)?;
    }
    Ok(engine)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every internal row is some external row, once.
    #[test]
    fn external_tensors_cover_every_row_once() {
        let mut c = ModelConfig::preset("tiny").unwrap();
        c.num_key_value_heads = Some(2);
        if let Some(t) = &mut c.transfusion {
            t.qk_norm = true;
        }
        for w in weights(&c) {
            let all = externals(&c);
            let mut rows: Vec<usize> =
                all.iter().filter(|e| e.internal == w.name).flat_map(|e| e.rows.clone()).collect();
            rows.sort_unstable();
            assert_eq!(rows, (0..w.shape[0]).collect::<Vec<_>>(), "{}", w.name);
        }
    }
}
