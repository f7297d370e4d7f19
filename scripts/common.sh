# Shared by setup.sh and lock.sh (sourced, from the root of the checkout).

venv=.venv
python="$venv/bin/python"
uv_version=0.13.8
# Where torch's CPU builds are, for whoever's pip isn't configured to find them.
torch_index=https://download.pytorch.org/whl/cpu

say() { echo "$(basename "$0" .sh): $*" >&2; }
die() { say "$*"; exit 1; }

# uv doesn't read pip's settings: hand over those that come as environment variables.
uv_sources=()
for link in ${PIP_FIND_LINKS:-}; do uv_sources+=(--find-links "$link"); done
if [ -n "${PIP_INDEX_URL:-}" ]; then export UV_DEFAULT_INDEX="${UV_DEFAULT_INDEX:-$PIP_INDEX_URL}"; fi
