# Every target makes its own environment in .venv, and remakes it when the pins change.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: demo test lint bench docs clean
demo: $(STAMP)
	$(BIN)/python -m examples.digits --out out/digits

test: $(STAMP)
	$(BIN)/python -m pytest -n 2

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(STAMP)
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[bench]"
	$(BIN)/python -m benchmarks.overhead
	$(BIN)/python -m benchmarks.jitted
	$(BIN)/python -m benchmarks.work_precision --set nonstiff
	$(BIN)/python -m benchmarks.work_precision --set stiff
	$(BIN)/python -m benchmarks.heterogeneous --compiled
	$(BIN)/python -m benchmarks.adjoints
	$(BIN)/python -m benchmarks.sde_overhead
	$(BIN)/python -m benchmarks.sde_gradients
	$(BIN)/python -m benchmarks.adaptive_sde
	$(BIN)/python -m benchmarks.cde
	$(BIN)/python -m benchmarks.cnf
	$(BIN)/python -m benchmarks.flows
	$(BIN)/python -m benchmarks.flow_matching
	$(BIN)/python -m benchmarks.processes
	$(BIN)/python -m benchmarks.spirals --jobs 2
	$(BIN)/python -m benchmarks.sampler_overhead
	$(BIN)/python -m benchmarks.trees
	$(BIN)/python -m benchmarks.samplers

docs: $(STAMP)
	$(BIN)/python -m pip install -q -c constraints.txt "pdoc>=15"
	$(BIN)/pdoc -o docs/api flowsde

# torch first and alone: whatever is asked for later is satisfied by the pinned build.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[dev]"
	touch $@

clean:
	rm -rf .venv out docs/api
