# One command each. All but `clean` and `gpu-check` first set up .venv (scripts/setup.sh): seconds when it is up to date.
.PHONY: help setup demo test test-sanitized test-fast fuzz compatibility lint format bench gpu-check clean

help:
	@echo "make demo    quantize a real sentence model, compare it with the dense one, convert, verify, inspect"
	@echo "make test    the whole test suite             AREA=\"nn checkpoint\" runs these folders of tests alone"
	@echo "make test-sanitized  the operators under the address and undefined-behaviour sanitizers: two minutes"
	@echo "make test-fast  what neither builds nor sweeps: two minutes (what is left out: Makefile)"
	@echo "make fuzz    the readers under a coverage-guided fuzzer (a minute each of four targets; FUZZ_ARGS=--seconds=600)"
	@echo "make compatibility  build and test with every torch and compiler of noxfile.py (an hour, 40 GB)"
	@echo "make lint    ruff, mypy and clang-format, as CI runs them"
	@echo "make format  let ruff and clang-format rewrite the sources, and write docs/api.md from the docstrings"
	@echo "make bench   the benchmarks, into docs/benchmarks (fifteen minutes of a machine that does nothing else)"
	@echo "make gpu-check  build for the GPU at hand, test and measure there (two to five minutes; nothing is fetched; PYTHON=...)"
	@echo "make setup   only .venv and the build          PYTHON=... chooses the interpreter"
	@echo "make clean   remove what was built (not .venv)"

setup:
	@scripts/setup.sh

demo: setup
	@.venv/bin/squish-nf4 demo --output demo-output

# The folders of tests that AREA may name. A file runs in one process, so that what its tests share is built once.
areas = $(filter-out support fuzzing,$(patsubst tests/%/__init__.py,%,$(wildcard tests/*/__init__.py)))
ifneq (,$(filter-out $(areas),$(AREA)))
$(error tests has no folder $(filter-out $(areas),$(AREA)); AREA is one or more of: $(areas))
endif
# Two processes with two threads each: on two cores, a thread that waits must not spin.
pytest = OMP_WAIT_POLICY=passive .venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(addprefix tests/,$(AREA))

test: setup
	@$(pytest) -m "not sanitized" $(PYTEST_ARGS)

test-sanitized: setup
	@.venv/bin/python -m pytest -m sanitized tests/operators $(PYTEST_ARGS)

# It leaves out one test in nine, five sixths of the time: kernels compiled apart (sanitizers, other processors, CUDA, every
# float), programs in C and C++, CMake, wheel and sdist, compiled and ONNX models, the
# benchmarks' suites, the demo, what is tried in a fresh Python (exports, imports, setup.py), and the longest runs over
# memory caps, kills and large files. So nothing tests here that it builds elsewhere than where it was built: run a folder
# in full before you commit, and .ci/run before it lands.
test-fast: setup
	@$(pytest) -m "not sanitized and not builds and not compiles and not sweeps" $(PYTEST_ARGS)

fuzz: setup
	@scripts/fuzz.sh $(FUZZ_ARGS)

compatibility: setup
	.venv/bin/nox $(NOX_ARGS)

lint: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/clang-format --dry-run --Werror $$(git ls-files -co --exclude-standard '*.h' '*.cpp' '*.cu' '*.cuh' '*.c')

format: setup
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .
	.venv/bin/python scripts/api_page.py
	.venv/bin/clang-format -i $$(git ls-files -co --exclude-standard '*.h' '*.cpp' '*.cu' '*.cuh' '*.c')

bench: setup
	@scripts/peers.sh
	.venv/bin/python -m benchmarks --output docs/benchmarks $(BENCH_ARGS)

# Without .venv and its set-up: such a machine has its own torch, and often no network.
gpu-check:
	@$${PYTHON:-python3} scripts/gpu_check.py $(GPU_CHECK_ARGS)

clean:
	rm -rf build demo-output squish_nf4/*.so squish_nf4/_build_info.py
