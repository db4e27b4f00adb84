# One virtual environment in the checkout, made once; every target runs in it.
#   make demo | test | test-slow | test-many | test-zoo | test-binaries | docs | support | lint | benchmark | gpu-bundle | wheel | clean
# ARGS="..." is handed on to the program. TORCH=2.15.0 runs it with another release of torch, in an environment of its own (some
# 5 GB: the registry's torch for CUDA).

PYTHON ?= python3
ARGS ?=
# Processes that share the tests of a suite; each computes with one thread. Neighbours share what is compiled, so a process
# takes a run of them and gives from its end to one that is done.
WORKERS ?= $(shell env -u OMP_NUM_THREADS nproc 2>/dev/null || echo 1)
# Threads that wait must not spin: where other programs share the cores, spinning costs more than the work (10 x, seen).
export OMP_WAIT_POLICY ?= PASSIVE

PINNED := $(shell sed -n 's/^torch==\([^ ;]*\).*/\1/p' constraints.txt)
TORCH ?= $(PINNED)
VENV := .venv$(if $(filter-out $(PINNED),$(TORCH)),-torch-$(TORCH))
RUN := $(VENV)/bin/python
SHARED = OMP_NUM_THREADS=1 $(RUN) -m pytest -n $(WORKERS) --dist worksteal
# Another pyproject.toml or constraints.txt is another stamp, so that a changed pin installs and nothing else does.
comma := ,
STAMP := $(VENV)/.installed-$(shell cat pyproject.toml constraints.txt | cksum | cut -d' ' -f1)
CONSTRAINTS := $(CURDIR)/$(if $(filter .venv,$(VENV)),constraints.txt,$(VENV)/constraints.txt)
PIP := PIP_CONSTRAINT=$(CONSTRAINTS) PIP_DISABLE_PIP_VERSION_CHECK=1 $(RUN) -m pip install --quiet
# With another release, torch decides about Triton and setuptools. Triton 3.6's interpreter fails with NumPy 2.4 and newer.
OTHERS := -e '/^triton==/d' -e '/^setuptools==/d' -e 's/^numpy==.*>=.*/numpy==2.3.5; python_version >= "3.11"/' \
	-e 's/^torch==.*/torch==$(TORCH)/'
# A copy of the package as users get it. mypy does not follow the finder of an editable installation.
TYPED := build/typed

.PHONY: environment demo test test-slow test-many test-zoo test-binaries docs support lint benchmark gpu-bundle wheel clean

environment: $(STAMP)

demo: $(STAMP)
	$(RUN) examples/demo.py $(ARGS)

test: $(STAMP)
	$(SHARED) $(ARGS)

test-slow: $(STAMP)
	$(SHARED) -m slow $(ARGS)

test-many: $(STAMP)
	$(SHARED) -m many tests/passes tests/zoo $(ARGS)

test-zoo: $(STAMP)
	$(SHARED) -m "zoo and not many" tests/zoo $(ARGS)

test-binaries: $(STAMP)
	$(RUN) -m pytest -m binaries tests/runtime $(ARGS)

docs: $(STAMP)
	cd tests && $(CURDIR)/$(RUN) -m support.errors_page

support: $(STAMP)
	$(RUN) -m pytest -m zoo -s -k "not compiled" tests/zoo --support-table docs/architectures.md $(ARGS)

lint: $(STAMP)
	$(RUN) -m ruff check .
	rm -rf build
	$(PIP) --no-deps --target $(TYPED) .
	cd $(TYPED) && $(CURDIR)/$(RUN) -m mypy --config-file $(CURDIR)/pyproject.toml --cache-dir $(CURDIR)/.mypy_cache -p attnres_fx

benchmark: $(STAMP)
	$(RUN) benchmarks/model.py $(ARGS)

# What a machine with a GPU, its own torch and no network needs: .gpu/README says how it is run there.
gpu-bundle:
	bash benchmarks/gpu_bundle.sh "$(PYTHON)" $(ARGS)

wheel: $(STAMP)
	rm -rf build dist
	PIP_CONSTRAINT=$(CURDIR)/constraints.txt $(RUN) -m build --wheel --outdir dist .

clean:
	rm -rf .venv .venv-torch-* .gpu build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

define CHECK
import os, shutil, sys, sysconfig
wrong = []
if sys.version_info < (3, 10):
    wrong.append(f"Python 3.10 or newer (this is {sys.version.split()[0]}; choose one with make PYTHON=...)")
if not os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h")):
    wrong.append("the headers of this Python (Debian: python3-dev)")
if not any(map(shutil.which, filter(None, [os.environ.get("CXX"), "g++", "clang++"]))):
    wrong.append("a C++ compiler (g++ or clang++; Inductor builds its CPU kernels with it)")
try:
    import ensurepip, venv
except ImportError:
    wrong.append("the venv module (Debian: python3-venv)")
if wrong:
    sys.exit("attnres-fx needs " + " and ".join(wrong))
endef
export CHECK

$(STAMP):
	@$(PYTHON) -c "$$CHECK"
	@echo "Making $(VENV) (once; torch $(TORCH))"
	$(PYTHON) -m venv $(VENV)
	$(if $(filter .venv,$(VENV)),,sed $(OTHERS) constraints.txt >$(CONSTRAINTS))
	$(PIP) "torch==$(TORCH)"
	$(PIP) --editable ".[$(if $(filter .venv,$(VENV)),test$(comma)lint,test)]"
	$(RUN) -c "import torch; assert torch.__version__.split('+')[0] == '$(TORCH)', torch.__version__"
	@rm -f $(VENV)/.installed-*
	@touch $@
