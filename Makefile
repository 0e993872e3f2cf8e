# make demo | demo-language | test | slow | lowest | lint | docs | wheel | wheel-aarch64 | bench ROOT=<folder with data> | bench-gpu   Each creates .venv on a fresh machine.
PYTHON ?= python3
BIN := .venv/bin
ENVIRONMENT := .venv/.complete

.PHONY: demo demo-language test slow lowest lint docs wheel wheel-aarch64 bench bench-gpu clean

demo: $(ENVIRONMENT)  ## fine-tune a pretrained ViT on real images with NoRA++, against the head alone
	$(BIN)/python -m vision.demo $(DEMO)

demo-language: $(ENVIRONMENT)  ## fine-tune a language model with AFA-LoRA, merge it, and load it in peft
	$(BIN)/python -m language.demo $(DEMO)

# A process for each core, at most 8: each takes about a gigabyte.
PYTEST := $(BIN)/python -m pytest -n logical --maxprocesses 8 --dist loadfile

test: $(ENVIRONMENT)  ## fast tests: no network, under five minutes
	OMP_NUM_THREADS=1 $(PYTEST)  # one thread a process, as the processes share the cores

slow: $(ENVIRONMENT)  ## real weights, compiled kernels, several processes
	OMP_NUM_THREADS=1 $(PYTEST) -m slow --ignore=tests/test_speed.py
	# Alone, as what runs beside it would be measured too; what fails, once more: a process can be unlucky with its
	# memory or its neighbours, a loss of speed is in each.
	$(BIN)/python -m pytest -m slow tests/test_speed.py || $(BIN)/python -m pytest -m slow --last-failed tests/test_speed.py

# With the oldest versions that pyproject.toml allows, in an environment of its own.
LOWEST := .venv-lowest/bin/python
LOWEST_TESTS := tests/activations tests/files tests/huggingface tests/language tests/learned tests/lightning tests/methods \
	tests/model tests/ops tests/optimizers tests/training tests/vision
# These hold us to packages that are no dependencies, which have lowest versions of their own.
LOWEST_TESTS += $(patsubst %,--ignore=tests/%,files/test_diffusers.py huggingface/test_trl.py \
	methods/test_quantised_by_others.py optimizers/test_product_optimizers.py training/test_boards.py)

lowest: $(ENVIRONMENT)  ## fast tests of the library and the applications with the lowest versions
	$(BIN)/uv venv -q --clear .venv-lowest
	$(BIN)/uv pip install -q --python $(LOWEST) --resolution lowest-direct \
		-e ".[vision,language,peft,nf4,eval,study]" "pytest>=8" "pytest-xdist[psutil]>=3.6"
	OMP_NUM_THREADS=1 $(LOWEST) -m pytest -n logical --maxprocesses 8 --dist loadfile $(LOWEST_TESTS)

lint: $(ENVIRONMENT)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

docs: $(ENVIRONMENT)  ## the site from docs/ and the docstrings, in site/; warnings and dead links are errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

wheel: $(ENVIRONMENT)  ## a wheel in dist/ with kernels compiled for this machine; where it is installed no compiler is needed
	LIT_ADAPTERS_KERNELS=1 $(BIN)/python -m pip wheel -q --no-deps -w dist .

wheel-aarch64: $(ENVIRONMENT)  ## the same for aarch64, on another machine; needs Debian's g++-aarch64-linux-gnu or its like
	LIT_ADAPTERS_KERNELS=aarch64 CXX=aarch64-linux-gnu-g++ $(BIN)/python -m pip wheel -q --no-deps -w dist .

# ROOT holds cifar10/ (train and test, folders or .tar.gz), alpaca_demo/ and mmlu/. Methods are compared by configs/studies.
bench: $(ENVIRONMENT)  ## measure speed and memory: hours
	@test -n "$(ROOT)" || { echo 'error: make bench ROOT=DIR, the folder with cifar10/, alpaca_demo/ and mmlu/'; exit 1; }
	for model in vit smollm2; do for precision in fp32 bf16; do \
		$(BIN)/python -m benchmarks.step_time --model $$model --precision $$precision || exit 1; done; done
	$(BIN)/python -m benchmarks.callback_overhead --root $(ROOT)
	$(BIN)/python -m benchmarks.healthy_and_sick --root $(ROOT)/cifar10
	$(BIN)/python -m benchmarks.linearisation --root $(ROOT)/cifar10 --rows $(ROOT)/alpaca_demo/train.jsonl
	$(BIN)/python -m benchmarks.against_peft --ranks 4 8 16 64 --precisions fp32 bf16
	$(BIN)/python -m benchmarks.against_peft --models vit llama --precisions fp32 bf16 --checkpointing
	$(BIN)/python -m benchmarks.inside_peft
	$(BIN)/python -m benchmarks.several_adapters
	$(BIN)/python -m benchmarks.estimates
	$(BIN)/python -m benchmarks.shared_estimates
	$(BIN)/python -m benchmarks.larger_than_memory
	$(BIN)/python -m benchmarks.whole_jobs --rows $(ROOT)/alpaca_demo/train.jsonl --images $(ROOT)/cifar10 --mmlu $(ROOT)/mmlu
	$(BIN)/python -m benchmarks.peft_memory --ranks 4 8 16 64 --precisions fp32 bf16
	$(BIN)/python -m benchmarks.peft_memory --models vit llama --precisions fp32 bf16 --checkpointing
	for question in rational_speed time_shares loran_speed inference startup growth; do \
		$(BIN)/python -m benchmarks.$$question || exit 1; done
	$(BIN)/python -m benchmarks.tables

bench-gpu: $(ENVIRONMENT)  ## measure kernels, training steps, fine-tuning and generation on one GPU: ten minutes, no network
	@$(BIN)/python -m benchmarks.gpu || failed=1; $(BIN)/python -m benchmarks.tables && test -z "$$failed"

# The marker is written last, so that an interrupted installation is repeated.
$(ENVIRONMENT): pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --disable-pip-version-check -q -e ".[dev]"
	touch $@

clean:
	rm -rf .venv .venv-lowest
