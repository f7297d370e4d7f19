# Shared by setup.sh, lock.sh and the Makefile's matrix (sourced, from the root of the checkout).

venv=.venv
python="$venv/bin/python"
uv_version=0.13.8
# Where torch's CPU builds are, for whoever's pip isn't configured to find them.
torch_index=https://download.pytorch.org/whl/cpu

say() { echo "$(basename "$0" .sh): $*" >&2; }
die() { say "$*"; exit 1; }

# uv doesn't read pip's settings: hand over those that come as environment variables.
if [ -n "${PIP_FIND_LINKS:-}" ]; then export UV_FIND_LINKS="${UV_FIND_LINKS:-${PIP_FIND_LINKS// /,}}"; fi
if [ -n "${PIP_INDEX_URL:-}" ]; then export UV_DEFAULT_INDEX="${UV_DEFAULT_INDEX:-$PIP_INDEX_URL}"; fi
