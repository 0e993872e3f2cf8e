# make demo | test | slow | lint | bench ROOT=<folder with CIFAR-10>     Each creates .venv itself on a fresh machine.
PYTHON ?= python3
BIN := .venv/bin
ENVIRONMENT := .venv/.complete

.PHONY: demo test slow lint bench clean

demo: $(ENVIRONMENT)  ## fine-tune a pretrained ViT on real images with NoRA++, against the head alone
	$(BIN)/python -m vision.demo $(DEMO)

test: $(ENVIRONMENT)  ## fast tests: no network, under six minutes
	$(BIN)/python -m pytest

slow: $(ENVIRONMENT)  ## real weights, compiled kernels, several processes
	$(BIN)/python -m pytest -m slow

lint: $(ENVIRONMENT)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

bench: $(ENVIRONMENT)  ## measure everything that docs/results.md shows; ROOT holds CIFAR-10 as an image folder or archives
	@test -n "$(ROOT)" || { echo 'error: make bench ROOT=DIR, with DIR/train and DIR/test or their .tar.gz archives'; exit 1; }
	$(BIN)/python -m benchmarks.step_time
	$(BIN)/python -m benchmarks.cifar10_accuracy --root $(ROOT)
	$(BIN)/python -m benchmarks.tables

# The marker is written last, so that an interrupted installation is repeated.
$(ENVIRONMENT): pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --disable-pip-version-check -q -e ".[dev]"
	touch $@

clean:
	rm -rf .venv
