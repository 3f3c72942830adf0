#!/bin/sh
# Creates an environment with the CUDA build of torch for simulated GPUs (5 GB, some minutes). `make fake-gpu` calls it.
#   [PYTHON=python3.12] sh tests/gpu/sim/install.sh FOLDER
# .venv cannot be used: on a machine without a GPU it may contain the CPU build.
cd "$(dirname "$0")/../../.." || exit 1
venv=$1

fail() {
    echo "install: $1" >&2
    exit 1
}

[ -n "$venv" ] || fail "the folder of the environment is missing; call: sh tests/gpu/sim/install.sh .venv-gpu"
if ! "$venv/bin/python" -c '' 2>/dev/null; then
    for python in ${PYTHON:-python3.14 python3.13 python3.12 python3.11 python3}; do
        "$python" -c 'import ensurepip, sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' 2>/dev/null && break
        python=
    done
    [ -n "$python" ] || fail "found no Python 3.11 to 3.14 with ensurepip; run: make PYTHON=/path/to/python3 fake-gpu"
    rm -rf "$venv"
    "$python" -m venv "$venv" || fail "$python could not create $venv"
fi
echo "install: $("$venv/bin/python" -V), installing the CUDA build of torch and the packages of setup.cfg into $venv; this needs some minutes"
# --isolated ignores the user's settings of pip, which could prefer an index with the CPU build.
"$venv/bin/python" -m pip --isolated --disable-pip-version-check install --quiet --no-compile \
    --editable . --constraint constraints.txt || fail "pip failed, see its output above"
"$venv/bin/python" -c 'import sys, torch; sys.exit(not torch.version.cuda)' ||
    fail "$venv has a torch without CUDA; remove the folder, and check from which index pip installs torch"
