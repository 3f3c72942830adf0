#!/bin/bash
# Sourced on each node of a job, in the project's folder: sets up the environment so that `python` has the project's
# packages. ENV_SETUP=FILE names a file to source, with module loads, conda, or variables for NCCL. Without it, .venv is
# activated if it exists.
if [ -n "${ENV_SETUP-}" ] && [ ! -f "$ENV_SETUP" ]; then
    echo "ENV_SETUP=$ENV_SETUP: no such file on $(hostname)" >&2
    return 2
fi
if [ -n "${ENV_SETUP-}" ] || [ -f .venv/bin/activate ]; then
    # shellcheck source=/dev/null
    . "${ENV_SETUP:-.venv/bin/activate}"
fi
true # so that the status of the sourced file's last command is not taken for a failure
