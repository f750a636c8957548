//! Reverse-mode differentiation as a graph-to-graph pass; what was not kept for it is computed again in front of
//! the first node that reads it.   Griewank & Walther 2000; Chen et al. 2016 (recomputation)
use crate::{
    error::{Error, Result},
    graph::{Computed, Graph, Node, Role},
    op::{Grad, Kind},
    tensor::{DType, Tensor},
};
use std::collections::{BTreeSet, HashMap, HashSet};

impl Graph {
    /// Adds the nodes that add d(loss)/d(w) to the `Grad` state of every `w` (a `Param` state), or begin it there
    /// ([`Graph::begins`]).
    /// A gradient state has its parameter's name and shape, and the type that [`Graph::gradients`] says.
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
        let (forward, recompute) = (self.nodes.len(), std::mem::replace(&mut self.recompute, false));
        let done = self.differentiate(seeds, params);
        self.recompute = recompute;
        done?;
        self.compute_again(forward);
        Ok(())
    }

    #[track_caller]
    fn differentiate(&mut self, seeds: &[(Tensor, Tensor)], params: &[Tensor]) -> Result<()> {
        self.open_accumulators(params)?;
        let live = self.depend_on(params);
        self.arrived.clear();
        let begun = self.accumulators.clone();
        for &(t, d) in seeds {
            self.arrive(t, d);
        }
        for node in self.nodes.clone().iter().rev() {
            let d: Vec<_> = node.outs.iter().map(|o| self.arrived.get(o).copied()).collect();
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
                    }
                    Grad::To(dx) if live.contains(&x) => self.arrive(x, dx),
                    Grad::To(_) | Grad::Integer => {}
                    Grad::Stop(why) if live.contains(&x) && params.contains(&x) => {
                        return Err(node.no_adjoint(why));
                    }
                    Grad::Stop(_) => {}
                }
            }
        }
        let sums = std::mem::take(&mut self.accumulators);
        self.arrived.clear();
        self.check()?;
        match params.iter().find(|p| sums[p] == begun[p]) {
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
            let narrow = self.gradients.unwrap_or(DType::F32);
            let dtype = if v.spec.dtype == DType::F64 { DType::F64 } else { narrow };
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

    /// Adds `dx` to the gradient of `x`, made before the node whose adjoint this is: to its accumulator where it has
    /// one, else to what has arrived.
    pub(crate) fn arrive(&mut self, x: Tensor, dx: Tensor) {
        if let Some(sum) = self.accumulator(x) {
            let sum = self.summed(x, sum, dx);
            self.accumulators.insert(x, sum);
            return;
        }
        let sum = self.arrived.get(&x).copied().map_or(dx, |have| self.add(have, dx));
        self.arrived.insert(x, sum);
    }
}

/// What the backward pass reads in place of values that were not kept.
struct Again {
    /// The node that makes each value that is not kept.
    makers: HashMap<Tensor, usize>,
    /// Its second version, where there is one already.
    made: HashMap<Tensor, Tensor>,
}

impl Again {
    /// Of the forward pass `nodes`.
    fn new(nodes: &[Node]) -> Again {
        let mut makers = HashMap::new();
        for (i, n) in nodes.iter().enumerate().filter(|(_, n)| n.computed == Computed::Twice) {
            let replaced = |o: usize| n.op.memory(o).replaced();
            let kept = |o: usize| replaced(o).is_some_and(|input| !makers.contains_key(&n.ins[input]));
            if !(0..n.outs.len()).any(kept) {
                makers.extend(n.outs.iter().map(|&out| (out, i)));
            }
        }
        Again { makers, made: HashMap::new() }
    }

    /// The nodes that make `t` and are not there yet, in the order of the forward pass.
    fn missing(&self, t: Tensor, nodes: &[Node]) -> BTreeSet<usize> {
        let (mut missing, mut wanted) = (BTreeSet::new(), vec![t]);
        while let Some(t) = wanted.pop() {
            let maker = self.makers.get(&t).filter(|_| !self.made.contains_key(&t));
            if let Some(&i) = maker
                && missing.insert(i)
            {
                wanted.extend(&nodes[i].ins);
            }
        }
        missing
    }

    fn version(&self, t: Tensor) -> Tensor {
        self.made.get(&t).copied().unwrap_or(t)
    }
}

impl Graph {
    /// Lets the nodes from `forward` on read what is not kept from nodes that compute it again.
    fn compute_again(&mut self, forward: usize) {
        let mut again = Again::new(&self.nodes[..forward]);
        if again.makers.is_empty() {
            return;
        }
        for mut node in self.nodes.split_off(forward) {
            for t in &mut node.ins {
                for i in again.missing(*t, &self.nodes) {
                    self.repeat(i, &mut again);
                }
                *t = again.version(*t);
            }
            self.nodes.push(node);
        }
    }

    /// Adds node `i` once more.
    fn repeat(&mut self, i: usize, again: &mut Again) {
        let mut node = Node { computed: Computed::Again, ..self.nodes[i].clone() };
        node.ins.iter_mut().for_each(|t| *t = again.version(*t));
        for out in &mut node.outs {
            let value = self.values[out.index()].clone();
            let second = self.value(value.spec, value.role, &value.name);
            again.made.insert(*out, second);
            *out = second;
        }
        self.nodes.push(node);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        op::Memory,
        ops::{Epilogue, Heads},
        plan::{Plan, Step},
    };

    /// A program over rows of 12 numbers, its loss the sum of squares of what `build` makes of a product.
    fn program(build: impl FnOnce(&mut Graph, Tensor) -> Tensor) -> Plan {
        let mut g = Graph::new();
        let x = g.input("x", [5, 12], DType::F32);
        let [w, v] = ["w", "v"].map(|name| g.state(Kind::Param, name, [12, 12], DType::F32));
        let y = g.linear(x, w, Epilogue::default());
        let y = build(&mut g, y);
        let v = g.reshape(v, [144 / g.spec(y).shape.last(), g.spec(y).shape.last()]);
        let y = g.linear(y, v, Epilogue::default());
        let d = g.input("d", g.spec(y).shape, DType::F32);
        let w = g.state(Kind::Param, "w", [12, 12], DType::F32);
        g.backward_from(&[(y, d)], &[w]).unwrap();
        Plan::new(&g).unwrap()
    }

    fn again(plan: &Plan) -> Vec<(usize, &Step)> {
        plan.steps.iter().enumerate().filter(|(_, s)| s.again).collect()
    }

    #[test]
    fn what_is_not_kept_is_computed_right_before_it_is_read() {
        let plan = program(|g, y| {
            g.recompute = true;
            let z = g.add(y, y);
            let z = g.swiglu(z);
            g.recompute = false;
            g.swiglu(z)
        });
        let again = again(&plan);
        let names: Vec<_> = again.iter().map(|(_, s)| s.op.name()).collect();
        assert_eq!(names, ["add", "swiglu"]);
        let reader = &plan.steps[again[1].0 + 1];
        assert_eq!(reader.op.name(), "swiglu_bwd");
        assert_eq!(reader.ins[0], again[1].1.outs[0]);
    }

    /// How many sums a backward pass takes beside that of the one accumulator, through `build` from `x [3, 8]` and a
    /// scale `[8]`.
    fn sums(build: impl FnOnce(&mut Graph, Tensor, Tensor) -> Vec<Tensor>) -> usize {
        let mut g = Graph::new();
        let p = g.state(Kind::Param, "p", [3, 16], DType::F32);
        let (x, w) = (g.swiglu(p), g.input("w", [8], DType::F32));
        let outs = build(&mut g, x, w);
        let forward = g.nodes.len();
        let seeds: Vec<_> = outs.into_iter().map(|y| (y, g.input("d", [3, 8], DType::F32))).collect();
        g.backward_from(&seeds, &[p]).unwrap();
        Plan::new(&g).unwrap();
        g.nodes[forward..].iter().filter(|n| n.op.name() == "add").count() - 1
    }

    #[test]
    fn a_norm_adds_to_what_has_arrived() {
        assert_eq!(sums(|g, x, w| vec![g.rmsnorm(x, w, 1e-5)]), 0);
        assert_eq!(sums(|g, x, w| vec![g.rmsnorm(x, w, 1e-5), x]), 0);
        assert_eq!(sums(|g, x, w| vec![g.rmsnorm(x, w, 1e-5), g.rmsnorm(x, w, 1e-5)]), 0);
        // Of both operands of a sum, before that of the norm; and behind it.
        assert_eq!(sums(|g, x, w| vec![g.rmsnorm(x, w, 1e-5), g.add(x, x)]), 1);
        let behind = |g: &mut Graph, x: Tensor, w: Tensor| vec![g.add(x, x), g.rmsnorm(x, w, 1e-5)];
        assert_eq!(sums(behind), 2);
    }

    #[test]
    fn the_gradient_of_what_is_gated_takes_no_pass_of_its_own() {
        let backward = |recompute: bool| {
            let mut g = Graph::new();
            let x = g.input("x", [3, 8], DType::F32);
            let [up, down] = [("up", [32, 8]), ("down", [8, 16])]
                .map(|(name, shape)| g.state(Kind::Param, name, shape, DType::F32));
            let pre = g.linear(x, up, Epilogue::default());
            g.recompute = recompute;
            let h = g.gated(pre);
            g.recompute = false;
            let y = g.linear(h, down, Epilogue::default());
            g.output("y", y);
            let d = g.input("d", [3, 8], DType::F32);
            g.backward_from(&[(y, d)], &[up, down]).unwrap();
            let plan = Plan::new(&g).unwrap();
            plan.steps.iter().skip(3).map(|s| s.op.name()).collect::<Vec<_>>()
        };
        assert_eq!(backward(false), ["linear_dw", "linear_dx", "linear_dw"]);
        assert_eq!(backward(true), ["swiglu", "linear_dw", "linear_dx", "linear_dw"]);
    }

    #[test]
    fn gradients_of_another_shape_than_the_value_are_summed_apart() {
        let apart = |g: &mut Graph, x: Tensor, w: Tensor| {
            let batched = g.reshape(x, [1, 3, 8]);
            let z = g.rmsnorm(batched, w, 1e-5);
            let a = g.input("a", [3, 8], DType::F32);
            vec![g.reshape(z, [3, 8]), g.add(a, batched)]
        };
        assert_eq!(sums(apart), 1);
        let gated = |g: &mut Graph, x: Tensor, _: Tensor| {
            let pre = g.reshape(x, [1, 3, 8]);
            let w = g.input("down", [8, 4], DType::F32);
            let h = g.gated(pre);
            let y = g.linear(h, w, Epilogue::default());
            let a = g.input("a", [3, 8], DType::F32);
            vec![g.add(a, y)]
        };
        assert_eq!(sums(gated), 0);
    }

    #[test]
    fn what_is_given_to_a_parameter_itself_is_added() {
        let mut g = Graph::new();
        let w = g.state(Kind::Param, "w", [3, 8], DType::F32);
        let d = g.input("d", [3, 8], DType::F32);
        let e = g.input("e", [3, 4], DType::F32);
        let y = g.swiglu(w);
        g.backward_from(&[(w, d), (y, e)], &[w]).unwrap();
        let sums = g.nodes.iter().filter(|n| n.op.name() == "add").count();
        assert_eq!((sums, Plan::new(&g).unwrap().steps.len()), (2, 3));
    }

    #[test]
    fn the_first_gradient_begins_a_sum_and_the_others_are_added() {
        let mut g = Graph::new();
        g.begins = true;
        let w = g.state(Kind::Param, "w", [8, 8], DType::F32);
        let x = g.input("x", [3, 8], DType::F32);
        let y = g.linear(x, w, Epilogue::default());
        let y = g.linear(y, w, Epilogue::default());
        let d = g.input("d", [3, 8], DType::F32);
        g.backward_from(&[(y, d)], &[w]).unwrap();
        let plan = Plan::new(&g).unwrap();
        let sums: Vec<_> = plan.steps.iter().filter(|s| s.op.name() == "linear_dw").collect();
        assert_eq!(
            sums.iter().map(|s| s.op.memory(0)).collect::<Vec<_>>(),
            [Memory::Over { input: 2 }, Memory::InPlace { input: 2 }]
        );
        // What begins reads nothing of before.
        assert_eq!(sums[1].cost.bytes - sums[0].cost.bytes, 8 * 8 * 4);
    }

    #[test]
    fn what_is_given_to_a_parameter_begins_its_sum() {
        let mut g = Graph::new();
        g.begins = true;
        let w = g.state(Kind::Param, "w", [3, 8], DType::F32);
        let [d, e] = ["d", "e"].map(|name| g.input(name, [3, 8], DType::F32));
        g.backward_from(&[(w, d), (w, e)], &[w]).unwrap();
        let names: Vec<_> = Plan::new(&g).unwrap().steps.iter().map(|s| s.op.name()).collect();
        assert_eq!(names, ["cast", "add"]);
    }

    #[test]
    fn what_replaces_a_kept_value_in_place_is_kept() {
        let heads = Heads { heads: 4, kv_heads: 1, width: 2 };
        let rotated = |copy: bool| {
            program(|g, y| {
                let at = g.input("at", [5], DType::I32);
                g.recompute = true;
                let y = if copy { g.add(y, y) } else { y };
                let y = g.rope(y, at, heads, 1e4);
                g.recompute = false;
                g.swiglu(y)
            })
        };
        assert!(again(&rotated(false)).is_empty());
        let copied = rotated(true);
        assert_eq!(again(&copied).iter().map(|(_, s)| s.op.name()).collect::<Vec<_>>(), ["add", "rope"]);
    }

    #[test]
    fn nothing_is_computed_again_that_nothing_reads() {
        let plan = program(|g, y| {
            g.recompute = true;
            let y = g.add(y, y);
            g.recompute = false;
            g.add(y, y)
        });
        assert!(again(&plan).is_empty());
    }
}
