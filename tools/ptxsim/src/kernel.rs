//! Modules and kernels, ready to run.

use crate::decode;
use crate::error::{LaunchError, LoadError};
use crate::exec::Inst;
use crate::syntax::ast::Location;
pub use crate::syntax::ast::Parameter;
use std::collections::{HashMap, HashSet};

/// A PTX module whose kernels are decoded.
pub struct Module {
    version: String,
    target: String,
    kernels: Vec<Kernel>,
}

impl Module {
    /// Parses and decodes PTX. `file` is how errors and findings call the text.
    ///
    /// # Errors
    ///
    /// If the text is no PTX, or has an instruction or a form of one that is not implemented.
    pub fn load(file: &str, text: &str) -> Result<Self, LoadError> {
        let fail = |at: crate::syntax::At| LoadError { file: file.to_string(), line: at.line, why: at.why };
        let unit = crate::syntax::parse(text).map_err(fail)?;
        let kernels = unit.functions.iter().map(|f| decode::decode(file, f, &unit)).collect::<Result<_, _>>();
        Ok(Self { kernels: kernels.map_err(fail)?, version: unit.version, target: unit.target })
    }

    /// The `.version` of the text.
    pub fn version(&self) -> &str {
        &self.version
    }

    /// The `.target` of the text.
    pub fn target(&self) -> &str {
        &self.target
    }

    /// The kernels, in the order of the text.
    pub fn kernels(&self) -> &[Kernel] {
        &self.kernels
    }

    /// The kernel of this name.
    ///
    /// # Errors
    ///
    /// If there is none.
    pub fn kernel(&self, name: &str) -> Result<&Kernel, LaunchError> {
        self.kernels.iter().find(|k| k.name == name).ok_or_else(|| LaunchError::UnknownKernel {
            name: name.to_string(),
            known: self.kernels.iter().map(|k| k.name.clone()).collect(),
        })
    }
}

/// A special register.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Special {
    Thread(usize),
    Threads(usize),
    Block(usize),
    Blocks(usize),
    ClusterBlock(usize),
    ClusterBlocks(usize),
    Cluster(usize),
    Clusters(usize),
    ClusterRank,
    ClusterSize,
    Lane,
    Warp,
    Warps,
    /// Lanes below, at, above: `lt`, `le`, `eq`, `ge`, `gt`.
    LaneMask(LaneMask),
    DynamicShared,
    TotalShared,
    /// Known to be the same everywhere: grid id, multiprocessor id.
    Zero,
    One,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum LaneMask {
    Below,
    UpTo,
    At,
    From,
    Above,
}

/// An entry point, decoded.
pub struct Kernel {
    pub(crate) name: String,
    pub(crate) file: String,
    pub(crate) files: HashMap<u32, String>,
    pub(crate) code: Vec<Inst>,
    pub(crate) lists: Vec<u32>,
    pub(crate) rows: u32,
    pub(crate) predicates: u32,
    /// Rows that hold a constant: row, whether wide, value.
    pub(crate) constants: Vec<(u32, bool, u64)>,
    pub(crate) specials: Vec<(u32, Special)>,
    pub(crate) parameters: Vec<Parameter>,
    pub(crate) parameter_bytes: u32,
    pub(crate) shared_bytes: u32,
    /// Address at which dynamic shared memory starts.
    pub(crate) dynamic_shared: u32,
    pub(crate) local_bytes: u32,
    pub(crate) max_threads: Option<[u32; 3]>,
    pub(crate) exact_threads: bool,
    pub(crate) cluster: Option<[u32; 3]>,
    /// Module variables: initial bytes, whether constant.
    pub(crate) globals: Vec<(Vec<u8>, bool)>,
    pub(crate) locations: Vec<Option<Location>>,
    /// The narrow rows that each instruction reads or writes.
    pub(crate) touches: Vec<Vec<u32>>,
    /// `wgmma` instructions that some path reaches with registers written since the last `wgmma.fence`.
    pub(crate) unfenced: HashSet<u32>,
}

impl std::fmt::Debug for Kernel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Kernel({})", self.name)
    }
}

impl Kernel {
    /// The name of the entry point.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The parameters, in order.
    pub fn parameters(&self) -> &[Parameter] {
        &self.parameters
    }

    /// `.maxntid` or `.reqntid`: the largest block, where declared.
    pub fn max_threads(&self) -> Option<[u32; 3]> {
        self.max_threads
    }

    /// `.reqnctapercluster`: the cluster, where declared.
    pub fn cluster(&self) -> Option<[u32; 3]> {
        self.cluster
    }

    /// Bytes of static shared memory.
    pub fn shared_bytes(&self) -> u32 {
        self.shared_bytes
    }

    /// Instructions of the decoded code, with the few that the simulator adds.
    pub fn instructions(&self) -> usize {
        self.code.len()
    }

    /// Register rows per warp, after compaction.
    pub fn rows(&self) -> u32 {
        self.rows
    }

    /// The place in the source of a code position.
    pub(crate) fn source(&self, pc: u32) -> Option<(String, u32)> {
        let location = self.locations.get(pc as usize).copied().flatten()?;
        Some((self.files.get(&location.file)?.clone(), location.line))
    }
}
