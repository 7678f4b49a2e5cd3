# latentmill: `make help` lists what there is. Every target sets up .venv by itself, once.
SHELL := /bin/bash
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python
READY  := $(VENV)/ready
PEERS       := .venv-peers
PEERS_READY := $(PEERS)/ready
DOWNLOAD       := .venv-download
DOWNLOAD_READY := $(DOWNLOAD)/ready
# A machine with an NVIDIA GPU gets the GPU extra (xFormers) from the same commands.
EXTRAS := dev$(shell nvidia-smi -L >/dev/null 2>&1 && echo ,gpu)

LIST        ?=
SHARDS      ?=
OUT         ?= data/latents
MODEL       ?=
RESOLUTIONS ?=
RUN         ?= runs/demo
SCENES      ?= data/demo/scenes/held_out
MINUTES     ?= 4
ARGS        ?=

help:  ## this text
	@echo "latentmill: encode image shards once, then train U-Nets from latent shards alone."
	@echo
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo "  Train on what 'make precompute' wrote:  accelerate launch train/main.py"
	@echo "  (after: source $(VENV)/bin/activate)"

setup: $(READY)  ## install everything into .venv (again only when pyproject.toml changes)

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "make: $(PYTHON) is $$($(PYTHON) -V 2>&1); wanted 3.11 or newer. Try: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 2; }
	@echo "setting up $(VENV) (extras: $(EXTRAS)); this happens once"
	@$(PYTHON) -m venv $(VENV)
	@$(PY) -m pip install --quiet --disable-pip-version-check --editable ".[$(EXTRAS)]"
	@touch $(READY)

demo: $(READY)  ## the whole path on scenes it draws itself: a grid of images in minutes (MINUTES=4)
	@$(PY) -m examples.demo --minutes $(MINUTES) $(ARGS)

download: $(READY) $(DOWNLOAD_READY)  ## images: LIST=urls.parquet [OUT=data/images], a folder or s3://... (ARGS="--image-size 512")
	@$(PY) -m precompute.download --urls '$(LIST)' $(if $(filter-out file,$(origin OUT)),--out '$(OUT)') $(ARGS)

download-env: $(DOWNLOAD_READY)  ## img2dataset, in an environment of its own, for make download

$(DOWNLOAD_READY): precompute/download-requirements.txt
	@echo "setting up $(DOWNLOAD) (1 GB, minutes); this happens once"
	@$(PYTHON) -m venv $(DOWNLOAD)
	@$(DOWNLOAD)/bin/python -m pip install --quiet --disable-pip-version-check --requirement $<
	@touch $@

precompute: $(READY)  ## stage 1: SHARDS="...{00000..00099}.tar" [OUT=data/latents MODEL=<folder|hub id> RESOLUTIONS=256,512]
	@$(PY) -m precompute --shards '$(SHARDS)' --out '$(OUT)' \
	  $(if $(MODEL),--model '$(MODEL)') $(if $(RESOLUTIONS),--resolutions '$(RESOLUTIONS)') $(ARGS)

train: $(READY)  ## stage 2: train on data/latents with the preset that fits it (ARGS="tiny --max-steps 300")
	@$(VENV)/bin/accelerate launch --quiet train/main.py $(ARGS)

bench: $(READY)  ## online against offline training, side by side (last line: JSON)
	@$(PY) -m benchmarks $(ARGS)

sweep: $(READY)  ## hyper-parameters at small scale: cost against validation loss (ARGS="--data data/demo/latents --trials 8")
	@$(PY) -m train.sweep $(ARGS)

evaluate: $(READY)  ## RUN=runs/demo [SCENES=...]: grid, FID, CLIP score and scene accuracy by guidance scale, with a plot
	@$(PY) -m evaluate guidance --source '$(RUN)' $(if $(SCENES),--scenes '$(SCENES)') $(ARGS)

serve: $(READY)  ## RUN=runs/demo: images over HTTP, with a page, on loopback (ARGS="--port 8000")
	@$(PY) -m serve run --source '$(RUN)' $(ARGS)

peers: $(PEERS_READY)  ## other people's loaders, in an environment of their own, for python -m benchmarks loader

$(PEERS_READY): benchmarks/peers/requirements.txt
	@echo "setting up $(PEERS) (1.9 GB, minutes); this happens once"
	@$(PYTHON) -m venv $(PEERS)
	@$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check --requirement $<
	@touch $@

test: $(READY)  ## all tests, side by side (ARGS="-k order", ARGS="-n 0" one after another)
	@OMP_NUM_THREADS=1 $(PY) -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile $(ARGS)

check: $(READY)  ## lint, formatting, types, import contracts
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/mypy
	@$(VENV)/bin/lint-imports

plan: $(READY)  ## the bill before the job: time, bytes, money (ARGS="--help"; without: a published job)
	@$(PY) -m benchmarks plan $(or $(ARGS),--preset mosaicml-a100)

report: $(READY)  ## runs and results as one HTML page, report.html
	@$(PY) -m benchmarks report $(ARGS)

tiny-clip: $(READY)  ## train the embedded CLIP again, which FID and CLIP score of scenes rest on (minutes on 2 cores)
	@$(PY) -m examples.tiny_clip --out examples/tiny-clip $(ARGS)

tiny-model: $(READY)  ## train the embedded VAE and text encoder again (about 45 minutes on 2 cores)
	@$(PY) -m examples.tiny_model --out examples/tiny-model $(ARGS)

clean:  ## remove .venv, .venv-peers, .venv-download, caches and the demo's data (never data/latents, never other runs)
	rm -rf $(VENV) $(PEERS) $(DOWNLOAD) data/demo data/bench data/loader-* data/train-step-* data/scaling-* data/env-* data/latency report.html runs/demo .hypothesis .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.PHONY: help setup demo download download-env precompute train bench sweep evaluate serve peers test check plan report tiny-clip tiny-model clean
