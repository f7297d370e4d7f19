# Every target works from a fresh checkout: `setup` makes .venv, and costs a moment when it is there.
# Another interpreter: make setup PYTHON=python3.12

SHELL := /bin/bash
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)

# Nothing that is run here asks the network for anything.
export HF_HUB_OFFLINE ?= 1
export VLLM_NO_USAGE_STATS ?= 1
export DO_NOT_TRACK ?= 1

.PHONY: help setup demo test test-models test-fast matrix soak bench docs lint format lock clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 12

setup: ## make .venv with everything (CPU)
	@scripts/setup.sh

# The warnings: TRL's about vLLM versions is for TRL's own engine, which isn't used here.
# Bars, of loading a model and the like, are for terminals. Another seed: make demo SEED=1
demo: export PYTHONWARNINGS := ignore::SyntaxWarning,ignore:TRL currently supports vLLM
demo: setup ## train SmolLM2 on sums, on the CPU; results in runs/demo
	if ! test -t 2; then export TQDM_DISABLE=1; fi; \
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-$$(nproc)} \
	accelerate launch --config_file recipes/accelerate/cpu.yaml \
		recipes/train.py --config recipes/training/demo.yaml $(if $(SEED),--seed $(SEED))

test: setup ## all tests (those for a GPU are skipped without one)
	python -m pytest -q --durations=60 --durations-min=8 -m "not models" tests

test-models: setup ## architectures, each attached
	python -m pytest -q -m models tests

test-fast: setup ## the tests that take a few seconds at most
	python -m pytest -q -m "not slow" tests

matrix: setup ## the core tests with each version of vLLM and TRL (VERSIONS="vllm-0.26 trl-1.0")
	source scripts/common.sh; TORCH_INDEX=$$torch_index python scripts/matrix.py $(VERSIONS)

soak: setup ## faults, fuzzing, memory, for long (ROLLOUT_FUZZ_CASES, ROLLOUT_SOAK_SESSIONS)
	python -m pytest -q -s tests/soak

bench: setup ## benchmarks, with their figures
	python -m pytest -q -s tests/benchmarks

docs: ## build the documentation into site/, strictly
	scripts/docs.sh

lint: setup ## the rules: ruff's checks and formatting, who imports whom, types
	ruff check .
	ruff format --check .
	lint-imports --no-logo
	mypy

format: setup ## apply ruff's formatting and its safe fixes
	ruff check --fix .
	ruff format .

lock: setup ## resolve requirements/cpu.in anew
	scripts/lock.sh

clean: ## remove .venv, runs and caches
	rm -rf .venv .venv-docs .venv-gpu .matrix site runs build dist *.egg-info .pytest_cache .ruff_cache .import_linter_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
