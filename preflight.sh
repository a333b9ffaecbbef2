#!/bin/sh
# What `make` needs before it can set anything up. Says in one line what is missing and how to get it.
# Prints the Python to use. PYTHON=/path/to/python overrides the search.
set -eu
cd "$(dirname "$0")"

fail() {
    echo "phi1: error: $1" >&2
    exit 2
}

suitable() {
    "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null
}

found=""
for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11 python3.10}; do
    if suitable "$candidate"; then
        found=$(command -v "$candidate")
        break
    fi
done
[ -n "$found" ] || fail "no Python 3.10 to 3.13 (looked for ${PYTHON:-python3, python3.13 … python3.10}): install one (Debian, Ubuntu: apt-get install python3 python3-venv python3-dev) or set PYTHON=/path/to/python"

"$found" -c 'import ensurepip, venv' 2>/dev/null || fail "$found has no venv module: apt-get install python3-venv (or your system's package of it)"

"$found" -c '
import pathlib, sys, sysconfig
sys.exit(not pathlib.Path(sysconfig.get_paths()["include"], "Python.h").exists())
' || fail "$found has no C headers (Python.h): apt-get install python3-dev (or your system's package of them)"

command -v "${CXX:-c++}" >/dev/null 2>&1 || fail "no C++ compiler (${CXX:-c++}): apt-get install g++ (or set CXX=/path/to/compiler)"

# The virtual environment takes 3.5 GB with a CPU build of torch and 8 GB with a CUDA build; a run of the quickstart 1 GB.
need_gb=${PHI1_NEED_GB:-5}
free_gb=$(df -Pk . | awk 'NR == 2 { print int($4 / 1048576) }')
[ -d .venv ] || [ "$free_gb" -ge "$need_gb" ] || fail "$free_gb GB free in $(pwd): $need_gb GB are needed (10 GB if pip installs a CUDA build of torch); free some or clone to another disk"

echo "$found"
