//! The seam between a plan and a machine: a device sees places, launches and evals, nothing else.
mod cpu;
pub mod cuda;
pub mod ledger;
pub mod resolve;

pub use cpu::{CpuDevice, CpuOptions};
pub use cuda::{CudaDevice, CudaOptions};

use crate::{
    error::Result,
    launch::Target,
    op::Kind,
    plan::Plan,
    tensor::{Host, View, ViewMut},
};
use std::{sync::Arc, time::Duration};

/// A plan that a device has opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PlanId(pub(crate) usize);

/// Something on a device that the host can write or read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place<'a> {
    /// A state.
    State(Kind, &'a str),
    /// An input of a plan.
    Input(PlanId, &'a str),
    /// An output of a plan: valid from its run until any plan runs or is opened.
    Output(PlanId, &'a str),
}

/// A machine that replays plans.
pub trait Device: Send {
    /// What its plans are lowered for; `None` where the ops' own `eval` runs.
    fn target(&self) -> Option<Target> {
        None
    }

    /// Makes room for a plan: its inputs, the states it names (once; zero until written), and the
    /// scratch arena, which all plans share.
    ///
    /// # Errors
    /// If another plan gave one of its states another type, or memory runs out.
    fn open(&mut self, plan: Arc<Plan>) -> Result<PlanId>;

    /// Forgets a plan, its inputs, and the `Cache` states that no other open plan names; other states
    /// stay.
    fn close(&mut self, plan: PlanId);

    /// Copies host data to a place.
    ///
    /// # Errors
    /// If there is no such place, or `data` is of another dtype or length.
    fn write(&mut self, at: Place<'_>, data: View<'_>) -> Result<()>;

    /// Copies a place to the host.
    ///
    /// # Errors
    /// As [`Device::write`].
    fn read(&mut self, at: Place<'_>, into: ViewMut<'_>) -> Result<()>;

    /// A place's contents, in memory of their own.
    ///
    /// # Errors
    /// If there is no such place.
    fn fetch(&mut self, at: Place<'_>) -> Result<Host>;

    /// Runs a plan.
    ///
    /// # Errors
    /// If the plan is not open, or the machine fails.
    fn run(&mut self, plan: PlanId) -> Result<()>;

    /// Runs a plan and times every step.
    ///
    /// # Errors
    /// As [`Device::run`].
    fn profile(&mut self, plan: PlanId) -> Result<Vec<Duration>>;
}
