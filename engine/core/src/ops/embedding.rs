//! `y[n] = w[ids[n]]`: rows of a table of weights.
//!
//! The op is [`Graph::gather_rows`]: it sums its gradient straight into the accumulator of a weight.
use super::prelude::*;

impl Graph {
    /// `[N, C]`: the row of `w [V, C]` for each of the N elements of `ids` (i32). An id that is
    /// negative or not in the vocabulary is unused: its row is zero.
    #[track_caller]
    pub fn embedding(&mut self, w: Tensor, ids: Tensor) -> Tensor {
        self.gather_rows(w, ids)
    }
}

/// The vocabulary of the 1.4B model.
pub(super) fn speed_cases() -> Vec<Case> {
    let ids: Vec<i32> = (0..16_384u64).map(|n| (n * n * n % 32_003 * (n % 97) / 97) as i32).collect();
    let build = |g: &mut Graph, x: &[Tensor]| vec![g.embedding(x[0], x[1])];
    vec![
        Case::new("embedding", "32003x2048", build)
            .normal([32_003, 2048])
            .ints([16_384], &ids)
            .accumulating()
            .large(),
    ]
}

pub(super) fn cases() -> Vec<Case> {
    let case = |name, v: usize, c: usize, ids: &[i32]| {
        Case::new("embedding", name, |g, x| vec![g.embedding(x[0], x[1])])
            .normal([v, c])
            .ints([ids.len()], ids)
    };
    let text: Vec<i32> = (0..517).map(|n| n * n % 263 - 1).collect();
    let words: Vec<i32> = (0..4099).map(|n| n * 31 % 997 * (n * 17 % 89) % 1009).collect();
    vec![
        case("repeated and unused", 11, 3, &[7, 7, -1, 0, 10, 11, 7]),
        case("one id", 1, 1, &[0]),
        case("several chunks", 262, 67, &text),
        case("accumulated", 11, 8, &[7, 7, -1, 0, 10, 11, 7]).accumulating(),
        case("sums begin", 11, 8, &[7, 7, -1, 0, 10, 11, 7]).beginning(),
        case("words, sums begin", 1009, 128, &words).beginning().large(),
        case("bytes, accumulated", 256, 264, &text).accumulating().large(),
        case("words, accumulated", 1009, 128, &words).accumulating().large(),
        case("sums in bf16", 11, 8, &[7, 7, -1, 0, 10, 11, 7]).accumulating_in(DType::Bf16),
        case("words, sums in bf16", 1009, 128, &words).accumulating_in(DType::Bf16).large(),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        device::{CpuDevice, CpuOptions, Device, Place},
        op::Kind,
        plan::Plan,
        tensor::Host,
    };
    use std::sync::Arc;

    #[test]
    fn gradients_sum_over_uses_and_runs() {
        let mut g = Graph::new();
        let w = g.state(Kind::Param, "w", [3, 1], DType::Bf16);
        let ids = g.input("ids", [2, 2], DType::I32);
        let d = g.input("d", [4, 1], DType::Bf16);
        let (once, again) = (g.embedding(w, ids), g.embedding(w, ids));
        g.backward_from(&[(once, d), (again, d)], &[w]).unwrap();
        let mut device = CpuDevice::new(CpuOptions { threads: 2, poison: true }).unwrap();
        let plan = device.open(Arc::new(Plan::new(&g).unwrap())).unwrap();
        device.write(Place::Input(plan, "ids"), Host::I32(vec![2, -1, 2, 0]).view()).unwrap();
        let rows = Host::from_f64(DType::Bf16, [1.0, 10.0, 100.0, 1000.0]);
        device.write(Place::Input(plan, "d"), rows.view()).unwrap();
        for runs in 1..3 {
            device.run(plan).unwrap();
            let dw = device.fetch(Place::State(Kind::Grad, "w")).unwrap().to_f64();
            let runs = f64::from(runs);
            assert_eq!(dw, [2.0 * runs * 1000.0, 0.0, 2.0 * runs * 101.0]);
        }
    }
}
