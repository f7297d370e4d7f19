#!/usr/bin/env bash
# Resolve requirements/cpu.in into requirements/cpu.txt. Run by `make lock`; add --upgrade to move
# what is locked already.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/common.sh

# Only torch is taken from PyTorch's page, and only by who has no other place for it: an index
# would be preferred for every package it happens to hold.
export UV_FIND_LINKS="${UV_FIND_LINKS:-$torch_index/torch/}"

"$venv/bin/uv" pip compile -q --python "$python" --no-annotate --no-header \
    --override requirements/overrides.txt "$@" requirements/cpu.in -o requirements/cpu.txt
say "$(grep -c == requirements/cpu.txt) packages"
