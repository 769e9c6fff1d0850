# `make serve` runs the gateway, `make test` every test. Both set up what they need.
.DEFAULT_GOAL := help
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
HOST ?= 127.0.0.1
PORT ?= 8080
DATA_DIR ?= data
CLIENTS := tests/clients
WEB := web
PAGES := gateway/pages
SOURCES := gateway providers tests bench grafana
# What plays the books at their whole size with --whole.
BOOKS := tests/contract/test_ledger.py::test_the_books_are_as_the_rules_say tests/flows/test_month.py
HAS_NODE := command -v npm >/dev/null && node -e 'process.exit(+(process.versions.node.split(".")[0] < 20))'

.PHONY: help setup setup-dev engines web pages serve test chaos check format bench dashboards simulate simulators lock clean

help: ## Show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/\t/' | expand -t 16

setup: $(VENV)/.run ## Make .venv with what the gateway needs

setup-dev: $(VENV)/.dev ## Make .venv with what the tests need too

serve: setup pages ## Run the gateway (HOST, PORT, DATA_DIR)
	@exec $(BIN)/imageway serve --host $(HOST) --port $(PORT) --data-dir $(DATA_DIR)

web: $(PAGES)/index.html ## Build playground and console into the gateway (needs Node 20)

# What `make serve` shows at /. The API does not need it, so nothing here may fail.
pages:
	@if $(HAS_NODE); then \
	  $(MAKE) --silent web || echo "The playground could not be built; the gateway runs without it" >&2; \
	else \
	  echo "There is no playground at /: it is built with Node 20 or newer (Debian: apt-get install nodejs npm)" >&2; \
	fi

test: setup-dev engines $(CLIENTS)/node_modules/.done $(PAGES)/index.html ## Run every test
	$(BIN)/python -m pytest -n 2 --dist worksteal -q $(ARGS)

chaos: setup-dev ## Kill workers, ask for too much, play the books for an hour, and see that nothing is lost
	$(BIN)/python -m pytest -q -s --whole -o timeout=1200 tests/chaos $(BOOKS) $(ARGS)

check: setup-dev engines ## Format, lint, types, import contracts, pages, configuration, rules, image, compose
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/imageway check
	@if $(HAS_NODE); then $(MAKE) --silent $(WEB)/node_modules/.done && npm run --silent --prefix $(WEB) check; \
	elif [ -n "$$CI" ]; then echo "The pages are checked with Node 20 or newer (Debian: apt-get install nodejs npm)" >&2; exit 1; \
	else echo "web: not checked, there is no Node" >&2; fi
	$(BIN)/check-jsonschema --builtin-schema vendor.compose-spec compose.yaml
	$(BIN)/python -m grafana.build --check
	@if command -v promtool >/dev/null; then \
	  promtool check config grafana/prometheus.yaml && promtool test rules grafana/rules/tests/*.yaml; \
	else echo "grafana/rules: not tested, there is no promtool (Debian: apt-get install prometheus)" >&2; fi
	@if [ -x $(BIN)/hadolint ]; then $(BIN)/hadolint --failure-threshold style Dockerfile && echo "Dockerfile: ok"; \
	else echo "Dockerfile: not linted, there is no hadolint for this machine" >&2; fi

format: setup-dev ## Format the sources
	$(BIN)/ruff format $(SOURCES)
	$(BIN)/ruff check --fix $(SOURCES)

bench: setup-dev ## Measure speed and memory; prints figures
	$(BIN)/python -m bench.decisions
	$(BIN)/python -m bench.ledger
	$(BIN)/python -m bench.keys
	$(BIN)/python -m bench.memory
	$(BIN)/python -m bench.fetching
	$(BIN)/python -m bench.growth
	$(BIN)/python -m bench.statement
	$(BIN)/python -m bench.tasks
	$(BIN)/python -m bench.overload
	$(BIN)/python -m bench.shared_state
	$(BIN)/python -m bench.speed
	$(BIN)/python -m bench.telemetry

dashboards: setup-dev ## Write the dashboards of grafana/build.py
	$(BIN)/python -m grafana.build

simulate: setup-dev ## Simulate years of outages; prints availability, cost and more
	$(BIN)/python -m bench.simulation

simulators: setup-dev ## Run six simulated providers on loopback, to rehearse an outage with
	@exec $(BIN)/python -m tests.simulators $(ARGS)

lock: ## Pin all dependencies anew (needs uv)
	uv pip compile -q --universal --python-version 3.11 --generate-hashes --no-header pyproject.toml -o requirements/run.txt
	uv pip compile -q --universal --python-version 3.11 --generate-hashes --no-header pyproject.toml --group dev -o requirements/dev.txt

clean: ## Forget .venv and node_modules (data stays)
	rm -rf $(VENV) $(CLIENTS)/node_modules $(WEB)/node_modules $(PAGES)

# A bare Debian-like machine may lack the venv module, or Python itself.
$(VENV)/bin/python:
	@if ! $(PYTHON) -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	  if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    apt-get update -q && apt-get install -qy python3 python3-venv; \
	  else \
	    echo "imageway needs Python 3.11 or newer with the venv module (Debian: apt-get install python3 python3-venv), or PYTHON=/path/to/python3" >&2; exit 1; \
	  fi; \
	fi
	$(PYTHON) -m venv $(VENV)

$(VENV)/.run: requirements/run.txt pyproject.toml | $(VENV)/bin/python
	@test -e $(VENV)/.dev || $(BIN)/python -m pip install -q --disable-pip-version-check --require-hashes -r requirements/run.txt
	@$(BIN)/python -m pip install -q --disable-pip-version-check --require-hashes -r requirements/build.txt
	@$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

$(VENV)/.dev: requirements/dev.txt $(VENV)/.run
	@$(BIN)/python -m pip install -q --disable-pip-version-check --require-hashes -r requirements/dev.txt
	@touch $@

# PostgreSQL, Redis, Prometheus and Chromium, which tests start for themselves. Without them their
# tests are skipped, but not in CI. Nothing is left running: Debian would start all at once.
ENGINES := $(shell command -v redis-server >/dev/null || echo redis-server; command -v promtool >/dev/null || echo prometheus; command -v chromium >/dev/null || echo chromium; ls /usr/lib/postgresql/*/bin/postgres >/dev/null 2>&1 || command -v postgres >/dev/null || echo postgresql)
engines:
ifneq ($(ENGINES),)
	@if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  apt-get update -q && RUNLEVEL=1 apt-get install -qy --no-install-recommends $(ENGINES); \
	elif [ -n "$$CI" ]; then \
	  echo "The tests need $(ENGINES) (Debian: apt-get install $(ENGINES))" >&2; exit 1; \
	else \
	  echo "What needs $(ENGINES) is not tested (Debian: apt-get install $(ENGINES))" >&2; \
	fi
endif

# Node, which the JavaScript clients and the pages need. Without it their tests are skipped,
# but not in CI.
define with_node
	@if ! command -v npm >/dev/null && [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  apt-get update -q && apt-get install -qy --no-install-recommends nodejs npm; \
	fi
	@if $(HAS_NODE); then \
	  $(1); \
	else \
	  echo "$(2): that needs Node 20 or newer with npm (Debian: apt-get install nodejs npm)" >&2; \
	fi
endef

$(CLIENTS)/node_modules/.done: $(CLIENTS)/package-lock.json $(CLIENTS)/package.json
	$(call with_node,npm ci --silent --prefix $(CLIENTS) && touch $@,The JavaScript clients are not tested)

$(WEB)/node_modules/.done: $(WEB)/package-lock.json $(WEB)/package.json
	$(call with_node,npm ci --silent --prefix $(WEB) && touch $@,The pages are not built)

WEB_SOURCES := $(WEB)/index.html $(WEB)/vite.config.ts $(WEB)/tsconfig.json $(shell find $(WEB)/src -type f)
$(PAGES)/index.html: $(WEB_SOURCES) $(WEB)/node_modules/.done
	$(call with_node,npm run --silent --prefix $(WEB) build,The pages are not built)
