#!/usr/bin/env bash
# Run everything that needs a GPU: GPU tests, roofline, benchmarks; print a summary at the end.
#
#     benchmarks/run_gpu.sh OUT [--minutes N] [--parts tests,roofline,loss,linear,loaders,step,reproduce]
#
# It ends within N minutes (9). Each part gets its share of the remaining time, starts no work near
# its end, and keeps what it has measured. OUT contains at most seven files: a record of each benchmark
# (JSON), of the reproduction, and log.txt with all output.
#
# Nothing is installed or downloaded. Parts need torch with its Triton, and: tests pytest, loaders
# numpy and numba, step and reproduce what the trainer needs. Parts that lack a package are skipped,
# as the summary says. With liger-kernel, torchvision, or FFCV and opencv-python-headless there are
# more rows; FFCV_WHEEL=FILE in the environment first installs FFCV from a wheel built by
# scripts/build_ffcv_wheel.sh. With DATA=FOLDER, class folders, reproduce compares students on them
# over EPOCHS (24); their runs go to OUT-runs, where another call resumes them. PYTHON names the
# interpreter. Without a GPU, small sizes run on the CPU, which only checks the scripts.
set -uo pipefail

usage() {
    echo "usage: $0 OUT [--minutes N] [--parts ${all// /,}]${1:+ ($1)}" >&2
    exit 2
}

# Shares of the time, relative to the sum over the selected parts.
declare -A weights=([tests]=30 [roofline]=5 [loss]=36 [linear]=12 [loaders]=12 [step]=26 [reproduce]=60)
all="tests roofline loss linear loaders step reproduce"
minutes=9 parts=
[[ $# -ge 1 && $1 != -* ]] || usage
target=$1
shift
while [[ $# -gt 0 ]]; do
    case $1 in
    --minutes)
        [[ ${2-} =~ ^[1-9][0-9]*$ ]] || usage "--minutes: a whole number, not '${2-}'"
        minutes=$2
        ;;
    --parts)
        parts=${2//,/ }
        [[ ${parts// /} ]] || usage "--parts: no part is named"
        for name in $parts; do
            [[ -n ${weights[$name]-} ]] || usage "--parts: no part '$name'"
        done
        ;;
    *) usage "$1" ;;
    esac
    shift $(($# > 1 ? 2 : 1))
done
if [[ -z $parts ]]; then
    parts=$all
    [[ ${DATA-} ]] || parts=${parts% reproduce}
elif [[ " $parts " == *" reproduce "* && -z ${DATA-} ]]; then
    usage "reproduce needs DATA=FOLDER in the environment"
fi

python=${PYTHON:-python3}
if [[ $python == */* ]]; then # found from OUT too; not through its links, or it were no environment's
    python=$(realpath -sm "$python")
fi
if ! reason=$("$python" -c "import torch" 2>&1); then
    echo "$0: $python lacks what is needed: ${reason##*$'\n'}: install it, or set PYTHON to one that has it" >&2
    exit 2
fi
repo=$(cd "$(dirname "$0")/.." && pwd)
wheel=${FFCV_WHEEL:+$(realpath "$FFCV_WHEEL")} data=${DATA:+$(realpath "$DATA")}
mkdir -p "$target" && out=$(cd "$target" && pwd) && scratch=$(mktemp -d) || exit 2
trap 'rm -rf "$scratch"' EXIT
log=$out/log.txt runs=$out-runs
cd "$out" || exit 2 # away from the repository, whose classroomkd/ lacks the kernels beside it
mkdir "$scratch/classroomkd"
ln -s "$repo"/classroomkd/* "$repo/kernels" "$scratch/classroomkd/"
export PYTHONPATH=$scratch${PYTHONPATH:+:$PYTHONPATH}
export PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
export HYPOTHESIS_STORAGE_DIRECTORY=$scratch/hypothesis
ends=$((60 * minutes - 15)) # the rest is for the summary
results=() status=0

# What a part runs, with $seconds to begin no further work after.
command_of() {
    local minutes
    minutes=$(printf '%d.%02d' $((seconds / 60)) $((seconds % 60 * 100 / 60)))
    case $1 in
    tests) command=("$repo/benchmarks/gpu_tests.py" --seconds "$seconds") ;;
    roofline) command=("$repo/benchmarks/roofline.py" --out "$out") ;;
    loss) command=("$repo/benchmarks/loss.py" --out "$out" --seconds "$seconds") ;;
    linear) command=("$repo/benchmarks/loss_linear.py" --out "$out" --seconds "$seconds") ;;
    loaders) command=("$repo/benchmarks/loaders.py" --out "$out" --minutes "$minutes") ;;
    step) command=("$repo/benchmarks/step.py" --out "$out" --minutes "$minutes" --whole 5) ;;
    reproduce)
        command=(-m classroomkd reproduce methods --data "$data" --devices cuda cuda --out "$runs"
            --methods alone kd aver classroom classroom-batch --epochs "${EPOCHS:-24}")
        ;;
    esac
}

part() {
    local name=$1 limit=$2 begin=$SECONDS code result=passed absent
    local seconds=$((limit * 85 / 100)) command=()
    command_of "$name"
    echo "=== $name, at most $limit s"
    echo "=== $name" >>"$log"
    timeout --kill-after=5 "$limit" "$python" "${command[@]}" >"$scratch/log" 2>&1
    code=$?
    cat "$scratch/log" >>"$log"
    rm -f "$out"/.{roofline,loss,loss_linear,loaders,step}.json.* # half-written, if it was killed
    if [[ $code -eq 124 || $code -eq 137 ]]; then
        result="out of time"
    elif [[ $code -ne 0 ]]; then
        absent=$(tail -n 1 "$scratch/log" | sed -nE "s/.*No module named '?([A-Za-z0-9_]+).*/\1/p")
        case $absent in
        omegaconf | yaml | rich | safetensors | PIL | matplotlib | sklearn)
            result="left out: needs $absent"
            ;;
        *)
            result="failed ($code)" status=1
            tail -n 25 "$scratch/log" | cut -c -300
            ;;
        esac
    fi
    [[ $name != tests ]] || result+=": $(tail -n 1 "$scratch/log" | cut -c -150)"
    results+=("$(printf '%-10s %5d s  %s' "$name" $((SECONDS - begin)) "$result")")
}

if [[ $wheel ]]; then
    "$python" -m pip install --no-index --no-deps "$wheel" >>"$log" 2>&1 ||
        results+=("FFCV was not installed from $wheel: see the log")
fi
remaining=0
for name in $parts; do
    remaining=$((remaining + weights[$name]))
done
for name in $parts; do
    left=$((ends - SECONDS))
    if [[ $left -lt 10 ]]; then
        results+=("$(printf '%-10s %5d s  not run: out of time' "$name" 0)")
        continue
    fi
    part "$name" $((left * weights[$name] / remaining))
    remaining=$((remaining - weights[$name]))
done
[[ ! -f $runs/results.json ]] || cp "$runs/results.json" "$out/reproduction-methods.json"

{
    echo "=== the headline numbers"
    "$python" "$repo/benchmarks/summary.py" "$out"
    "$python" -c 'import torch; print("===", torch.cuda.get_device_name() if torch.cuda.is_available()
        else "NO GPU HERE: small sizes on the CPU")'
    printf '%s\n' "${results[@]}"
    echo "JSON and log.txt in $out; to put them into docs/benchmarks.md: benchmarks/document.py $target"
} 2>&1 | tee -a "$log"
exit "$status"
