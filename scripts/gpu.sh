#!/usr/bin/env bash
# Everything that needs a GPU, from a plain checkout: torch, Triton, numpy, pytest (with pytest-benchmark, hypothesis and
# matplotlib) are enough.
#
#   scripts/gpu.sh first [--minutes 9] [--out DIR] [--commit ID] [--dry-run] [--only STAGE] [--keep-going]
#   scripts/gpu.sh [parity|sanitize|bench|models|all] [--quick] [--without PROVIDER] [--dry-run] [--out DIR] [--commit ID]
#       [--seconds N]
#
#   first      where minutes are short: is it right, what can the device do, how fast is it, by worth per second (bench/first.py)
#   parity     every kernel at real sizes, all dtypes and layouts, above 2^31 elements, CUDA graphs, two streams
#   sanitize   small cases of every kernel under compute-sanitizer's memcheck and racecheck
#   bench      what the device reaches; the 60 layers, every pass, by every provider that is installed; what surrounds them
#   models     training and inference steps of whole models
#
# A stage starts nothing after --seconds (420) and is stopped after a minute more; the same command goes on where it was cut.
# Records are lines of JSON in DIR (bench/results/GPU-COMMIT), written as they come. --quick takes a part of bench and models,
# --without leaves a provider out of bench (inductor, say, whose tuning can take long; may be repeated),
# --dry-run shrinks everything for Triton's interpreter, --commit names the commit where there is no git.
# Exit status: 0 if all is done and well, 1 if something failed, 2 for arguments that do not fit together, 75 if a stage was cut.
set -euo pipefail
caller="$PWD"
cd "$(dirname "${BASH_SOURCE[0]}")/.."

refuse() {
    echo "$1" >&2
    exit 2
}

stages=() whole=no seconds=420 out="" tiny=() commit=()
first=() quick=() without=()      # the arguments of bench.first, and those of the stages
for_first=() for_stages=()        # the options given that only one of the two takes
while [ $# -gt 0 ]; do
    case "$1" in
        --minutes | --only | --without | --out | --commit | --seconds) [ $# -ge 2 ] || refuse "$1 needs a value" ;;
    esac
    case "$1" in
        first) whole=yes ;;
        parity | sanitize | bench | models) stages+=("$1") ;;
        all) stages+=(parity sanitize bench models) ;;
        --minutes | --only) for_first+=("$1") first+=("$1" "$2") ;;
        --keep-going) for_first+=("$1") first+=("$1") ;;
        --quick) for_stages+=("$1") quick=(--quick) ;;
        --without) for_stages+=("$1") without+=(--without "$2") ;;
        --seconds) for_stages+=("$1") seconds="$2" ;;
        --dry-run) tiny=(--tiny) ;;
        --out) case "$2" in /*) out="$2" ;; *) out="$caller/$2" ;; esac ;;
        --commit) commit=(--commit "$2") ;;
        -h | --help) sed -n '2,${/^#/!q;s/^# \{0,1\}//p}' "$0"; exit 0 ;;
        *) refuse "unknown argument $1; see scripts/gpu.sh --help" ;;
    esac
    case "$1" in
        --minutes | --only | --without | --out | --commit | --seconds) shift 2 ;;
        *) shift ;;
    esac
done
if [ $whole = yes ]; then
    [ ${#stages[@]} -eq 0 ] || refuse "\"first\" has stages of its own, and does not run ${stages[*]}"
    [ ${#for_stages[@]} -eq 0 ] || refuse "${for_stages[*]}: not for \"first\""
else
    [ ${#for_first[@]} -eq 0 ] || refuse "${for_first[*]}: for \"first\" alone"
    [[ "$seconds" =~ ^[0-9]+(\.[0-9]+)?$ ]] || refuse "--seconds $seconds: not a number"
    [ ${#stages[@]} -gt 0 ] || stages=(parity sanitize bench models)
fi

PYTHON="$(command -v python3 || command -v python || true)"
{ [ -n "$PYTHON" ] && "$PYTHON" -c "import torch, triton" 2>/dev/null; } || PYTHON="$PWD/.venv/bin/python"
[ -x "$PYTHON" ] || { echo "no python3 that has torch and Triton, and no .venv: ./scripts/test.sh makes one" >&2; exit 1; }
"$PYTHON" - <<'CHECK' || exit 1
import importlib.util
import sys

needed = ("torch", "triton", "numpy", "pytest", "pytest_benchmark", "hypothesis", "matplotlib")
missing = [m for m in needed if not importlib.util.find_spec(m)]
if missing:
    sys.exit(f"{sys.executable} lacks {', '.join(missing)}: install them, or make .venv by ./scripts/test.sh")
import triton

if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 6):
    sys.exit(f"tconv needs Triton 3.6 or newer, {sys.executable} has {triton.__version__}")
CHECK
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
# What is measured here must not depend on what this user's tconv.tune has measured before.
export TCONV_CACHE_DIR="${TCONV_CACHE_DIR:-$(mktemp -d)}"

if [ ${#tiny[@]} -eq 0 ] && ! "$PYTHON" -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then
    echo "No GPU here: only Python's share of a call can be measured (--dry-run tries the rest out on tiny shapes)"
    exec "$PYTHON" bench/dispatch.py
fi
[ ${#tiny[@]} -eq 0 ] || export TRITON_INTERPRET=1 CUDA_VISIBLE_DEVICES=
[ -n "$out" ] || out="bench/results/$("$PYTHON" -m bench.record "${commit[@]}")${tiny:+-dry}"
mkdir -p "$out"
echo "Recording in $out"

[ $whole = no ] || exec "$PYTHON" -m bench.first "${first[@]}" --out "$out" "${tiny[@]}" "${commit[@]}"

failed=() cut=no
ended() { # a stage's name and exit status; 75 is what bench/stage.py says of one that is to be gone on with
    case $2 in
        0) ;;
        75 | 124 | 137) cut=yes; echo "$1 was cut; the same command goes on" ;;
        *) failed+=("$1") ;;
    esac
}
stage() { # name of the record, then pytest's arguments
    local name="$1" status=0
    shift
    timeout --foreground --kill-after=10 $((${seconds%.*} + 60)) "$PYTHON" -m pytest -p bench.stage -p no:xdist -q --tb=short \
        --record "$out/$name.jsonl" --seconds "$seconds" "${tiny[@]}" "${commit[@]}" "$@" || status=$?
    ended "$name" $status
}

measure() { # a module of bench/ that writes a record of its name
    local status=0
    timeout --foreground --kill-after=10 $((${seconds%.*} + 60)) "$PYTHON" -m "bench.$1" --record "$out/$1.jsonl" \
        --seconds "$seconds" "${tiny[@]}" "${commit[@]}" || status=$?
    ended "$1" $status
}
warm() { # compiles ahead what a stage will launch; what is not done in time is compiled when it is launched
    [ ${#tiny[@]} -eq 0 ] || return 0
    local status=0
    timeout --foreground --kill-after=10 "$((${seconds%.*} / 2))" "$PYTHON" -m bench.warm "$@" || status=$?
    [ $status = 124 ] || [ $status = 137 ] || ended "warm $*" $status
}

for name in "${stages[@]}"; do
    echo "== $name"
    case "$name" in
        parity)
            tests=(tests/test_gpu.py tests/test_kernels.py tests/test_autograd.py tests/test_torch_samples.py tests/test_random.py)
            [ ${#tiny[@]} -eq 0 ] || tests=(tests/test_gpu.py)
            stage parity "${tests[@]}"
            ;;
        sanitize)
            status=0
            timeout --foreground --kill-after=10 $((${seconds%.*} + 60)) "$PYTHON" -m bench.sanitize --out "$out" \
                --seconds "$seconds" "${tiny[@]}" "${commit[@]}" || status=$?
            ended sanitize $status
            ;;
        bench)
            measure facts
            warm "${quick[@]}"
            stage layers --benchmark-quiet "${quick[@]}" "${without[@]}" bench/test_layers.py
            [ ${#quick[@]} -gt 0 ] || stage around --benchmark-quiet bench/test_around.py
            ;;
        models)
            warm --models
            stage models --benchmark-quiet "${quick[@]}" bench/test_models.py
            ;;
    esac
done
echo "== summary"
"$PYTHON" scripts/report.py --summary "$out"
if [ ${#failed[@]} -gt 0 ]; then
    echo "FAILED: ${failed[*]}"
    exit 1
fi
[ $cut = no ] || exit 75
