#!/usr/bin/env bash
# What a machine with a GPU should do, in order: install, GPU tests, roofline, benchmarks.
#
#     benchmarks/run_gpu.sh OUT [--minutes N]
#
# JSON and logs go to the folder OUT. Each part may take N minutes (8); one that fails does not stop
# the next; the exit status is 0 if all passed. Needs no network, and of packages torch with its
# triton, numpy, numba, omegaconf, pillow, plotly, pyyaml, rich, safetensors, pytest,
# pytest-benchmark and hypothesis. With liger-kernel, torchvision, or FFCV and
# opencv-python-headless there are more rows; FFCV_WHEEL=FILE in the environment installs FFCV
# first, from what scripts/build_ffcv_wheel.sh built. With DATA=FOLDER, class folders, students are
# compared on them at the end, over EPOCHS (24). Without a GPU it takes small sizes on the CPU,
# which shows only that the scripts work.
set -uo pipefail

# Name and command of each part; a later benchmark is one more line.
parts() {
    part tests "$python" -m pytest -q -p no:cacheprovider "${tests[@]}"
    part roofline "$python" "$repo/benchmarks/roofline.py" --out "$out"
    # It begins no further row near its end, so that the tables are still printed.
    part loss "$python" "$repo/benchmarks/loss.py" --out "$out" --seconds $((limit * 85 / 100))
    part loaders "$python" "$repo/benchmarks/loaders.py" --out "$out" --minutes $((limit / 60))
    part step "$python" "$repo/benchmarks/step.py" --out "$out" --minutes $((limit / 60)) --whole 5
    if [[ $data ]]; then # goes on in the same OUT where the time ended
        part reproduction "$python" -m classroomkd reproduce methods --data "$data" \
            --methods alone kd aver classroom classroom-batch --epochs "${EPOCHS:-24}" \
            --devices cuda cuda --out "$out/reproduction"
    fi
}

part() {
    local name=$1 begin=$SECONDS code result=passed
    shift
    echo "=== $name"
    timeout --kill-after=10 "$limit" "$@" >"$name.log" 2>&1
    code=$?
    tail -n 160 "$name.log"
    if [[ $code -ne 0 ]]; then
        status=1
        result="failed ($code)"
        [[ $code -ne 124 && $code -ne 137 ]] || result="out of time"
    fi
    results+=("$(printf '%-10s %-12s %5d s' "$name" "$result" $((SECONDS - begin)))")
}

if [[ $# -ne 1 && ! ($# -eq 3 && $2 == --minutes && $3 =~ ^[1-9][0-9]*$) ]]; then
    echo "usage: $0 OUT [--minutes N]" >&2
    exit 2
fi
limit=$((60 * ${3:-8}))
python=${PYTHON:-python3}
if [[ $python == */* ]]; then # found from OUT too; not through its links, or it were no environment's
    python=$(realpath -sm "$python")
fi
needed="torch, numpy, numba, omegaconf, PIL, plotly, yaml, rich, safetensors"
if ! reason=$("$python" -c "import $needed, pytest, pytest_benchmark, hypothesis" 2>&1); then
    echo "$0: $python lacks what is needed: ${reason##*$'\n'}: install it, or set PYTHON to one that has it" >&2
    exit 2
fi
repo=$(cd "$(dirname "$0")/.." && pwd)
wheel=${FFCV_WHEEL:+$(realpath "$FFCV_WHEEL")} data=${DATA:+$(realpath "$DATA")}
mkdir -p "$1" && out=$(cd "$1" && pwd) && scratch=$(mktemp -d) || exit 2
trap 'rm -rf "$scratch"' EXIT
cd "$out" # away from the repository, whose classroomkd/ lacks the kernels beside it
export PYTHONUNBUFFERED=1 HYPOTHESIS_STORAGE_DIRECTORY=$scratch/hypothesis
results=()
status=0

part install "$python" -m pip install --no-deps --no-build-isolation -e "$repo"
if [[ $status -ne 0 ]]; then
    echo "pip failed: the package is put together from links instead"
    status=0
    mkdir "$scratch/classroomkd"
    ln -s "$repo"/classroomkd/* "$repo/kernels" "$scratch/classroomkd/"
    export PYTHONPATH=$scratch${PYTHONPATH:+:$PYTHONPATH}
fi
if [[ $wheel ]]; then
    part ffcv "$python" -m pip install --no-index --no-deps "$wheel"
fi
tests=("$repo"/tests/test_{definition,fused,operator,fused_properties,augment_kernel,loaders,mentor_bank,methods,training}.py)
where="on a GPU" page="To put them into docs/benchmarks.md: $python $repo/benchmarks/document.py $out"
if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    where="NO GPU HERE: small sizes on the CPU, the kernels' own tests left out" page=
    tests=("${tests[0]}")
fi
parts

echo "=== $where; JSON and logs in $out"
printf '%s\n' "${results[@]}"
[[ -z $page ]] || echo "$page"
exit "$status"
