# `make test` is what CI runs. Ready environments may be named:
#     make test TRAINER_PYTHON=/path/to/python RLSC_SIDECAR_PYTHON=/path/to/python

.PHONY: test test-slurm test-faults test-gpu bench-gpu lint format clean environments

ifndef TRAINER_PYTHON
TRAINER_PYTHON := $(CURDIR)/.venv/bin/python
ENVIRONMENTS := environments
endif

# The hooks of .pre-commit-config.yaml and the tests find their programs here.
export PATH := $(dir $(TRAINER_PYTHON)):$(PATH)
export RLSC_SIDECAR_PYTHON ?= $(CURDIR)/.venv-sidecar/bin/python

# Many of them wait for a vLLM that starts, so two at a time are nearly twice as fast; a file's tests stay together, for
# what they share is made once. `make test TEST_WORKERS=0` is one after the other, in one process.
TEST_WORKERS ?= 2
AT_ONCE = -n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder

test: lint
	bash tests/reporting/install.sh
	$(TRAINER_PYTHON) -m pytest $(AT_ONCE)

# The launcher on a real Slurm of emulated nodes: root, and a kernel that gives out namespaces.
test-slurm: $(ENVIRONMENTS)
	bash tests/slurm/install.sh
	$(TRAINER_PYTHON) -m pytest tests/slurm -m 'slurm and not faults'

# What is too long for every commit: every process of a sidecar killed and stopped in turn.
test-faults: $(ENVIRONMENTS)
	bash tests/slurm/install.sh
	$(TRAINER_PYTHON) -m pytest tests $(AT_ONCE) -m 'faults and not slurm'
	$(TRAINER_PYTHON) -m pytest tests/slurm -m 'faults and slurm'

# On a machine with a GPU; without one every test says why it is skipped.
test-gpu: $(ENVIRONMENTS)
	$(TRAINER_PYTHON) -m pytest tests/gpu -rs

# Eight minutes on an H100 or H200: speed and memory, into benchmarks/gpu.md.
bench-gpu: $(ENVIRONMENTS)
	$(TRAINER_PYTHON) benchmarks/gpu.py

lint: $(ENVIRONMENTS)
	$(TRAINER_PYTHON) -m pre_commit run --all-files

format: $(ENVIRONMENTS)
	ruff check --fix .
	ruff format .

environments:
	bash tools/setup_env.sh

clean:
	rm -rf .hypothesis .mypy_cache .pytest_cache .ruff_cache build ./*.egg-info
	find megatron_rlsc tests tools -name __pycache__ -type d -exec rm -rf {} +
