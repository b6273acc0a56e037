# `make` alone says what there is. Everything runs in .venv: `make setup` makes it, the other targets do so if there is none.
PYTHON ?= python3
ARGS ?=
GPUS ?=
TORCH_INDEX ?=
# The Python whose torch `make gpu-check` runs beside.
GPU_PYTHON ?= $(firstword $(wildcard .venv/bin/python) $(PYTHON))

# Two workers more than there are cores (for quick tests, which do not sleep, one), each with whole files; tests/suite.py says how.
PYTEST := pytest -q --dist loadgroup -n
BIN := .venv/bin
STAMP := .venv/setup-is-done
TORCH := $(if $(TORCH_INDEX),--torch-index $(TORCH_INDEX))

.DEFAULT_GOAL := help
.PHONY: help setup train test test-quick test-long test-versions slurm-test faults mutants same-bits gpu-check gpu-wheels check licences bench lock release clean

help: ## Say what there is
	@grep -hE '^[a-z-]+:.*## ' Makefile | sed -E 's/^([a-z-]+):.*## /\1|/' | awk -F'|' '{printf "  make %-11s %s\n", $$1, $$2}'

setup: $(STAMP) ## Make .venv, or bring it up to date: make setup [TORCH_INDEX=URL of torch without CUDA]
	@echo '.venv is up to date.'

train: $(STAMP) ## Train the example: make train [GPUS=2] [ARGS="optim.peak_lr=3e-4 run.max_epochs=3"]
	@$(BIN)/python -m harness.launch.cli launch configs/mnist_cnn.yaml $(if $(GPUS),--gpus $(GPUS)) $(ARGS)

test: $(STAMP) ## Run every test but the long ones, 14 minutes on two cores
	@$(BIN)/python -m $(PYTEST) auto -m "not long" $(ARGS)

test-quick: $(STAMP) ## Run the tests that take seconds
	@$(BIN)/python -m $(PYTEST) logical -m "not slow and not long" $(ARGS)

test-long: $(STAMP) ## Run the long tests: whole trainings, eight ranks, every cut point
	@$(BIN)/python -m $(PYTEST) auto -m long $(ARGS)

test-versions: $(STAMP) ## Run the core on the lowest and the highest versions, gigabytes: make test-versions [ARGS="low"]
	@$(BIN)/python -m tests.versions $(ARGS)

slurm-test: $(STAMP) ## Run the tests on a live Slurm cluster; says what to install if there is no Slurm
	@$(BIN)/python -m $(PYTEST) auto tests/slurm $(ARGS)

faults: $(STAMP) ## Damage, kill and resume in every way, 20 minutes: make faults [ARGS="ddp zero3"]
	@$(BIN)/python -m tests.faults $(ARGS)

mutants: $(STAMP) ## Break the code in 258 ways and see the tests fail, hours: make mutants [ARGS="--part 1/8"]
	@$(BIN)/python -m tests.mutants $(ARGS)

same-bits: $(STAMP) ## Train configs/ as version 0.1.0 did, to the bit, 10 minutes: make same-bits [ARGS="--quick"]
	@$(BIN)/python -m tests.same_bits $(ARGS)

# It needs no set-up: beside a torch that is there, without network, it adds what is missing from gpu-wheels/.
gpu-check: ## Say what works on this machine's GPU, in 8 minutes: make gpu-check [GPU_PYTHON=python3] [ARGS="zero3 save"]
	@$(GPU_PYTHON) -m tests.gpu.environment make .venv-gpu gpu-wheels
	@.venv-gpu/bin/python -m tests.gpu --json gpu-check.json $(ARGS)

gpu-wheels: $(STAMP) ## Gather in gpu-wheels/ what a machine with torch and no network lacks, 60 MB at most
	@$(BIN)/python -m tests.gpu.environment gather gpu-wheels

check: $(STAMP) ## Lint, format, types and licences
	@$(BIN)/python -m ruff check --quiet .
	@$(BIN)/python -m ruff format --check --quiet .
	@$(BIN)/python -m mypy --no-error-summary
	@$(BIN)/python -m tests.release.licences > /dev/null

licences: $(STAMP) ## Say whether everything that is installed for the harness and its extras may be used freely
	@$(BIN)/python -m tests.release.licences

bench: $(STAMP) ## Measure an update beside a hand-written loop, and what tracking adds: make bench [ARGS="--rounds 21"]
	@$(BIN)/python -m tests.benchmarks.step_cost $(ARGS)
	@$(BIN)/python -m tests.benchmarks.tracking_cost $(ARGS)

lock: ## Write the lock files for the pins of constraints.txt: make lock [TORCH_INDEX=URL]
	@$(PYTHON) -m venv .venv-lock
	@.venv-lock/bin/python -m pip --quiet --disable-pip-version-check install uv==0.13.9
	@.venv-lock/bin/python -m tests.release.locks .venv-lock/bin/uv $(TORCH)

release: $(STAMP) check ## Build wheel, sdist, bill of materials and checksums of the commit into dist/; publish nothing
	@$(BIN)/python -m tests.release.build

clean: ## Remove caches and build outputs; runs/ and .venv stay
	@rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info
	@find . -path ./.venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

# Not into the environment itself, where torchmetrics and transformers would import it and fail beside a torch without CUDA.
.venv/torchvision: tests/torchvision.lock $(STAMP)
	@$(BIN)/python -m pip --quiet --disable-pip-version-check install --no-deps --require-hashes --upgrade --target $@ --requirement $<
	@touch $@

$(STAMP): pyproject.toml requirements.lock torch-cpu.lock torch-cuda.lock
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if v >= (3, 11) else "Python %d.%d is too old: 3.11 or newer is wanted; try make setup PYTHON=python3.11" % v)'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m tests.release.install $(TORCH)
	@touch $@
