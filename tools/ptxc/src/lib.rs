//! Compiles `kernels-cu/` to the committed PTX, and proves that the two belong together.
//!
//! In reading order: [`arch`] (what is compiled for), [`source`] (a kernel, its includes, its stamp),
//! [`canonical`] (the committed form), [`contract`] (what a source promises of its entries), [`wheel`] (the
//! pinned tools), [`nvrtc`] (the compiler), [`ptxas`] (the assembler), [`tree`] (all of it over a tree).
pub mod arch;
pub mod canonical;
pub mod contract;
pub mod error;
pub mod nvrtc;
pub mod ptxas;
pub mod source;
pub mod tree;
pub mod wheel;

pub use arch::Arch;
pub use contract::Contract;
pub use error::{Error, Result};
pub use nvrtc::Nvrtc;
pub use source::Source;
pub use tree::Tree;
