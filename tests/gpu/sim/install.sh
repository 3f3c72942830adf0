#!/bin/sh
# Makes an environment with the CUDA build of torch, for simulated GPUs: `make fake-gpu` calls it. 5 GB, some minutes.
#   [PYTHON=python3.12] sh tests/gpu/sim/install.sh FOLDER
# .venv cannot serve: on a machine without a GPU it may hold the CPU build.
cd "$(dirname "$0")/../../.." || exit 1
venv=$1

fail() {
    echo "install: $1" >&2
    exit 1
}

[ -n "$venv" ] || fail "name the folder of the environment, such as .venv-gpu"
if ! "$venv/bin/python" -c '' 2>/dev/null; then
    for python in ${PYTHON:-python3.14 python3.13 python3.12 python3.11 python3}; do
        "$python" -c 'import ensurepip, sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' 2>/dev/null && break
        python=
    done
    [ -n "$python" ] || fail "found no Python 3.11 to 3.14 with ensurepip; name it: make PYTHON=/path/to/python3 fake-gpu"
    rm -rf "$venv"
    "$python" -m venv "$venv" || fail "$python could not make $venv"
fi
echo "install: $("$venv/bin/python" -V), the CUDA build of torch and the packages of setup.cfg into $venv; takes minutes"
# --isolated: pip's settings may name wheels of the CPU build, which would be taken first.
"$venv/bin/python" -m pip --isolated --disable-pip-version-check install --quiet --no-compile \
    --editable . --constraint constraints.txt || fail "pip failed, see above"
"$venv/bin/python" -c 'import sys, torch; sys.exit(not torch.version.cuda)' ||
    fail "$venv has a torch without CUDA; remove the folder, and see which index pip takes torch from"
