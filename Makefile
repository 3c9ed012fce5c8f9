PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SHELL := /bin/bash

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint format docs sglang-contract bench clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

setup: $(VENV)/.installed ## make the virtual environment and install the project with its tools

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: setup ## plain decoding, EAGLE-3 and ECHO on the same real prompts
	$(BIN)/echo-rl demo

test: setup ## the whole test suite
	$(BIN)/python -m pytest

lint: setup ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup ## rewrite the sources in the house style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: setup ## the documentation, into site/; a broken link or name is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

sglang-contract: ## the SGLang plugin against the real wheel, in an environment of its own
	scripts/sglang_contract.sh

bench: setup ## every number of the documentation (hours; resumable)
	$(BIN)/python -m benchmarks.engine.losslessness
	$(BIN)/python -m benchmarks.engine.plain_decoding
	$(BIN)/python -m benchmarks.engine.neighbours
	$(BIN)/python -m benchmarks.engine.acceptance
	$(BIN)/python -m benchmarks.engine.throughput
	$(BIN)/python -m benchmarks.engine.throughput --suite held_out
	$(BIN)/echo-rl record --width 10 --batch 32 --out benchmarks/results/work/trace
	$(BIN)/python -m benchmarks.research.fidelity
	$(BIN)/python -m benchmarks.research.rivals
	OMP_NUM_THREADS=1 taskset -c 0 $(BIN)/python -m benchmarks.learning.env_rate
	$(BIN)/python -m benchmarks.learning.policies
	$(BIN)/python -m benchmarks.learning.ceiling
	$(BIN)/echo-rl ab --a echo --b ppo --on live --workloads closed:1 closed:4 closed:16 bursty:0.5,6,5,5 shift:6,6 \
		--blocks 8 --seconds 12 --trace benchmarks/results/work/trace/trace.safetensors --out benchmarks/results/work/ab
	cp benchmarks/results/work/ab/ab.json benchmarks/results/ab_live.json
	$(BIN)/python -m benchmarks.research.first_token
	$(BIN)/python -m benchmarks.research.roofline
	$(BIN)/python -m benchmarks.kernels.cost
	$(BIN)/python -m benchmarks.server.identity
	$(BIN)/python -m benchmarks.server.overhead
	$(BIN)/python -m benchmarks.server.sweep
	$(BIN)/python -m benchmarks.soak.run
	$(BIN)/python -m benchmarks.render

clean: ## remove build products and caches (not the virtual environment)
	rm -rf build dist site *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
