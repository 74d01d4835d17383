# One word for everything that a developer does. Needs Python 3.11 or newer, make and a C compiler.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
CLIENTS := .clients
TORCH := $(shell sed -n 's/^\(torch==.*\)/\1/p' constraints.txt)
PACKAGES := $(shell sed -n 's/^ *"\(pdserve\.[a-z_]*\)",$$/-p \1/p' pyproject.toml)
PYTEST := $(BIN)/python -P -m pytest
CORES := $(shell nproc 2>/dev/null || echo 2)
BESIDE := tests/engine tests/kernels tests/unit
PORT ?= 8000
ARGS ?=

.PHONY: help install clients serve demo test test-slow check format demo-model bench bench-split clean distclean

help:
	@echo "make install     make $(VENV) with everything in it (the other targets do this first)"
	@echo "make serve       serve the demo model on port $(PORT) until Ctrl-C; ARGS='--model ...' for more"
	@echo "make demo        start a cluster, ask it a few questions, print where the time went, stop"
	@echo "make test        the tests;  make test-slow: those that take longer, too"
	@echo "make clients     make $(CLIENTS): LangChain, LiteLLM and the Agents SDK for the slow tests"
	@echo "make check       ruff, mypy, and who may import whom;  make format: ruff's fixes"
	@echo "make bench       disaggregated against colocated: who wins, and why (reports in build/bench)"
	@echo "make bench-split where a prefill and a decode worker win and where they lose, and predictions"
	@echo "make demo-model  train the demo model again (under 30 minutes on 2 cores)"
	@echo "make clean       remove caches and build outputs;  make distclean: the environments, too"

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "pdserve needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1)." \
	    "Give another one: make PYTHON=/path/to/python3"; exit 1; }
	@test -x $(BIN)/python || { echo "==> making the environment $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "==> installing $(TORCH) (the largest part)"
	@$(BIN)/python -m pip install -q -c constraints.txt setuptools "$(TORCH)"
	@echo "==> installing pdserve and what it needs (versions: constraints.txt)"
	@$(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation -e '.[dev]'
	@echo "==> compiling the CPU kernels"
	@$(BIN)/python -P -c 'from pdserve.kernels.native import library; library()'
	@touch $(STAMP)
	@echo "==> installed: $(BIN)/pdserve"

clients: $(CLIENTS)/.installed

$(CLIENTS)/.installed: tests/clients/requirements.txt
	@echo "==> making the environment $(CLIENTS)"
	@$(PYTHON) -m venv $(CLIENTS)
	@$(CLIENTS)/bin/python -m pip install -q -r tests/clients/requirements.txt
	@touch $@

serve: install
	@echo "==> starting a cluster; Ctrl-C stops it"
	@exec $(BIN)/pdserve up --port $(PORT) $(ARGS)

demo: install
	@echo "==> starting a cluster and asking it a few questions"
	@exec $(BIN)/pdserve demo $(ARGS)

# Tests that compute run beside each other; those of processes, sockets and deadlines one by one.
define pytest
	@OMP_NUM_THREADS=1 $(PYTEST) -m $(1) $(if $(strip $(ARGS)),$(ARGS),-n $(CORES) --dist worksteal $(BESIDE))
	$(if $(strip $(ARGS)),,@OMP_NUM_THREADS=1 $(PYTEST) -m $(1) $(addprefix --ignore=,$(BESIDE)))
endef

test: install
	@echo "==> running the tests (not the slow ones)"
	$(call pytest,"not slow and not gpu")

test-slow: install clients
	@echo "==> running all tests"
	$(call pytest,"not gpu")

check: install
	@echo "==> ruff"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@echo "==> mypy"
	@$(BIN)/mypy $(PACKAGES)
	@echo "==> who imports whom"
	@$(PYTEST) -q tests/unit/test_imports.py

format: install
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

demo-model: install
	@echo "==> training the demo model"
	@$(BIN)/python -P -m pdserve.demo.train

bench: install build/mid
	@echo "==> comparing topologies: the demo model, then a random one of 32 million parameters"
	@$(BIN)/pdserve bench compare --input-len 96 --output-len 48 --requests 60 --max-model-len 1024 \
	  --more-rungs 1 --out build/bench/demo $(ARGS)
	@$(BIN)/pdserve bench compare --model build/mid --vocab 10:10000 --requests 60 \
	  --max-model-len 1024 --more-rungs 1 --out build/bench/mid $(ARGS)

# 1P+1D wins where prompts are long and answers must not stutter, and loses where answers are long and may
# come at a quarter of the pace that a request alone has. Rates come from probes, targets of the first, too:
# 5 times the first token and twice the gap of a request that is alone. Profiles before and after, since the
# machine's own speed changes.
SPLIT := $(BIN)/pdserve bench compare --model build/mid --vocab 10:10000 --kv-total 4096 --rounds 2
PROFILE := build/bench/profile
define profile
	@echo "==> how long things take here, for the predictions ($(1) of 3)"
	@$(BIN)/pdserve bench profile --model build/mid --vocab 10000 --kv-total 4096 --out $(PROFILE)-$(1).json
endef

bench-split: install build/mid
	$(call profile,1)
	@echo "==> a workload on which a prefill and a decode worker win"
	@$(SPLIT) --requests 60 --rungs 4 --lowest 0.2 --highest 0.9 --input-len 768 --output-len 16 \
	  --out build/bench/split-wins $(ARGS)
	$(call profile,2)
	@echo "==> and one on which they lose"
	@$(SPLIT) --requests 150 --rungs 4 --lowest 0.5 --highest 1.6 --input-len 64 --output-len 128 \
	  --slo-ttft-ms 500 --slo-itl-ms 10 --out build/bench/split-loses $(ARGS)
	$(call profile,3)
	@$(BIN)/pdserve simulate --profile $(PROFILE)-1.json $(PROFILE)-2.json \
	  --against build/bench/split-wins --out build/bench/split-wins-predicted
	@$(BIN)/pdserve simulate --profile $(PROFILE)-2.json $(PROFILE)-3.json \
	  --against build/bench/split-loses --out build/bench/split-loses-predicted

build/mid:
	@echo "==> making a random model (mid)"
	@$(BIN)/python -P tests/support/checkpoints.py $@ --arch llama --shape mid --dtype bfloat16

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -not -path './$(CLIENTS)/*' -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV) $(CLIENTS)
