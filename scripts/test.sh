#!/usr/bin/env bash
# Runs the tests: lint and types where their tools are installed, then pytest. Arguments go to pytest.
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
if "$PYTHON" -m ruff --version >/dev/null 2>&1; then
    "$PYTHON" -m ruff check .
    "$PYTHON" -m ruff format --check .
else
    echo "no ruff in $PYTHON: no lint" >&2
fi
if "$PYTHON" -m mypy --version >/dev/null 2>&1; then
    "$PYTHON" -m mypy
else
    echo "no mypy in $PYTHON: types are not checked" >&2
fi
# One process per core: the interpreter runs on one, and torch's own threads would fight over the rest. `nproc` heeds
# OMP_NUM_THREADS, so it is asked first.
processes="${TCONV_TEST_PROCESSES:-$(env -u OMP_NUM_THREADS nproc)}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec "$PYTHON" -m pytest -n "$processes" --dist worksteal "$@"
