#!/bin/sh
# Makes .venv and installs the project into it, or brings an existing .venv up to date.
#   [PYTHON=python3.12] sh launch/install.sh EXTRAS       called by make; EXTRAS as in `pip install .[EXTRAS]`
# A torch >= 2.11 that the chosen Python can import already (Kaggle, a cluster's module) is used as it is.
cd "$(dirname "$0")/.." || exit 1
started=$(date +%s)

fail() {
    echo "install: $1" >&2
    exit 1
}

# A half-made environment is worse than none: whatever ends this script early takes it away.
fresh=
trap 'code=$?; [ $code -eq 0 ] || [ -z "$fresh" ] || rm -rf .venv; exit $code' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

# Prints 3.11 and the like; nothing for what is not there or does not run (a shim without a version behind it).
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
    fresh=yes
    rm -rf .venv
    "$PYTHON" -m venv .venv || fail "$PYTHON could not create .venv; $hint"
    # What --system-site-packages does, but for a PYTHON that is itself of a virtual environment too: that
    # option would show the Python below it, not its packages.
    outside=$("$PYTHON" -c '
import sys, torch
if torch.__version__ < "2.11":
    sys.exit("torch is too old")
print("import site" + "".join(f"; site.addsitedir({p!r})" for p in sys.path if p.endswith("-packages")))
' 2>/dev/null) || return 0
    echo "install: using the torch that $PYTHON already has"
    echo "$outside" >"$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/outside.pth"
}

# The pins, less those of packages that lie outside .venv: they were made to fit the torch that is there.
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
# --no-compile: Python compiles what is imported when it is imported, a small part of what is installed.
PIP_DISABLE_PIP_VERSION_CHECK=1 .venv/bin/python -m pip install --quiet --no-compile \
    --editable ".[$1]" --constraint .venv/constraints.txt || fail "pip failed, see its messages above"
echo "install: $(($(date +%s) - started)) s"
