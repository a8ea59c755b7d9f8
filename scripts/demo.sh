#!/usr/bin/env bash
# Trains a small network on real images with torch.nn and with tconv, side by side. Arguments go to demo.py: --help.
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
# Without a GPU the interpreter runs on one core; on tensors this small more threads only wait for each other.
[ "${TRITON_INTERPRET:-}" != 1 ] || export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec "$PYTHON" scripts/demo.py "$@"
