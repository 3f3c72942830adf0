#!/bin/bash
# Sourced on each node of a job, in the project's folder: makes `python` the one that has the project's packages.
# ENV_SETUP=FILE names what to source: module loads, conda, NCCL's variables. Without it .venv, where there is one.
if [ -n "${ENV_SETUP-}" ] && [ ! -f "$ENV_SETUP" ]; then
    echo "ENV_SETUP=$ENV_SETUP: no such file on $(hostname)" >&2
    return 2
fi
if [ -n "${ENV_SETUP-}" ] || [ -f .venv/bin/activate ]; then
    # shellcheck source=/dev/null
    . "${ENV_SETUP:-.venv/bin/activate}"
fi
true # whatever the last line of that file gave
