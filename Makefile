# Gatehouse. `make help` lists the commands; each prepares .venv first where it needs one.
SHELL := /bin/bash
PROFILE ?= cpu
CONFIG ?= $(if $(filter gpu,$(PROFILE)),serve_config.yaml,serve_config.local.yaml)
PYTHON ?= python3
BIN := .venv/bin

export PYTHONUNBUFFERED := 1

.DEFAULT_GOAL := help
.PHONY: help serve install install-dev test test-fast lint fmt lock prove-serve prove-meter prove-route prove-budgets bench retrain-router clean

help: ## this list
	@grep -hE '^[a-zA-Z_%-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

serve: install ## start everything; PROFILE=cpu|gpu, PORT=8000, CONFIG=file
	@exec $(BIN)/gatehouse serve --config $(CONFIG) $(if $(PORT),--port $(PORT))

install: ## prepare .venv for serving
	@$(PYTHON) scripts/bootstrap.py --profile $(PROFILE)

install-dev: ## prepare .venv for serving and testing
	@$(PYTHON) scripts/bootstrap.py --profile $(PROFILE) --dev

test: install-dev ## every check and every test; what CI runs
	@exec $(BIN)/python scripts/check.py

test-fast: install-dev ## linters, and tests without Ray and engines
	@exec $(BIN)/python scripts/check.py --fast

lint: install-dev ## ruff, mypy, import rules
	@exec $(BIN)/python scripts/check.py --lint-only

fmt: install-dev ## format the code
	@$(BIN)/ruff check --fix-only --quiet . && $(BIN)/ruff format .

lock: ## regenerate requirements/*.txt; UPGRADE=1 takes newer versions
	@$(PYTHON) scripts/lock.py $(if $(UPGRADE),--upgrade)

prove-serve: install-dev ## measure the goals of serving, one line each
	@exec $(BIN)/python -m benchmarks.prove_serve

prove-meter: install-dev ## measure the goals of metering, ledger and audit, one line each
	@exec $(BIN)/python -m benchmarks.prove_meter

prove-route: install-dev ## measure the goals of routing, one line each
	@exec $(BIN)/python -m benchmarks.prove_route $(if $(TRACES),--data $(TRACES)) $(if $(WORK),--work $(WORK))

prove-budgets: install-dev ## measure the goals of budgets and fairness, one line each
	@exec $(BIN)/python -m benchmarks.prove_budgets $(if $(TRACES),--data $(TRACES))

bench: install-dev ## the long versions: 10,000 schedules, 100 kills, more rounds on the engines
	@exec $(BIN)/python -m benchmarks.prove_budgets --long --out benchmarks/results/prove_budgets_long.json $(if $(TRACES),--data $(TRACES))

retrain-router: install-dev ## fit the scorer to your own outcomes, behind a gate; DATA=folder, OUT=folder
	@exec $(BIN)/python -m routing.retrain --data $(or $(DATA),$(error give DATA=folder of outcome files)) --out $(or $(OUT),build/routing/scorer) $(ARGS)

bench-%: install-dev ## run one benchmark, such as bench-data_plane
	@exec $(BIN)/python -m benchmarks.$*.run

clean: ## remove .venv, build/ and caches; data/ stays
	@rm -rf .venv build .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache *.egg-info
	@find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
