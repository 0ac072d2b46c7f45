# Every target does its own set-up: a virtual environment in .venv with the exact versions of
# tools/requirements, made once and brought up to date when the lists or pyproject.toml change.

VENV := .venv
PYTHON_IN_VENV := $(VENV)/bin/python
READY := $(VENV)/ready
REQUIREMENTS := tools/requirements
SETUP := pyproject.toml $(REQUIREMENTS)/dev.txt tools/environments.sh

# Environments of both ends of pyproject.toml's ranges.
LATEST_VENV := .venv-latest
OLDEST_VENV := .venv-oldest

# Transformer Engine has an environment of its own, made from a folder of wheels.
TE_VENV := .venv-te
TE_READY := $(TE_VENV)/ready
TE_WHEELS ?= ../shared/wheels

# Releases of megatron-core that `test-matrix` runs, and its further options for pytest.
VERSIONS := 0.17.1 0.18.2 0.19.2
MATRIX_FLAGS :=

# A checkout of Megatron-LM that `test-next` runs, outside of this project.
MEGATRON_PATH :=

# Releases of Transformers that `test-transformers` runs besides the pinned one: the first and last of
# each stretch in which the library changed what the model touches (compatibility_kvshift.py).
TRANSFORMERS := 5.0.0 5.3.0 5.4.0 5.12.1 5.14.1 5.15.1 5.19.0 5.20.2 5.23.0 newest
TRANSFORMERS_VENVS := .venv-transformers

# Which tests `test`, `test-latest` and `test-oldest` run, and other options for pytest; all of them.
TESTS :=
# Processes that run them: one those that launch ranks, the others everything else.
WORKERS := 2
# A worker that dies ends the run: pytest-xdist would wait for its tests for ever.
PARALLEL = -n $(WORKERS) --dist loadscope --no-loadscope-reorder --max-worker-restart 0

# What `lock` renews besides versions that no longer fit: names of packages, or `all`.
UPGRADE :=

# Further options of `python -m tools.benchmarks` for `bench`.
BENCH_FLAGS :=

# uv or pip (docs/install.md).
export INSTALLER

.PHONY: help setup lock demo bench test test-fast test-latest test-oldest test-transformers test-matrix \
	test-next test-te test-gpu test-slurm lint docs dist clean

help:
	@echo "make demo   train with KV shifting through Megatron's loop and show the result (minutes)"
	@echo "make bench  measure what KV shifting costs on this machine (10 to 17 minutes; BENCH_FLAGS=--quick)"
	@echo "make test   run the tests (CPU, gloo; TESTS=tests/ops: part of them)"
	@echo "make test-fast  run those that start no ranks and build nothing (minutes)"
	@echo "make test-latest  run them with the newest versions that pyproject.toml allows"
	@echo "make test-oldest  run them with the oldest ones"
	@echo "make test-transformers  run the tests of the exported model on the releases of TRANSFORMERS"
	@echo "make test-matrix  run the layer, layout and spec tests on every release of VERSIONS"
	@echo "make test-next  run them, and some of the entry point's, on a checkout of Megatron-LM (MEGATRON_PATH)"
	@echo "make test-te  run the tests of the Transformer Engine layer (wheels from TE_WHEELS)"
	@echo "make test-gpu  run the layer, its kernels and the training loop on a GPU (as test-te)"
	@echo "make test-slurm  run the Slurm script on a cluster of its own (root; installs Debian's Slurm)"
	@echo "make lint   run the linter and the type checker"
	@echo "make docs   build the documentation into build/site; a broken link is an error"
	@echo "make lock   renew the lists of exact versions (UPGRADE='numpy psutil', UPGRADE=all)"
	@echo "make dist   build the sdist and the wheel"
	@echo "make clean  remove the virtual environments and the demo's output"

setup: $(READY)

$(READY): $(SETUP) tools/make_venv.sh
	@bash tools/make_venv.sh $(VENV)
	@touch $@

lock:
	@bash tools/lock.sh $(UPGRADE)

demo: $(READY)
	$(PYTHON_IN_VENV) examples/induction/run.py

bench: $(READY)
	$(PYTHON_IN_VENV) -m tools.benchmarks $(BENCH_FLAGS)

lint: $(READY)
	$(PYTHON_IN_VENV) -m ruff check .
	$(PYTHON_IN_VENV) -m ruff format --check .
	$(PYTHON_IN_VENV) -m mypy

# Without Material's advertisement of MkDocs' successor.
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(PYTHON_IN_VENV) -m mkdocs build --strict --quiet

test: lint
	$(PYTHON_IN_VENV) -m pytest $(PARALLEL) $(TESTS)

test-fast: $(READY)
	$(PYTHON_IN_VENV) -m pytest $(PARALLEL) -m "not slow" $(TESTS)

# Without a stamp: what is newest changes by itself.
test-latest:
	@bash tools/make_range_venv.sh $(LATEST_VENV) highest
	$(LATEST_VENV)/bin/python -m pytest $(PARALLEL) --versions latest $(TESTS)

# Twice: with the oldest megatron-core what that has (as test-matrix), with the pinned one everything.
PINNED_MEGATRON = $(shell sed -n 's/^megatron-core==//p' $(REQUIREMENTS)/dev.txt)
OLDEST_MEGATRON = $(shell sed -n 's/.*"megatron-core>=\([0-9.]*\),.*/\1/p' pyproject.toml)
test-oldest:
	@bash tools/make_range_venv.sh $(OLDEST_VENV) lowest-direct
	@bash tools/lay_megatron_over.sh $(OLDEST_VENV) $(PINNED_MEGATRON)
	failed=; PYTHONPATH=$(abspath $(OLDEST_VENV))/megatron-core-$(PINNED_MEGATRON) \
		$(OLDEST_VENV)/bin/python -m pytest $(PARALLEL) --versions oldest $(TESTS) || failed=1; \
	$(OLDEST_VENV)/bin/python -m pytest $(PARALLEL) --versions oldest --megatron $(OLDEST_MEGATRON) \
		$(TESTS) || failed=1; [ -z "$$failed" ]

test-transformers: $(READY)
	@bash tools/test_transformers.sh $(TRANSFORMERS_VENVS) $(VENV) "$(PARALLEL)" $(TRANSFORMERS)

$(VENV)/megatron-core-%/ready: tools/lay_megatron_over.sh | $(READY)
	@bash tools/lay_megatron_over.sh $(VENV) $*

test-matrix: $(VERSIONS:%=$(VENV)/megatron-core-%/ready)
	failed=; for version in $(VERSIONS); do \
		PYTHONPATH=$(abspath $(VENV))/megatron-core-$$version $(PYTHON_IN_VENV) -m pytest \
			$(PARALLEL) --megatron $$version $(MATRIX_FLAGS) || failed="$$failed $$version"; \
	done; [ -z "$$failed" ] || { echo "failed with megatron-core$$failed" >&2; exit 1; }

test-next: $(READY)
	@bash tools/test_next.sh $(VENV) "$(MEGATRON_PATH)" "$(PARALLEL) $(MATRIX_FLAGS)"

$(TE_READY): $(READY) $(REQUIREMENTS)/te.txt $(REQUIREMENTS)/te-alone.txt tools/make_te_venv.sh
	@bash tools/make_te_venv.sh $(TE_VENV) $(VENV) $(TE_WHEELS)
	@touch $@

test-te: $(TE_READY)
	$(TE_VENV)/bin/python -m pytest tests/transformer_engine

test-gpu: $(TE_READY)
	$(TE_VENV)/bin/python -m pytest tests/gpu

test-slurm: $(READY)
	bash tests/slurm/install.sh
	$(PYTHON_IN_VENV) -m pytest tests/slurm

dist: $(READY)
	$(PYTHON_IN_VENV) -m build --no-isolation --outdir dist

clean:
	rm -rf dist build $(VENV) $(TE_VENV) $(LATEST_VENV) $(OLDEST_VENV) $(TRANSFORMERS_VENVS) .venv-lock examples/induction/output
