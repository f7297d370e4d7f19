#!/usr/bin/env bash
# Build the documentation into site/. Run by `make docs`; any warning, such as a broken link, fails.
#
# It has an environment of its own, .venv-docs: the site is made from sources alone, so that it needs
# neither torch nor vLLM, `make setup` gets no slower, and its packages don't meet the pinned ones.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/common.sh

lock=requirements/docs.txt
venv=.venv-docs
stamp="$venv/.stamp"
fingerprint=$({ echo "$PWD"; cat "$lock"; } | sha256sum)

if [ ! -e "$stamp" ] || [ "$(cat "$stamp")" != "$fingerprint" ] || ! "$venv/bin/python" -c ''; then
    "${PYTHON:-python3}" -m venv --clear "$venv" || die "no venv; name a Python of 3.11 or later with PYTHON=..."
    "$venv/bin/python" -m pip install -qq --no-deps -r "$lock" || die "pip could not install $lock"
    echo "$fingerprint" > "$stamp"
fi

# The theme's banner about the future of mkdocs is for those who choose tools.
NO_MKDOCS_2_WARNING=1 "$venv/bin/mkdocs" build --strict --clean
say "site/index.html; to look at it: python -m http.server --bind 127.0.0.1 --directory site"
