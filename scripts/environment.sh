# Sourced by demo.sh and test.sh: sets PYTHON to an interpreter that has what requirements.txt names.
#
# An active virtual environment that already has torch and Triton is used as it is, whatever their versions; only what
# else is missing is added to it. Otherwise .venv is made, or reused, and filled from the pinned requirements.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

has() { "$1" -c "import importlib.util as u, sys; sys.exit(any(u.find_spec(m) is None for m in sys.argv[2:]))" x "${@:2}"; }

# The interpreter of an active environment: a virtual one (also one that is only first on PATH) or Conda's.
active() {
    local python
    python="$(command -v python3 || command -v python)" || return 1
    [ -n "${CONDA_PREFIX:-}" ] || "$python" -c "import sys; sys.exit(sys.prefix == sys.base_prefix)" || return 1
    echo "$python"
}

if PYTHON="$(active)" && has "$PYTHON" torch triton; then
    if ! has "$PYTHON" platformdirs filelock numpy pytest pytest_benchmark xdist pytest_timeout hypothesis expecttest sklearn PIL matplotlib tqdm onnx onnxscript; then
        echo "Adding what is missing to the active environment, $PYTHON"
        "$PYTHON" -m pip install --disable-pip-version-check -q \
            platformdirs filelock numpy pytest pytest-benchmark pytest-xdist pytest-timeout hypothesis expecttest scikit-learn pillow matplotlib tqdm onnx onnxscript ||
            echo "Not everything could be added; going on without"
    fi
else
    PYTHON="$PWD/.venv/bin/python"
    stamp=".venv/requirements.sha256"
    wanted="$(sha256sum requirements.txt | cut -d' ' -f1)"
    if [ ! -x "$PYTHON" ] || [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
        echo "Making .venv and installing requirements.txt into it (torch is large: some minutes the first time)"
        [ -x "$PYTHON" ] || {
            python3 -c "import sys; sys.exit(sys.version_info < (3, 11))" || {
                echo "requirements.txt wants Python 3.11 or newer, python3 is $(python3 --version 2>&1):" \
                    "put a newer one first on PATH, or activate an environment that has torch and Triton" >&2
                exit 1
            }
            python3 -m venv .venv
        }
        "$PYTHON" -m pip install --disable-pip-version-check --progress-bar on -r requirements.txt
        echo "$wanted" > "$stamp"
    fi
fi
export PYTHON
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
# Without a GPU the kernels run in Triton's interpreter.
if [ -z "${TRITON_INTERPRET:-}" ] && ! "$PYTHON" -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then
    export TRITON_INTERPRET=1
fi
