# Sourced by demo.sh and test.sh: sets PYTHON to an interpreter that has what requirements.txt names.
#
# An active virtual environment that already has torch and Triton is used as it is, whatever their versions; only what
# else is missing is added to it. Otherwise .venv is made, or reused, and filled from the pinned requirements.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

has() { "$1" -c "import importlib.util as u, sys; sys.exit(any(u.find_spec(m) is None for m in sys.argv[2:]))" x "${@:2}"; }

NEEDED="numpy pytest xdist pytest_timeout hypothesis expecttest sklearn PIL matplotlib tqdm"
if [ -n "${VIRTUAL_ENV:-}" ] && has "$VIRTUAL_ENV/bin/python" torch triton; then
    PYTHON="$VIRTUAL_ENV/bin/python"
    # shellcheck disable=SC2086
    if ! has "$PYTHON" $NEEDED; then
        echo "Adding what is missing to the active environment, $VIRTUAL_ENV"
        "$PYTHON" -m pip install --disable-pip-version-check -q \
            "numpy" pytest pytest-xdist pytest-timeout hypothesis expecttest scikit-learn pillow matplotlib tqdm
    fi
else
    PYTHON="$PWD/.venv/bin/python"
    stamp=".venv/requirements.sha256"
    wanted="$(sha256sum requirements.txt | cut -d' ' -f1)"
    if [ ! -x "$PYTHON" ] || [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
        echo "Making .venv and installing requirements.txt into it (torch is large: some minutes the first time)"
        [ -x "$PYTHON" ] || python3 -m venv .venv
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
