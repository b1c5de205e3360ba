PYTHON ?= python

.PHONY: quality style test test-fast tree bench

quality:  ## what CI checks besides the tests
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

style:  ## fix what can be fixed automatically
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

test:  ## everything: unit tests, Ray, real weights, a real deployment
	$(PYTHON) -m pytest -n 3

test-fast:  ## unit tests only, offline
	$(PYTHON) -m pytest -m "not slow"

tree:  ## the file tree of ARCHITECTURE.md
	$(PYTHON) -m tests.helpers.file_tree

bench:  ## the tables of docs/costs.md, docs/planning.md, docs/exchange.md and docs/deployment.md
	mkdir -p results
	$(PYTHON) simulations/benchmarks/split_overhead.py --json results/split_overhead.json
	$(PYTHON) simulations/benchmarks/exchange.py --json results/exchange.json
	$(PYTHON) simulations/benchmarks/repeated_rows.py --json results/repeated_rows.json
	$(PYTHON) simulations/benchmarks/error_feedback.py --json results/error_feedback.json
	$(PYTHON) simulations/benchmarks/stale_parts.py --json results/stale_parts.json
	$(PYTHON) simulations/benchmarks/aggregation.py --json results/aggregation.json
	$(PYTHON) simulations/benchmarks/importance.py --json results/importance.json
	$(PYTHON) simulations/benchmarks/cost_model.py --json results/cost_model.json
	$(PYTHON) simulations/benchmarks/planner.py --json results/planner.json
	$(PYTHON) simulations/benchmarks/planned_ranks.py --json results/planned_ranks.json
	$(PYTHON) simulations/benchmarks/state_memory.py --json results/state_memory.json
	$(PYTHON) simulations/benchmarks/quantized.py --json results/quantized.json
	$(PYTHON) simulations/benchmarks/increments.py --json results/increments.json
	$(PYTHON) simulations/benchmarks/load.py --json results/load.json --simulated
	$(PYTHON) simulations/benchmarks/hostile.py --json results/hostile.json
	$(PYTHON) simulations/benchmarks/faults.py --json results/faults.json
