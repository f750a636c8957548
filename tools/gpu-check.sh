#!/usr/bin/env bash
# Checks everything on a machine with an NVIDIA GPU, times it, and prints a short table last.
#
#   tools/gpu-check.sh [BINARY [FOLDER [DEVICE]]]
#
# BINARY is `transfusion` [default: target/release/transfusion]; it may have been built elsewhere. Logs go
# to FOLDER [default: gpu-check], which is made. Needs the driver; uses compute-sanitizer, and python3 with
# torch for what the kernels are held against, where they are installed. DEVICE is cuda, cuda:N, or sim, which
# tries this script without a GPU. Exit code 0 if all checks pass.
set -uo pipefail
cd "$(dirname "$0")/.."
bin=$(realpath "${1:-target/release/transfusion}")
out=${2:-gpu-check}
device=${3:-cuda}
mkdir -p "$out" || exit 1
[ -x "$bin" ] || { echo "$bin: not there; build it with cargo build --release" >&2; exit 2; }

rows=()
failed=0

# row NAME STATE DETAIL
row() { rows+=("$(printf '%-22s %-8s %s' "$1" "$2" "$3")"); [ "$2" = FAILED ] && failed=1; return 0; }

# check NAME SECONDS COMMAND...: the output goes to FOLDER/NAME.log, its last line into the table
check() {
    local name=$1 limit=$2 start=$SECONDS
    shift 2
    timeout "$limit" "$@" >"$out/$name.log" 2>&1
    local code=$?
    local took=$((SECONDS - start))
    case $code in
        0) row "$name" ok "${took} s" ;;
        124) row "$name" FAILED "not done after $limit s: $out/$name.log" ;;
        *) row "$name" FAILED "exit code $code: $(tail -n 1 "$out/$name.log" | cut -c1-120)" ;;
    esac
    return $code
}

# Losses of two runs, step by step: the largest difference.
losses() {
    python3 - "$1/metrics.jsonl" "$2/metrics.jsonl" <<'PY'
import json, sys
read = lambda p: {r["step"]: r["loss"] for r in map(json.loads, open(p)) if "loss" in r}
a, b = map(read, sys.argv[1:])
steps = sorted(set(a) & set(b))
worst = max(abs(a[s] - b[s]) for s in steps)
print(f"{len(steps)} losses, largest difference {worst:.4f}")
sys.exit(worst > 0.02)
PY
}

# A few steps of training on both devices; nothing while an op of the model has no kernel.
training() {
    local settings=(--preset tiny --data shapes --steps 20 --seed 1 --set model.torch_dtype=bfloat16)
    rm -rf "$out/run-cpu" "$out/run-cuda"
    if ! "$bin" train "${settings[@]}" --device "$device" --out "$out/run-cuda" >"$out/training.log" 2>&1; then
        if grep -q 'has no kernel' "$out/training.log"; then
            row training skipped "$(grep -o '[a-z_]* has no kernel' "$out/training.log" | head -n 1)"
        else
            row training FAILED "$(tail -n 2 "$out/training.log" | head -n 1)"
        fi
        return
    fi
    "$bin" train "${settings[@]}" --device cpu --out "$out/run-cpu" >>"$out/training.log" 2>&1
    local said
    if said=$(losses "$out/run-cpu" "$out/run-cuda"); then row training ok "$said"; else row training FAILED "$said"; fi
}

check doctor 30 "$bin" doctor
[ "$device" != sim ] && grep -q 'missing: no CUDA device' "$out/doctor.log" && { cat "$out/doctor.log"; exit 1; }
check cases 150 "$bin" kernels check --device "$device"
# Launches for two SMs take the large tiles, which small cases do not fill a whole machine with.
check cases-large 90 "$bin" kernels check linear attention cross_entropy --device "$device" --sms 2 --float bf16
training
if [ "$device" != sim ] && command -v compute-sanitizer >/dev/null; then
    for tool in memcheck racecheck synccheck initcheck; do
        check "$tool" 60 compute-sanitizer --tool "$tool" --error-exitcode 9 \
            "$bin" kernels check rmsnorm --device "$device" --float bf16
    done
else
    row sanitizer skipped "there is no compute-sanitizer, or nothing for it"
fi
check bench 90 "$bin" kernels bench --device "$device" --unchecked --float bf16 --json
if python3 -c 'import torch; torch.zeros(1).cuda()' 2>/dev/null; then
    for group in squares products rows attention; do
        check "peers-$group" 300 "$bin" bench ops --preset 0.16b --batch 1 --positions 1024 --dtype bf16 \
            --group "$group" --device "$device" --against torch --rounds 3
    done
    grep -h '^|' "$out"/peers-*.log >"$out/table.txt"
else
    row peers skipped "python3 has no torch that sees the GPU"
fi

[ -f "$out/table.txt" ] && cat "$out/table.txt"
head -n 6 "$out/doctor.log"
printf '%s\n' "${rows[@]}" | tee "$out/summary.txt"
exit $failed
