# mutune: `make sweep` and `make test` set everything up on a fresh machine (Python 3.11+, make, a package index).
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
export OMP_NUM_THREADS ?= 1

.DEFAULT_GOAL := help
.PHONY: help setup sweep test demo check format soak clean

help:  ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 10

setup: $(READY)  ## create .venv and install mutune into it

# torch goes first, alone, at the pinned version: any other order lets pip replace it.
# mup asks for torchvision but never imports it; where it does not import it also breaks other packages, so it goes.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "mutune needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) -V). Try: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 2; }
	@echo "setup 1/4  a virtual environment, $(VENV)/: seconds"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "setup 2/4  torch, unless it is there: the largest download, minutes (with CUDA on Linux)"
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	@echo "setup 3/4  mutune with what it needs, and what its tests, checks and benchmarks need: minutes"
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@echo "setup 4/4  torchvision goes, which nothing here imports, unless it works: seconds"
	@$(BIN)/python -W ignore -c 'import torchvision' 2>/dev/null || $(BIN)/python -m pip uninstall --quiet --yes torchvision
	@touch $(READY)
	@echo "setup      done; commands run as $(BIN)/python -m mutune.sweep"

sweep: $(READY)  ## the main job: search the proxy's hyperparameters (+sweep=proxy)
	$(BIN)/python -m mutune.sweep +sweep=proxy

test: $(READY)  ## the quick tests (15 to 20 minutes on 2 cores)
	$(BIN)/python -m pytest -m "not soak" -n 2 --dist worksteal

demo: $(READY)  ## valley, transfer and the small target; redraws the README's figure
	$(BIN)/python -m mutune.sweep +sweep=valley
	$(BIN)/python -m mutune.sweep +sweep=proxy
	$(BIN)/python -m mutune.transfer study=proxy target=small
	env -u OMP_NUM_THREADS $(BIN)/python -m mutune.train transfer=runs/transfer/proxy--small/transfer.yaml
	mkdir -p docs/figures && cp runs/sweeps/valley/figures/valley.png docs/figures/valley.png
	@echo "docs/figures/valley.png is redrawn; look also into runs/transfer/proxy--small and runs/train/small"

check: $(READY)  ## lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)  ## rewrite the sources in the house's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

soak: $(READY)  ## the long experiments; results go to benchmarks/
	$(BIN)/python -m pytest -m soak

clean:  ## remove the virtual environment and caches, never runs/
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache
