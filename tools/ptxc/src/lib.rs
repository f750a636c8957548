//! Compiles `kernels-cu/` to the committed PTX, and proves that the two belong together.
//!
//! In reading order: [`arch`] (what is compiled for), [`source`] (a kernel, its includes, its stamp),
//! [`canonical`] (the committed form), [`wheel`] (the pinned tools), [`nvrtc`] (the compiler).
pub mod arch;
pub mod canonical;
pub mod error;
pub mod nvrtc;
pub mod source;
pub mod wheel;

pub use arch::Arch;
pub use error::{Error, Result};
pub use nvrtc::Nvrtc;
pub use source::Source;
