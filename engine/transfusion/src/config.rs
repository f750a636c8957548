//! What a model is: Hugging Face Llama keys and a `transfusion` block, and the presets.
use crate::{
    batch::Tokens,
    error::{Error, Result},
};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use transfusion_core::{cpu::Precision, ops::Heads, tensor::DType};

/// A model, under the keys of a Hugging Face `config.json`. Keys that we do not know are kept and
/// written again.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ModelConfig {
    /// Width C.
    pub hidden_size: usize,
    /// Feed-forward width F.
    pub intermediate_size: usize,
    /// Layers L.
    pub num_hidden_layers: usize,
    /// Query heads H.
    pub num_attention_heads: usize,
    /// Key and value heads; as many as query heads where absent.
    #[serde(default)]
    pub num_key_value_heads: Option<usize>,
    /// Head width D; C / H where absent.
    #[serde(default)]
    pub head_dim: Option<usize>,
    /// Vocabulary V, padding included.
    pub vocab_size: usize,
    /// Longest sequence that the model is meant for.
    pub max_position_embeddings: usize,
    /// Epsilon of every RMSNorm.
    #[serde(default = "default_eps")]
    pub rms_norm_eps: f64,
    /// Base of the rotary angles.
    #[serde(default = "default_theta")]
    pub rope_theta: f64,
    /// Whether the output projection is the embedding.
    #[serde(default)]
    pub tie_word_embeddings: bool,
    /// Beginning of a document.
    #[serde(default)]
    pub bos_token_id: Option<u32>,
    /// End of a document.
    #[serde(default)]
    pub eos_token_id: Option<u32>,
    /// `float32` or `bfloat16`: what weights and activations are stored as.
    #[serde(default = "default_dtype")]
    pub torch_dtype: String,
    /// What Llama lacks; absent in a plain Llama folder.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub transfusion: Option<Extension>,
    /// Keys that we do not know.
    #[serde(flatten)]
    pub other: Map<String, Value>,
}

/// What Llama lacks.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Extension {
    /// Beginning of an image.
    pub boi_token_id: u32,
    /// End of an image.
    pub eoi_token_id: u32,
    /// Fills the end of a row.
    pub pad_token_id: u32,
    /// RMSNorm of every query and key head before RoPE.
    #[serde(default)]
    pub qk_norm: bool,
    /// What the factors of matrix products may be rounded to.
    #[serde(default)]
    pub matmul_precision: MatmulPrecision,
    /// Images; absent in a model of text alone.
    #[serde(default)]
    pub image: Option<ImageConfig>,
}

/// What the factors of matrix products may be rounded to where values are stored in f32; sums are f32 always.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MatmulPrecision {
    /// Nothing.
    #[default]
    Float32,
    /// bf16, on processors that are faster with it: those with AVX-512 BF16.
    Bfloat16,
}

/// What numbers are stored as.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Float {
    /// f32.
    #[default]
    Float32,
    /// bf16.
    Bfloat16,
}

impl Float {
    /// The type of tensors that hold them.
    pub fn dtype(self) -> DType {
        match self {
            Float::Float32 => DType::F32,
            Float::Bfloat16 => DType::Bf16,
        }
    }
}

/// How images enter and leave the model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ImageConfig {
    /// Side of a picture (or of its latent).
    pub size: usize,
    /// Channels: 3 for pixels.
    pub channels: usize,
    /// Side k of a patch: 1, 2, 4 or 8.
    pub patch_size: usize,
    /// What marks a patch's place in its image beside RoPE.
    #[serde(default)]
    pub positions: PatchPositions,
    /// What the model predicts.
    pub objective: Objective,
    /// Weight of the image loss.
    #[serde(default = "default_lambda")]
    pub lambda: f32,
}

/// What marks a patch's place in its image beside RoPE.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PatchPositions {
    /// Nothing: the paper.
    #[default]
    None,
    /// Fixed sines of column and row, added to the patch embeddings.
    Sine2d,
}

/// What the model predicts of a noised image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Objective {
    /// The noise (Ho et al. 2020): the paper.
    Epsilon,
    /// The clean image.
    X0,
    /// `v = a noise - b x0` (Salimans & Ho 2022).
    V,
    /// The velocity `noise - x0` of a straight path (Liu et al. 2022).
    Flow,
}

fn default_eps() -> f64 {
    1e-5
}
fn default_theta() -> f64 {
    10_000.0
}
fn default_lambda() -> f32 {
    5.0
}
fn default_dtype() -> String {
    "float32".into()
}

/// The names of the presets.
pub const PRESETS: &[&str] = &["tiny", "text-tiny", "0.16b", "0.37b", "0.76b", "1.4b", "7b"];

impl ModelConfig {
    /// A preset by name: `tiny` draws the demo's pictures, `text-tiny` is the size of nanoGPT's CPU
    /// recipe, the others have the sizes of the paper's Table 2 over latents of 32x32x8.
    ///
    /// # Errors
    /// If there is no such preset.
    pub fn preset(name: &str) -> Result<ModelConfig> {
        let paper = |c, f, l, h| {
            let latents = ImageConfig {
                size: 32,
                channels: 8,
                patch_size: 2,
                positions: PatchPositions::None,
                objective: Objective::Epsilon,
                lambda: 5.0,
            };
            ModelConfig { torch_dtype: "bfloat16".into(), ..llama(c, f, l, h, 32_000, 4096, Some(latents)) }
        };
        let pixels = ImageConfig {
            size: 32,
            channels: 3,
            patch_size: 8,
            positions: PatchPositions::None,
            objective: Objective::X0,
            lambda: 5.0,
        };
        Ok(match name {
            "tiny" => for_cpus(llama(128, 352, 4, 4, 256, 512, Some(pixels)), |t| t.qk_norm = true),
            "text-tiny" => for_cpus(llama(128, 320, 4, 4, 256, 64, None), |_| {}),
            "0.16b" => paper(768, 2048, 16, 12),
            "0.37b" => paper(1024, 2816, 24, 16),
            "0.76b" => paper(1536, 4096, 24, 24),
            "1.4b" => paper(2048, 5632, 24, 16),
            "7b" => paper(4096, 11_008, 32, 32),
            _ => {
                let known = PRESETS.join(", ");
                return Err(Error::Config(format!("there is no preset {name}; the presets are {known}")));
            }
        })
    }

    /// Head counts and width.
    pub fn heads(&self) -> Heads {
        let heads = self.num_attention_heads;
        Heads {
            heads,
            kv_heads: self.num_key_value_heads.unwrap_or(heads),
            width: self.head_dim.unwrap_or(self.hidden_size / heads.max(1)),
        }
    }

    /// What weights and activations are stored as.
    pub fn dtype(&self) -> DType {
        if self.torch_dtype == "bfloat16" { DType::Bf16 } else { DType::F32 }
    }

    /// The precision of matrix products of values stored as `dtype`. Those of bf16 lose nothing by it.
    pub fn precision(&self, dtype: DType) -> Precision {
        let asked = self.transfusion.as_ref().map(|t| t.matmul_precision).unwrap_or_default();
        match asked {
            MatmulPrecision::Float32 if dtype != DType::Bf16 => Precision::F32,
            _ => Precision::Bf16,
        }
    }

    /// How images enter and leave, if they do.
    pub fn image(&self) -> Option<&ImageConfig> {
        self.transfusion.as_ref().and_then(|t| t.image.as_ref())
    }

    /// Whether query and key heads are normalised.
    pub fn qk_norm(&self) -> bool {
        let qwen3 = self.other.get("model_type").is_some_and(|m| m == "qwen3");
        qwen3 || self.transfusion.as_ref().is_some_and(|t| t.qk_norm)
    }

    /// The ids of the tokens that are not text; ids that a plain Llama lacks lie outside its
    /// vocabulary, so nothing matches them.
    pub fn tokens(&self) -> Tokens {
        let none = Tokens::behind(self.vocab_size.max(256) as u32);
        let id = |id: Option<u32>, none: i32| id.map_or(none, |id| id as i32);
        let t = self.transfusion.as_ref();
        Tokens {
            bos: id(self.bos_token_id, none.bos),
            eos: id(self.eos_token_id, none.eos),
            boi: id(t.map(|t| t.boi_token_id), none.boi),
            eoi: id(t.map(|t| t.eoi_token_id), none.eoi),
            pad: id(t.map(|t| t.pad_token_id), none.pad),
        }
    }

    /// Refuses what no model can be built from.
    ///
    /// # Errors
    /// Names the key, its value and what is allowed.
    pub fn check(&self) -> Result<()> {
        let h = self.heads();
        let positive = [
            ("hidden_size", self.hidden_size),
            ("intermediate_size", self.intermediate_size),
            ("num_hidden_layers", self.num_hidden_layers),
            ("num_attention_heads", h.heads),
            ("num_key_value_heads", h.kv_heads),
            ("head_dim", h.width),
            ("vocab_size", self.vocab_size),
            ("max_position_embeddings", self.max_position_embeddings),
        ];
        for (key, value) in positive {
            if value == 0 || value > 1 << 24 {
                return Err(Error::Config(format!("{key} is {value}; it must be between 1 and 2^24")));
            }
        }
        let refuse = |why: String| Err(Error::Config(why));
        if !h.heads.is_multiple_of(h.kv_heads) {
            return refuse(format!(
                "num_attention_heads {} is not a multiple of num_key_value_heads {}",
                h.heads, h.kv_heads
            ));
        }
        if !h.width.is_multiple_of(2) {
            return refuse(format!("head_dim {} is odd; RoPE rotates pairs", h.width));
        }
        if !["float32", "bfloat16"].contains(&self.torch_dtype.as_str()) {
            return refuse(format!("torch_dtype {} is not float32 or bfloat16", self.torch_dtype));
        }
        self.check_foreign_keys()?;
        if self.transfusion.is_some() {
            let t = self.tokens();
            for (key, id) in [
                ("bos_token_id", t.bos),
                ("eos_token_id", t.eos),
                ("boi_token_id", t.boi),
                ("eoi_token_id", t.eoi),
                ("pad_token_id", t.pad),
            ] {
                if id < 0 || id as usize >= self.vocab_size {
                    let v = self.vocab_size;
                    return refuse(format!("{key} {id} is missing or outside the vocabulary of {v}"));
                }
            }
        }
        self.image().map_or(Ok(()), |image| image.check(self.hidden_size))
    }

    /// Keys of Hugging Face configurations that would change the computation.
    fn check_foreign_keys(&self) -> Result<()> {
        for (key, wanted) in [
            ("hidden_act", Value::from("silu")),
            ("attention_bias", Value::from(false)),
            ("mlp_bias", Value::from(false)),
            ("rope_scaling", Value::Null),
        ] {
            if let Some(value) = self.other.get(key).filter(|v| **v != wanted) {
                return Err(Error::Config(format!("{key} is {value}; only {wanted} is supported")));
            }
        }
        Ok(())
    }
}

impl ImageConfig {
    /// Patches of one image.
    pub fn patches(&self) -> usize {
        self.grid() * self.grid()
    }

    /// Patches along a side.
    pub fn grid(&self) -> usize {
        self.size / self.patch_size.max(1)
    }

    /// Values of a patch vector, padded to a multiple of eight.
    pub fn patch_width(&self) -> usize {
        (self.patch_size * self.patch_size * self.channels).next_multiple_of(8)
    }

    fn check(&self, width: usize) -> Result<()> {
        let ImageConfig { size, channels, patch_size: k, .. } = *self;
        let refuse = |why: String| Err(Error::Config(why));
        if ![1, 2, 4, 8].contains(&k) {
            return refuse(format!("patch_size {k} is not 1, 2, 4 or 8"));
        }
        if size == 0 || size > 4096 || !size.is_multiple_of(k) {
            return refuse(format!("image size {size} is not a multiple of patch_size {k} below 4097"));
        }
        if channels == 0 || channels > 64 {
            return refuse(format!("channels is {channels}; it must be between 1 and 64"));
        }
        if self.positions == PatchPositions::Sine2d && !width.is_multiple_of(4) {
            return refuse(format!(
                "hidden_size {width} is not a multiple of 4, which sine2d positions need"
            ));
        }
        if !self.lambda.is_finite() || self.lambda < 0.0 {
            return refuse(format!("lambda is {}; it must be a number from 0 up", self.lambda));
        }
        Ok(())
    }
}

/// The same, small enough for a CPU: tied, with the fastest products.
fn for_cpus(mut c: ModelConfig, further: impl FnOnce(&mut Extension)) -> ModelConfig {
    c.tie_word_embeddings = true;
    if let Some(t) = &mut c.transfusion {
        t.matmul_precision = MatmulPrecision::Bfloat16;
        further(t);
    }
    c
}

/// A Llama with our five tokens behind `text` tokens of text.
fn llama(
    c: usize,
    f: usize,
    layers: usize,
    heads: usize,
    text: usize,
    positions: usize,
    image: Option<ImageConfig>,
) -> ModelConfig {
    let first = text as u32;
    let padded = if text > 256 { 128 } else { 8 };
    ModelConfig {
        hidden_size: c,
        intermediate_size: f,
        num_hidden_layers: layers,
        num_attention_heads: heads,
        num_key_value_heads: Some(heads),
        head_dim: Some(c / heads),
        vocab_size: (text + 5).next_multiple_of(padded),
        max_position_embeddings: positions,
        rms_norm_eps: default_eps(),
        rope_theta: default_theta(),
        tie_word_embeddings: false,
        bos_token_id: Some(first),
        eos_token_id: Some(first + 1),
        torch_dtype: default_dtype(),
        transfusion: Some(Extension {
            boi_token_id: first + 2,
            eoi_token_id: first + 3,
            pad_token_id: first + 4,
            qk_norm: false,
            matmul_precision: MatmulPrecision::default(),
            image,
        }),
        other: Map::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn presets_are_sound_and_survive_json() {
        for name in PRESETS {
            let c = ModelConfig::preset(name).unwrap();
            c.check().unwrap();
            let text = serde_json::to_string(&c).unwrap();
            assert_eq!(serde_json::from_str::<ModelConfig>(&text).unwrap(), c);
        }
        assert!(ModelConfig::preset("7B").is_err());
    }
}
