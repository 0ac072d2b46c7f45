# Every target does its own set-up: a virtual environment in .venv, made once and remade when
# pyproject.toml changes.

VENV := .venv
PYTHON_IN_VENV := $(VENV)/bin/python
READY := $(VENV)/ready

.PHONY: help setup demo test lint clean

help:
	@echo "make demo   train with KV shifting through Megatron's loop and show the result (minutes)"
	@echo "make test   run the tests (CPU, gloo)"
	@echo "make lint   run the linter"
	@echo "make clean  remove the virtual environment and the demo's output"

setup: $(READY)

$(READY): pyproject.toml tools/make_venv.sh
	bash tools/make_venv.sh $(VENV)
	touch $@

demo: $(READY)
	$(PYTHON_IN_VENV) examples/induction/run.py

lint: $(READY)
	$(PYTHON_IN_VENV) -m ruff check .
	$(PYTHON_IN_VENV) -m ruff format --check .

test: lint
	$(PYTHON_IN_VENV) -m pytest

clean:
	rm -rf $(VENV) examples/induction/output
