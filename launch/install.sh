#!/bin/sh
# Creates .venv and installs the project into it, or updates an existing .venv.
#   [PYTHON=python3.12] sh launch/install.sh EXTRAS       called by make; EXTRAS as in `pip install .[EXTRAS]`
# If the chosen Python can already import torch 2.11 or newer (as on Kaggle, or from a cluster's module), that torch is
# used.
cd "$(dirname "$0")/.." || exit 1
started=$(date +%s)

fail() {
    echo "install: $1" >&2
    exit 1
}

# If this script ends early, it removes the .venv that it has created, because an incomplete one would be used as it is.
created=
remove_incomplete() {
    code=$?
    if [ "$code" -ne 0 ] && [ -n "$created" ]; then
        rm -rf .venv
    fi
    exit "$code"
}
trap remove_incomplete EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

# Prints a Python's version, such as 3.11. Prints nothing if the command does not exist, or does not run (such as a shim
# of pyenv without a version).
version_of() {
    "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null </dev/null
}

suitable() {
    case "$(version_of "$1")" in 3.11 | 3.12 | 3.13 | 3.14) true ;; *) false ;; esac
}

choose_python() {
    if [ -n "$PYTHON" ]; then
        suitable "$PYTHON" && return
        version=$(version_of "$PYTHON")
        fail "PYTHON=$PYTHON ${version:+is Python }${version:-does not run}; Python 3.11 to 3.14 is required"
    fi
    for PYTHON in python3.14 python3.13 python3.12 python3.11 python3; do
        suitable "$PYTHON" && return
    done
    fail "found no Python 3.11 to 3.14; install one, or give its path: make PYTHON=/path/to/python3"
}

make_venv() {
    choose_python
    version=$(version_of "$PYTHON")
    hint="on Debian and Ubuntu: apt install python$version-venv"
    "$PYTHON" -c 'import ensurepip, venv' 2>/dev/null || fail "$PYTHON cannot create virtual environments; $hint"
    created=yes
    rm -rf .venv
    "$PYTHON" -m venv .venv || fail "$PYTHON could not create .venv; $hint"
    # Makes the packages of $PYTHON visible in .venv. The option --system-site-packages would do the same, except if
    # $PYTHON belongs to a virtual environment itself: then it would show the packages of the base Python.
    outside=$("$PYTHON" -c '
import sys, torch
if torch.__version__ < "2.11":
    sys.exit("torch is too old")
print("import site" + "".join(f"; site.addsitedir({p!r})" for p in sys.path if p.endswith("-packages")))
' 2>/dev/null) || return 0
    echo "install: using the torch that $PYTHON already has"
    echo "$outside" >"$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/outside.pth"
}

# Copies constraints.txt, without the packages that are installed outside .venv: those fit the torch that is there.
write_constraints() {
    .venv/bin/python - <<'EOF'
import re, sys
from importlib.metadata import distributions

def name(line):
    return re.split(r"[^\w.-]", line.strip(), maxsplit=1)[0].lower().replace("_", "-")

outside = {name(d.metadata["Name"] or "") for d in distributions() if not str(d.locate_file("")).startswith(sys.prefix)}
with open("constraints.txt") as pins, open(".venv/constraints.txt", "w") as kept:
    kept.writelines(line for line in pins if name(line) not in outside)
EOF
}

.venv/bin/python -c '' 2>/dev/null || make_venv
echo "install: $(.venv/bin/python -V) and the packages of setup.cfg[$1] into .venv; the first time this takes minutes"
write_constraints || fail "could not read constraints.txt"
# --no-compile saves time: Python compiles a module when it is first imported, and only few are.
PIP_DISABLE_PIP_VERSION_CHECK=1 .venv/bin/python -m pip install --quiet --no-compile \
    --editable ".[$1]" --constraint .venv/constraints.txt || fail "pip failed, see its messages above"
echo "install: $(($(date +%s) - started)) s"
