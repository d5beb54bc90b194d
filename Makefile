# Every target works in a fresh clone: `make setup` comes first by itself, and does nothing when there is nothing to do.
# Paths here are relative on purpose, so that a checkout under a path with a space in it works too.
#   make train TORCH_INDEX_URL=...   take torch from another wheel index (for instance PyTorch's CPU wheels)
#   make setup PYTHON=python3.12     build .venv with this interpreter

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

# A Python path of the user's own would put other code in front of ours; without bytecode every start takes seconds longer.
unexport PYTHONPATH
unexport PYTHONHOME
unexport PYTHONDONTWRITEBYTECODE
export PYTHON TORCH_INDEX_URL

python := .venv/bin/python
quickstart := -d configs quickstart.yml
# Processes the tests are spread over
WORKERS ?= 2
# A worker takes one half of the tests in their order, so that what the tests of a file share is made once; who is done first takes over from the other.
SPREAD := -n $(WORKERS) --dist worksteal
# Several workers with threads of their own share the cores: a thread that waits for others sleeps, so that it does not take a core from them.
PYTEST := OMP_WAIT_POLICY=passive $(python) -m pytest
# More arguments for pytest, e.g. make test ARGS="tests/config -k alias"
ARGS ?=

.PHONY: help
help: ## list the targets
	@echo 'make TARGET, where TARGET is one of'
	@grep -hE '^[a-z-]+:.*## ' Makefile | sed -E 's/^([a-z-]+):.*## (.*)/  \1|\2/' | while IFS='|' read -r name text; do printf '%-14s%s\n' "$$name" "$$text"; done

# ---------------------------------------------------------------- setting up

.PHONY: setup
setup: ## make .venv and install everything that development and the tests need
	@requirements/install.sh dev

.PHONY: setup-run
setup-run: ## make .venv and install only what training needs
	@requirements/install.sh run

# ---------------------------------------------------------------- the two commands

.PHONY: train
train: setup-run ## prepare data, train a small language model, evaluate it and generate a sample
	@$(python) prepare_data.py -d data
	@$(python) deepy.py train.py $(quickstart) || { status=$$?; \
		case $$status in 130|143) echo 'Interrupted. To go on from the last checkpoint, run make train again.';; esac; exit $$status; }
	@echo && echo 'The newest speeches, which the model has not seen:'
	@$(python) eval.py $(quickstart) -o 'eval_text_files=[data/sotu/test.txt]' -o eval_results_prefix=runs/quickstart/test
	@echo && echo 'A sample:'
	@$(python) generate.py $(quickstart) -i configs/quickstart_prompts.txt --sample_output_file runs/quickstart/samples.jsonl
	@echo
	@printf '%-12s%s\n' checkpoint "runs/quickstart/$$(cat runs/quickstart/latest)" metrics runs/quickstart/metrics.jsonl plot runs/quickstart/training.png \
		samples runs/quickstart/samples.jsonl
	@echo 'If you run make train again, it only measures and samples. To train from the beginning, first run rm -r runs/quickstart.'

.PHONY: test
test: setup ## run the tests (CPU, without the slow ones)
	@$(PYTEST) $(SPREAD) $(ARGS)

# ---------------------------------------------------------------- checks

.PHONY: test-all
test-all: setup ## run the tests, the slow ones included
	@$(PYTEST) $(SPREAD) -m 'not gpu' $(ARGS)

.PHONY: test-gpu
test-gpu: setup ## run the tests that need a CUDA device
	@$(python) -m pytest -m gpu $(ARGS)

.PHONY: check
check: setup ## formatting, lint, types and code shape
	@$(python) -m ruff format --check .
	@$(python) -m ruff check .
	@$(python) -m mypy
	@$(python) -m pytest -q tests/test_code_shape.py

.PHONY: format
format: setup ## format the code and fix what the linter can fix
	@$(python) -m ruff format .
	@$(python) -m ruff check --fix .

# ---------------------------------------------------------------- the rest

.PHONY: bench
bench: setup-run ## measure training speed on this machine
	@$(python) tools/bench/train_step.py

# Runs side by side in the two targets below, one core each
JOBS ?= 2

.PHONY: reproduce
reproduce: setup-run ## rerun the papers' claims in miniature and write docs/reproduction.md (two hours)
	@$(python) tools/reproduce.py --tier full --jobs $(JOBS)
	@$(python) tools/reproduce.py --tier long --jobs $(JOBS)

.PHONY: reproduce-quick
reproduce-quick: setup-run ## the same with fewer steps and arms, in runs/reproduce/quick (under 15 minutes)
	@$(python) tools/reproduce.py --tier quick --jobs $(JOBS)

.PHONY: cuda
cuda: ## compile the CUDA kernels for every architecture and print what each needs (needs nvcc)
	@$(python) csrc/cuda_build.py

.PHONY: gpu
gpu: setup ## on one GPU, in ten minutes: build the CUDA kernels, run the GPU tests, measure the kernels
	@$(python) tools/bench/gpu.py

.PHONY: docs
docs: setup-run ## write configs/neox_arguments.md from the configuration sections
	@$(python) -m megatron.config.reference

.PHONY: lock
lock: setup ## write requirements/constraints.txt from the packages in .venv
	@$(python) -m pip freeze --exclude-editable | sed -E 's/\+(cpu|cu[0-9]+)$$//' > requirements/constraints.txt

.PHONY: clean
clean: ## remove caches and build leftovers; runs, data and .venv stay
	@rm -rf .mypy_cache .pytest_cache .ruff_cache build dist *.egg-info
	@find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

.PHONY: clean-all
clean-all: clean ## also remove .venv
	@rm -rf .venv
