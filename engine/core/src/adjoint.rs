//! Reverse-mode differentiation as a graph-to-graph pass.
use crate::{
    error::{Error, Result},
    graph::{Graph, Role},
    op::{Grad, Kind},
    tensor::{DType, Tensor},
};
use std::collections::{HashMap, HashSet};

impl Graph {
    /// Adds the nodes that add d(loss)/d(w) to the `Grad` state of every `w` (a `Param` state).
    /// A gradient state has its parameter's name and shape, at f32 (f64 for an f64 parameter).
    ///
    /// # Errors
    /// If an op on the way has no derivative, or the loss does not reach a parameter: freeze it by
    /// leaving it out of `params`.
    #[track_caller]
    pub fn backward(&mut self, loss: Tensor, params: &[Tensor]) -> Result<()> {
        self.check()?;
        let spec = self.spec(loss);
        if spec.shape.numel() != 1 {
            return Err(Error::Graph(format!("a loss is one number, this is {spec:?}")));
        }
        let one = self.fill(1.0, spec.shape, spec.dtype);
        self.backward_from(&[(loss, one)], params)
    }

    /// The same from given gradients of several tensors.
    ///
    /// # Errors
    /// As [`Graph::backward`].
    #[track_caller]
    pub fn backward_from(&mut self, seeds: &[(Tensor, Tensor)], params: &[Tensor]) -> Result<()> {
        self.check()?;
        self.open_accumulators(params)?;
        let live = self.depend_on(params);
        let mut grad: HashMap<Tensor, Tensor> = HashMap::new();
        for &(t, d) in seeds {
            self.collect(&mut grad, t, d);
        }
        let mut reached: HashSet<Tensor> = HashSet::new();
        for node in self.nodes.clone().iter().rev() {
            let d: Vec<_> = node.outs.iter().map(|o| grad.get(o).copied()).collect();
            if d.iter().all(Option::is_none) || !node.ins.iter().any(|t| live.contains(t)) {
                continue;
            }
            let given = node.op.adjoint(self, node, &d)?;
            if given.len() != node.ins.len() {
                let (op, have) = (node.op.name(), given.len());
                return Err(Error::Graph(format!(
                    "{op} gave {have} gradients for {} inputs",
                    node.ins.len()
                )));
            }
            for (&x, given) in node.ins.iter().zip(given) {
                match given {
                    Grad::Into(sum) => {
                        self.accumulators.insert(x, sum);
                        reached.insert(x);
                    }
                    Grad::To(dx) if self.accumulators.contains_key(&x) => {
                        let sum = self.add_into(self.accumulators[&x], dx);
                        self.accumulators.insert(x, sum);
                        reached.insert(x);
                    }
                    Grad::To(dx) if live.contains(&x) => self.collect(&mut grad, x, dx),
                    Grad::To(_) | Grad::Integer => {}
                    Grad::Stop(why) if live.contains(&x) && params.contains(&x) => {
                        return Err(node.no_adjoint(why));
                    }
                    Grad::Stop(_) => {}
                }
            }
        }
        self.accumulators.clear();
        self.check()?;
        match params.iter().find(|p| !reached.contains(p)) {
            Some(p) => Err(Error::Graph(format!(
                "the loss does not reach parameter {}; leave it out to freeze it",
                self.values[p.index()].name
            ))),
            None => Ok(()),
        }
    }

    /// A `Grad` state for every parameter.
    fn open_accumulators(&mut self, params: &[Tensor]) -> Result<()> {
        for &p in params {
            let value = self.values.get(p.index()).cloned();
            let Some(v) = value.filter(|v| v.role == Role::State(Kind::Param)) else {
                return Err(Error::Graph("a gradient is asked for something that is no parameter".into()));
            };
            let dtype = if v.spec.dtype == DType::F64 { DType::F64 } else { DType::F32 };
            let sum = self.state(Kind::Grad, &v.name, v.spec.shape, dtype);
            self.accumulators.insert(p, sum);
        }
        Ok(())
    }

    /// Every tensor that depends on one of `roots`, and the roots.
    fn depend_on(&self, roots: &[Tensor]) -> HashSet<Tensor> {
        let mut live: HashSet<Tensor> = roots.iter().copied().collect();
        for n in &self.nodes {
            if n.ins.iter().any(|t| live.contains(t)) {
                live.extend(&n.outs);
            }
        }
        live
    }

    fn collect(&mut self, grad: &mut HashMap<Tensor, Tensor>, x: Tensor, dx: Tensor) {
        let sum = grad.get(&x).map_or(dx, |&have| self.add(have, dx));
        grad.insert(x, sum);
    }
}
