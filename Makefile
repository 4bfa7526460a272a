# Every target makes the environment that it needs, so a fresh clone needs Python and make only.
#
#   PYTHON=python3.12   the interpreter (3.11 or newer)
#   JAX=0.11            keep to this release of jax
#   ARGS='-k causal'    handed on to pytest, or to `burst-jax demo`
#   JOBS=2              test processes
#
# Another PYTHON or JAX gets an environment of its own beside .venv.

PYTHON ?= python3
JAX ?=
ARGS ?=
JOBS ?= 2
# compiled_programs.py wants the environment of `make setup-aot`.
BENCH ?= $(filter-out %compiled_programs.py,$(wildcard benchmarks/[!_]*.py))

ifeq ($(PYTHON)$(JAX),python3)
VENV := .venv
else
MINOR := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
VENV := .venv-py$(MINOR)$(if $(JAX),-jax$(JAX))
endif

# Extras of pyproject.toml. After `make test`, `make demo` finds all that it needs.
USER_EXTRAS := plots train
TEST_EXTRAS := plots test train

# What the fast suite leaves out: the markers of pyproject.toml.
FAST := not (slow or kernel or aot or tpu or gpu or peer)
SLOW := (slow or peer) and not (kernel or aot or tpu or gpu)
KERNEL := kernel and not (aot or tpu or gpu)

# Compile for chips that are not here: without these variables libtpu asks a cloud's metadata server
# for a TPU, and lets only one process of the machine load it, and jax looks for CUDA's libraries.
AOT_ENVIRONMENT := JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 TPU_WORKER_HOSTNAMES=localhost \
	ALLOW_MULTIPLE_LIBTPU_LOAD=1 JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-kernels test-aot lint format bench notebooks notebooks-check setup clean

# $(call setup,extras[,environment])
define setup
@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	echo 'burst_jax needs Python 3.11 or newer, but PYTHON=$(PYTHON) answers' \
	     "'$$($(PYTHON) -V 2>&1 | head -n 1)'. Name another one: make PYTHON=python3.12 $@"; exit 1; }
@$(PYTHON) .ci/environment.py --venv $(or $(2),$(VENV)) --extras $(1) $(if $(JAX),--jax $(JAX))
endef

# $(call pytest,selection[,environment]): pytest's own closing line, then the verdict.
define pytest
begin=$$(date +%s); \
$(or $(2),$(VENV))/bin/python -m pytest -n $(JOBS) -m '$(1)' $(ARGS); code=$$?; \
took="after $$(($$(date +%s) - begin)) s"; \
case $$code in \
	0) echo "make $@: PASSED $$took";; \
	5) echo "make $@: FAILED, no test was selected $$took";; \
	*) echo "make $@: FAILED $$took (pytest's exit status is $$code)";; \
esac; \
exit $$code
endef

help:  ## this list
	@echo 'make TARGET [PYTHON=python3.12] [JAX=0.11] [ARGS=...]'
	@sed -nE 's/^([a-z-]+):.*## (.*)$$/\1|\2/p' $(firstword $(MAKEFILE_LIST)) \
		| while IFS='|' read -r target text; do printf '  %-16s %s\n' "$$target" "$$text"; done

demo:  ## train on real text over 8 simulated devices, and compare with the other ways to do it
	$(call setup,$(USER_EXTRAS))
	@$(VENV)/bin/burst-jax demo $(ARGS)

test:  ## the fast tests
	$(call setup,$(TEST_EXTRAS))
	@$(call pytest,$(FAST))

test-slow:  ## the slow tests, planted bugs and peers among them
	$(call setup,$(TEST_EXTRAS) bench)
	@$(call pytest,$(SLOW))

test-kernels:  ## the kernels of TPUs and GPUs, interpreted on CPU (Hopper's: with JAX=0.12 and its Python)
	$(call setup,$(TEST_EXTRAS) triton)
	@$(call pytest,$(KERNEL))

test-aot:  ## compile for TPUs and GPUs that are not here
	$(call setup,$(TEST_EXTRAS) aot aot-gpu triton,$(VENV)-aot)
	@export $(AOT_ENVIRONMENT); $(call pytest,aot,$(VENV)-aot)

lint:  ## format, lint and types
	$(call setup,$(TEST_EXTRAS) lint)
	@code=0; set -x; \
	$(VENV)/bin/ruff format --check . || code=1; \
	$(VENV)/bin/ruff check . || code=1; \
	$(VENV)/bin/pyright --pythonpath $(VENV)/bin/python || code=1; \
	{ set +x; } 2>/dev/null; \
	[ $$code -eq 0 ] && echo "make $@: PASSED" || { echo "make $@: FAILED"; exit 1; }

format:  ## rewrite the sources as `make lint` wants them
	$(call setup,$(TEST_EXTRAS) lint)
	$(VENV)/bin/ruff check --fix-only .
	$(VENV)/bin/ruff format .

bench:  ## the benchmarks, one after another; BENCH=benchmarks/import_time.py for one of them
	$(call setup,$(USER_EXTRAS) bench)
	@for script in $(BENCH); do \
		echo "== $$script"; $(VENV)/bin/python $$script $(ARGS) || exit 1; done

notebooks:  ## execute the notebooks and render them to .ipynb
	$(call setup,$(USER_EXTRAS) notebooks)
	@$(VENV)/bin/python .ci/notebooks.py

notebooks-check:  ## execute the notebooks, and see that each .ipynb belongs to its .py; writes nothing
	$(call setup,$(USER_EXTRAS) notebooks)
	@$(VENV)/bin/python .ci/notebooks.py --check

setup:  ## only make the environment that `make test` uses
	$(call setup,$(TEST_EXTRAS))

setup-aot:
	$(call setup,$(TEST_EXTRAS) aot aot-gpu triton,$(VENV)-aot)

clean:  ## remove the environments and what the tools left
	rm -rf .venv .venv-* build dist .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
