# Two commands are all it takes: `make demo` and `make test`. Both make the environment they need.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# two workers, one thread each: the tests are many small ones
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

.PHONY: help demo demo-recipe test test-slow gates lint clean bench sanitize
help:
	@echo "make demo       distil a small student on images and show the result (minutes, CPU)"
	@echo "make demo-recipe  the same world through fastalign distill: three stages from a YAML recipe"
	@echo "make test       the test suite"
	@echo "make test-slow  the tests that take longer"
	@echo "make gates      what the compiled Triton kernels must hold, on every target (long, no GPU)"
	@echo "make lint       ruff and mypy"
	@echo "make bench      speed and memory beside eager and torch.compile"
	@echo "make sanitize   the C++ kernels under AddressSanitizer, UBSan and ThreadSanitizer"

$(VENV)/.ready: requirements.txt pyproject.toml setup.py
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'fastalign needs Python 3.11 or newer, this is ' + sys.version)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -r requirements.txt
	$(BIN)/python -m pip install --quiet --no-build-isolation --no-deps -e .
	touch $@

demo: $(VENV)/.ready
	$(BIN)/python -m examples.shapes.demo

demo-recipe: $(VENV)/.ready
	$(BIN)/python -m examples.recipes.shapes_data --out out/shapes
	$(BIN)/fastalign distill examples/recipes/shapes.yaml --resume
	$(BIN)/python -m examples.recipes.shapes_scores out/shapes/run

test: $(VENV)/.ready
	$(PYTEST) -m "not slow and not gpu" tests

test-slow: $(VENV)/.ready
	$(PYTEST) -m "slow and not gpu" tests

gates: $(VENV)/.ready
	$(BIN)/python -m benchmarks.static_report --dtypes bf16 fp16 tf32 fp32 --variants $(GATES)

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.ready
	$(BIN)/python -m pytest --benchmark-only --benchmark-time-unit=us --benchmark-columns=median,iqr,min,rounds \
	  benchmarks/test_micro.py
	$(BIN)/fastalign bench

sanitize:
	$(MAKE) -C csrc sanitize

clean:
	rm -rf $(VENV) build dist out *.egg-info
