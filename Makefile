# Every target does its own set-up: a virtual environment in .venv, made once and remade when
# pyproject.toml changes.

VENV := .venv
PYTHON_IN_VENV := $(VENV)/bin/python
READY := $(VENV)/ready

# Transformer Engine has an environment of its own, made from a folder of wheels.
TE_VENV := .venv-te
TE_READY := $(TE_VENV)/ready
TE_WHEELS ?= ../shared/wheels

# Releases of megatron-core that `test-matrix` runs, and its further options for pytest.
VERSIONS := 0.17.1 0.18.2 0.19.2
MATRIX_FLAGS :=

# Further options of tools/benchmark.py for `bench`.
BENCH_FLAGS :=

.PHONY: help setup demo bench test test-matrix test-te test-gpu test-slurm lint clean

help:
	@echo "make demo   train with KV shifting through Megatron's loop and show the result (minutes)"
	@echo "make bench  measure what KV shifting costs on this machine (10 minutes; BENCH_FLAGS=--quick)"
	@echo "make test   run the tests (CPU, gloo)"
	@echo "make test-matrix  run the layer, layout and spec tests on every release of VERSIONS"
	@echo "make test-te  run the tests of the Transformer Engine layer (wheels from TE_WHEELS)"
	@echo "make test-gpu  run the layer, its kernels and the training loop on a GPU (as test-te)"
	@echo "make test-slurm  run the Slurm script on a cluster of its own (root; installs Debian's Slurm)"
	@echo "make lint   run the linter"
	@echo "make clean  remove the virtual environments and the demo's output"

setup: $(READY)

$(READY): pyproject.toml tools/make_venv.sh
	bash tools/make_venv.sh $(VENV)
	touch $@

demo: $(READY)
	$(PYTHON_IN_VENV) examples/induction/run.py

bench: $(READY)
	$(PYTHON_IN_VENV) tools/benchmark.py $(BENCH_FLAGS)

lint: $(READY)
	$(PYTHON_IN_VENV) -m ruff check .
	$(PYTHON_IN_VENV) -m ruff format --check .

test: lint
	$(PYTHON_IN_VENV) -m pytest

$(VENV)/megatron-core-%/ready: tools/lay_megatron_over.sh | $(READY)
	bash tools/lay_megatron_over.sh $(VENV) $*

test-matrix: $(VERSIONS:%=$(VENV)/megatron-core-%/ready)
	failed=; for version in $(VERSIONS); do \
		PYTHONPATH=$(abspath $(VENV))/megatron-core-$$version $(PYTHON_IN_VENV) -m pytest \
			--megatron $$version $(MATRIX_FLAGS) || failed="$$failed $$version"; \
	done; [ -z "$$failed" ] || { echo "failed with megatron-core$$failed" >&2; exit 1; }

$(TE_READY): $(READY) tools/make_te_venv.sh
	bash tools/make_te_venv.sh $(TE_VENV) $(VENV) $(TE_WHEELS)
	touch $@

test-te: $(TE_READY)
	$(TE_VENV)/bin/python -m pytest tests/transformer_engine

test-gpu: $(TE_READY)
	$(TE_VENV)/bin/python -m pytest tests/gpu

test-slurm: $(READY)
	bash tests/slurm/install.sh
	$(PYTHON_IN_VENV) -m pytest tests/slurm

clean:
	rm -rf $(VENV) $(TE_VENV) examples/induction/output
