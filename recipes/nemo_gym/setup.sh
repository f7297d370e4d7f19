#!/usr/bin/env bash
# Make NeMo Gym's own environment: recipes/nemo_gym/setup.sh [FOLDER]
#
# FOLDER is .venv-nemo-gym of this checkout if it isn't given; 1.4 GB. It needs Python 3.13, which
# uv fetches where it may; PYTHON names an interpreter.
set -euo pipefail
root="$(cd "$(dirname "$0")/../.." && pwd)"
venv=${1:-$root/.venv-nemo-gym}
version=0.7.0

say() { echo "nemo_gym: $*" >&2; }
die() { say "$*"; exit 1; }

is_313() { "$1" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 13))' 2>/dev/null; }

make_venv() {
    local candidate uv
    for candidate in ${PYTHON:-python3.13 python3 "$HOME"/.pyenv/versions/3.13*/bin/python}; do
        if is_313 "$candidate"; then
            say "making $venv with $candidate"
            "$candidate" -m venv --clear "$venv" && return
        fi
    done
    for uv in uv "$root/.venv/bin/uv"; do
        if command -v "$uv" >/dev/null && [ -z "${PYTHON:-}" ]; then
            say "making $venv with uv"
            "$uv" venv --quiet --clear --seed --python 3.13 "$venv" && return
        fi
    done
    die "NeMo Gym needs Python 3.13, and there is none (looked at: ${PYTHON:-python3.13, python3, pyenv, uv});" \
        "name one with PYTHON=/path/to/python3.13"
}

if "$venv/bin/python" -c "from importlib.metadata import version as v; assert v('nemo-gym') == '$version'" \
    2>/dev/null && [ -x "$venv/bin/gym" ]; then
    exit 0
fi
started=$SECONDS
is_313 "$venv/bin/python" || make_venv
say "installing NeMo Gym $version"
# It asks for 3.13.14 at least; what the recipe uses runs on 3.13.0 too.
"$venv/bin/python" -m pip install -q --ignore-requires-python "nemo-gym==$version" ||
    die "pip could not install nemo-gym==$version"
say "done in $((SECONDS - started)) s"
