#!/usr/bin/env bash
# Everything that needs a GPU, on a fresh machine with one: scripts/gpu.sh [options of bench gpu]
#
# Makes .venv-gpu with pip (another interpreter: PYTHON=python3.12), or, with ROLLOUT_PYTHON=python,
# uses an interpreter that has vLLM and TRL already. Then the doctor, the benchmark (8 minutes) and
# tests/gpu; results are in runs/bench/gpu. What was done by a run that was cut off isn't done again.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/common.sh

export HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1
if [ -n "${ROLLOUT_PYTHON:-}" ]; then
    python=$ROLLOUT_PYTHON
    "$python" -m pip install -q --no-deps --no-build-isolation -e .
else
    python=.venv-gpu/bin/python
    [ -x "$python" ] || "${PYTHON:-python3}" -m venv .venv-gpu ||
        die "no Python with venv; name one with PYTHON=/path/to/python3.12"
    "$python" -m pip install -q -e '.[cuda,recipes,test]'
fi

"$python" -m rollout_server.doctor || say "the doctor has found problems; going on all the same"
failed=0
"$python" -m rollout_server.bench gpu "$@" || failed=1
"$python" -m pytest -q -s tests/gpu || failed=1
exit $failed
