//! The rungs of `kernels-cu/ladder`: held as the real kernels are, and counted as its README says.
use std::{collections::BTreeSet, fs, sync::Arc};
use transfusion_core::{Error, agreement, tensor::Host};
use transfusion_ptx::Module;
use transfusion_ptxsim::SimDevice;
use transfusion_tests::{
    judge::{self, Secret, simulator},
    rungs::{self, LADDERS, Rung, TARGET},
};

/// Cases with more operations are left to the real kernel: the first rungs take long.
const FLOPS: u64 = 50_000_000;

/// Cases that a rung takes at least.
const CASES: usize = 10;

/// What is wrong with the rungs of an op.
fn climb(op: &str) {
    let applications = rungs::applications(op, FLOPS);
    let mut cpu = agreement::cpu(1).unwrap();
    let expected: Vec<_> = applications.iter().map(|a| a.expected(&mut cpu).unwrap()).collect();
    let secrets = judge::secrets(op);
    let mut faults = vec![];
    for rung in Rung::of(op).into_iter().map(Arc::new) {
        let mut machines = [0, 1].map(|s| simulator(TARGET, s, std::slice::from_ref(&rung.module)));
        let (mut taken, mut refused) = (0, String::new());
        for (a, expected) in applications.iter().zip(&expected) {
            let mut fault = |what: String| faults.push(format!("{op}/{}: {a}: {what}", rung.name));
            let runs = machines.each_mut().map(|machine| rung.application(a).run(machine));
            match runs {
                [Err(Error::NoKernel { why, .. }), _] => {
                    refused = why;
                    continue;
                }
                [Ok(first), Ok(second)] => {
                    let broken = expected.compare(&first).into_iter().filter(|worst| !worst.holds());
                    broken.for_each(|worst| fault(worst.to_string()));
                    if !same_bits(&first, &second) {
                        fault("another schedule changes bits".into());
                    }
                }
                [Err(e), _] | [_, Err(e)] => fault(e.to_string()),
            }
            match rung.promise(a) {
                Ok(None) => {}
                Ok(Some(cost)) if cost == a.cost() => {}
                other => fault(format!("its contract says {other:?}, the op {:?}", a.cost())),
            }
            taken += 1;
        }
        faults.extend(untrue(op, &rung, &secrets, &mut machines[0]));
        let launched = machines[0].counters();
        let entries = rung.module.entries().unwrap().into_iter().map(|e| e.name);
        let left: Vec<String> = entries.filter(|name| !launched.contains_key(name)).collect();
        assert!(left.is_empty(), "{op}/{}: no case launches {left:?}", rung.name);
        assert!(taken >= CASES, "{op}/{} takes {taken} cases: {refused}", rung.name);
    }
    assert!(faults.is_empty(), "{} faults:\n{}", faults.len(), faults[..faults.len().min(5)].join("\n"));
}

/// What is not as a rung's contract says: where poison comes through that it hides, or that no mask has to hide; and the
/// operands that it says nothing of, though it hides them.
fn untrue(op: &str, rung: &Arc<Rung>, secrets: &[Secret], machine: &mut SimDevice) -> Vec<String> {
    let hides = |name: &&str| rung.hides.iter().any(|own| own == name);
    let (mut faults, mut silent) = (vec![], BTreeSet::new());
    let mut open = BTreeSet::new();
    for secret in secrets {
        let on = rung.application(secret.application());
        if matches!(on.plan(Some(&TARGET)), Err(Error::NoKernel { .. })) {
            continue;
        }
        silent.extend(secret.masked().filter(|name| !hides(name)));
        for leak in secret.leaks(&on, machine) {
            match leak.operands {
                [one] if !hides(one) => drop(open.insert(*one)),
                all if all.iter().all(hides) => faults.push(format!("{op}/{}: {}", rung.name, leak.what)),
                _ => {}
            }
        }
    }
    silent.retain(|name| !open.contains(name));
    faults.extend(silent.iter().map(|name| format!("{op}/{} hides {name}, and could say so", rung.name)));
    faults
}

fn same_bits(a: &[Host], b: &[Host]) -> bool {
    a.iter().zip(b).all(|(a, b)| a.view().bytes() == b.view().bytes())
}

#[test]
fn attention() {
    climb("attention");
}

#[test]
fn linear() {
    climb("linear");
}

#[test]
fn rmsnorm() {
    climb("rmsnorm");
}

#[test]
fn every_file_is_a_rung() {
    for (op, rungs) in LADDERS {
        let files = fs::read_dir(rungs::kernels().join("ladder").join(op)).unwrap();
        let files = files.map(|f| f.unwrap().path()).filter(|f| f.extension().is_some_and(|e| e == "cu"));
        let files: BTreeSet<_> = files.map(|f| f.file_stem().unwrap().to_owned()).collect();
        assert_eq!(files, rungs.iter().map(Into::into).collect(), "{op}");
    }
}

#[test]
fn the_readme_says_what_the_simulator_counts() {
    let text = fs::read_to_string(rungs::kernels().join("ladder/README.md")).unwrap();
    let fresh = rungs::readme(&text);
    let changed = text.lines().zip(fresh.lines()).find(|(old, new)| old != new);
    let remedy = "cargo run --release -p transfusion-tests --example ladder write";
    assert!(text == fresh, "{changed:?}: {remedy}");
}

#[test]
fn a_rung_without_its_barriers_is_found() {
    let mut rung = Rung::of("linear").remove(1);
    let text = rung.module.text.replace("bar.sync \t0;", "bar.warp.sync 0xffffffff;");
    assert_ne!(text, rung.module.text);
    rung.module = Module::new("sm_80", "shared_tile", text);
    let (a, _) = rungs::shown("linear");
    let mut machine = simulator(TARGET, 0, std::slice::from_ref(&rung.module));
    let said = Arc::new(rung).application(&a).run(&mut machine).unwrap_err().to_string();
    assert!(said.contains("race"), "{said}");
}

#[test]
fn a_contract_that_says_too_much_or_too_little_is_found() {
    let secrets = judge::secrets("attention");
    let said = |name: &str, hides: &[&str]| {
        let mut rung = Rung::of("attention").into_iter().find(|rung| rung.name == name).unwrap();
        rung.hides = hides.iter().map(|name| name.to_string()).collect();
        let mut machine = simulator(TARGET, 0, std::slice::from_ref(&rung.module));
        untrue("attention", &Arc::new(rung), &secrets, &mut machine)
    };
    let too_much = said("tensor_core", &["k", "v"]);
    assert!(too_much.iter().any(|f| f.contains("poison: v") && f.contains("becomes NaN")), "{too_much:?}");
    assert_eq!(said("shared_tile", &["k"]), ["attention/shared_tile hides v, and could say so"]);
}

#[test]
fn a_rung_refuses_what_it_has_no_use_for() {
    let naive = Arc::new(Rung::of("linear").remove(0));
    let all = rungs::applications("linear", FLOPS);
    let with_bias = all.iter().find(|a| a.specs.len() == 3 && a.plan(Some(&TARGET)).is_ok()).unwrap();
    let refused = naive.application(with_bias).plan(Some(&TARGET)).unwrap_err().to_string();
    assert!(refused.contains("naive has no use for In(2)"), "{refused}");
    let norm = Arc::new(Rung::of("rmsnorm").pop().unwrap());
    let all = rungs::applications("rmsnorm", FLOPS);
    let wide = all.iter().find(|a| a.specs[1].shape.last() == 1032).unwrap();
    let refused = norm.application(wide).plan(Some(&TARGET)).unwrap_err().to_string();
    assert!(refused.contains("in_registers needs C <= 1024"), "{refused}");
}
