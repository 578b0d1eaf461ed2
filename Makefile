# One command each; all but `clean` and `gpu-check` first set up .venv (scripts/setup.sh), which costs seconds when it is up to date.
.PHONY: help setup demo test fuzz compatibility lint format bench gpu-check clean

help:
	@echo "make demo    quantize a real sentence model, compare it with the dense one, convert, verify, inspect"
	@echo "make test    the whole test suite"
	@echo "make fuzz    the readers under a coverage-guided fuzzer (a minute each of four targets; FUZZ_ARGS=--seconds=600)"
	@echo "make compatibility  build and test with every torch and compiler of noxfile.py (an hour, 40 GB)"
	@echo "make lint    ruff, mypy and clang-format, as CI runs them"
	@echo "make format  let ruff and clang-format rewrite the sources"
	@echo "make bench   the benchmarks, into docs/benchmarks (fifteen minutes of a machine that does nothing else)"
	@echo "make gpu-check  build for the GPU at hand, test and measure there (five minutes; nothing is fetched; PYTHON=...)"
	@echo "make setup   only .venv and the build          PYTHON=... chooses the interpreter"
	@echo "make clean   remove what was built (not .venv)"

setup:
	@scripts/setup.sh

demo: setup
	@.venv/bin/squish-nf4 demo --output demo-output

test: setup
	@.venv/bin/python -m pytest -n 2 $(PYTEST_ARGS)

fuzz: setup
	@scripts/fuzz.sh $(FUZZ_ARGS)

compatibility: setup
	.venv/bin/nox $(NOX_ARGS)

lint: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/clang-format --dry-run --Werror $$(git ls-files -co --exclude-standard '*.h' '*.cpp' '*.cu' '*.c')

format: setup
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .
	.venv/bin/clang-format -i $$(git ls-files -co --exclude-standard '*.h' '*.cpp' '*.cu' '*.c')

bench: setup
	@scripts/peers.sh
	.venv/bin/python -m benchmarks --output docs/benchmarks $(BENCH_ARGS)

# Without .venv and its set-up: such a machine has its own torch, and often no network.
gpu-check:
	@$${PYTHON:-python3} scripts/gpu_check.py $(GPU_CHECK_ARGS)

clean:
	rm -rf build demo-output squish_nf4/*.so squish_nf4/_build_info.py
