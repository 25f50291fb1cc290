# Every target first sets up what it needs: a virtual environment (.venv), the packages of the `dev`
# group, NVIDIA's compiler from PyPI if no nvcc is found, and the compiled extensions. A second run
# rebuilds nothing.

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
BUILT := build/.built
SOURCES := setup.py pyproject.toml $(shell find csrc ptx -type f -not -name '*.pyc' -not -name '*.md')
# Every build in the tree has the same options: with others, the test of the wheel would compile all
# kernels anew.
export TORCHEXT_WERROR := 1
# Python keeps what it compiles, tests included: each worker of pytest would compile them anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: all demo check test test-cpu test-cpu-levels test-sim asan tsan cross-check lint format bench bench-cpu instruction-counts validate-timing predict soak wheel gpu-check sass-report docs docs-serve clean
all: $(BUILT)

$(VENV)/.ready: pyproject.toml Makefile csrc/build/setup_venv.sh csrc/build/toolchain.py
	PYTHON="$(PYTHON)" TORCH="$(TORCH)" bash csrc/build/setup_venv.sh $(VENV)
	touch $@

$(BUILT): $(VENV)/.ready $(SOURCES)
	$(BIN)/python setup.py -q build_ext --inplace
	touch $@

demo: $(BUILT)
	$(BIN)/python -m torchext.demo

# Two tiers. `make check` runs lint, types and the tests that are neither `slow` nor `alone` (under 3
# minutes on 2 cores of Zen 4, after the build). `make test` runs everything: CI took 38 minutes on 2
# such cores on 26 November 2026, including the build. A Zen 3 takes almost twice as long.
WORKERS ?= $(shell nproc)
PYTEST := $(BIN)/python -m pytest --durations=15 --durations-min=1
# One pytest worker for each core, and one torch thread in each worker.
PARALLEL_PYTEST := OMP_NUM_THREADS=1 $(PYTEST) -n $(WORKERS) --dist worksteal

check: $(BUILT) lint
	$(PARALLEL_PYTEST) -m "not slow and not alone" $(PYTEST_ARGS)

test: $(BUILT)
	$(MAKE) -j $(WORKERS) --output-sync=target static-checks
	$(MAKE) test-cpu test-sim asan

# Checks that run on one core each.
.PHONY: static-checks check-sass check-counts
static-checks: lint tsan check-sass check-counts docs

check-sass: $(BUILT)
	$(BIN)/python tools/sass_report.py --check

check-counts: $(BUILT)
	$(BIN)/python tools/instruction_counts.py --check

test-cpu: $(BUILT) test-cpu-levels
	$(PARALLEL_PYTEST) -m "not alone" $(PYTEST_ARGS)
	$(PYTEST) -m alone $(or $(PYTEST_ARGS),$(shell grep -rl --include='*.py' 'mark.alone' tests))

OP_TESTS := tests/activation tests/gemm tests/moe tests/norm tests/quantize

# Runs the tests of ops at each lower level of the CPU kernels that this machine has, but for those
# that run no CPU kernels or only start processes. Each level has a worker, which runs all tests; a
# single level has as many workers as there are cores.
test-cpu-levels: $(BUILT)
	@levels=$$($(BIN)/python tools/cpu_levels.py) || exit; set -- $$levels; \
	case $$# in \
	  0) exit ;; \
	  1) workers="--dist worksteal --tx $(WORKERS)*popen//env:TORCHEXT_CPU=$$1" ;; \
	  *) workers="--dist each $$(printf -- '--tx popen//env:TORCHEXT_CPU=%s ' $$levels)" ;; \
	esac; \
	echo "TORCHEXT_CPU of the workers gw0, gw1, ...:" $$levels; \
	OMP_NUM_THREADS=1 $(PYTEST) $$workers -m "not slow and not alone" \
	  $(OP_TESTS) tests/test_catalog.py::test_kernels_equal_the_reference \
	  --ignore=tests/gemm/test_selection.py --ignore=tests/quantize/test_cuda_numbers.py \
	  --ignore=tests/gemm/test_weights_only_sharding.py

# Runs the tests of ops and layers on the PTX of the CUDA kernels: all tests on Hopper's PTX, and those
# marked `every_architecture` also on that of the other generations.
test-sim: $(BUILT)
	@if ls torchext/_ptx/*/*.ptx.gz >/dev/null 2>&1; then \
	  $(PARALLEL_PYTEST) --device sim --sim-arch every $(OP_TESTS) tests/nn tests/compat \
	    tests/test_catalog.py tests/test_ops.py; \
	else echo 'no nvcc, so no CUDA kernels to simulate'; fi

# asan: tests of the CPU kernels and of the simulator under ASan and UBSan. tsan: tests of what the
# simulator's host threads share, under TSan. ARGS, if given, goes to pytest in place of them:
# make asan ARGS="-x tests/sim/test_parser.py"
asan: $(VENV)/.ready
	$(BIN)/python tools/sanitize.py address $(ARGS)

tsan: $(BUILT)
	$(BIN)/python tools/sanitize.py thread $(ARGS)

# The CPU kernels for aarch64, under qemu-user (Debian: g++-aarch64-linux-gnu qemu-user), and on this
# machine under ASan and UBSan.
cross-check: $(VENV)/.ready
	$(BIN)/python tools/cross_check.py aarch64
	$(BIN)/python tools/cross_check.py asan

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	git ls-files '*.h' '*.cpp' '*.cu' '*.cuh' | xargs $(BIN)/clang-format --dry-run --Werror

format: $(VENV)/.ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	git ls-files '*.h' '*.cpp' '*.cu' '*.cuh' | xargs $(BIN)/clang-format -i

# Pass arguments by ARGS: make bench ARGS="--suite gemm --quick"
bench: $(BUILT)
	$(BIN)/python -m benchmarks $(ARGS)

# Measures what the CPU's goals need, in about 12 minutes, and writes the documents' figures.
bench-cpu: $(BUILT)
	$(BIN)/python -m benchmarks --device cpu --budget 690 --documents $(ARGS)

# Pass arguments by ARGS: make soak ARGS="--minutes 30 --seed 7"
soak: $(BUILT)
	$(BIN)/python -m tests.hardware.soak $(ARGS)

# Compares predicted times of GEMMs with published measurements, and writes the tables of
# docs/timing_validation.md. Needs no GPU.
validate-timing: $(BUILT)
	$(BIN)/python -m benchmarks.validate_timing --write $(ARGS)

# Predicts times of our kernels and of DeepGEMM's, and writes docs/predicted.md. Needs no GPU. Pass
# arguments by ARGS: make predict ARGS="--budget 600"
predict: $(BUILT)
	$(BIN)/python -m benchmarks.predict --write $(ARGS)

# Writes tools/instruction_counts.json, the instructions that CPU kernels execute. Needs valgrind.
instruction-counts: $(BUILT)
	$(BIN)/python tools/instruction_counts.py --update

# Writes docs/sass_report.md, the facts about every kernel's machine code. Needs no GPU.
sass-report: $(BUILT)
	$(BIN)/python tools/sass_report.py

# The documents as a site, in build/site. A link, an anchor or a docstring that is wrong fails the build.
docs: $(VENV)/.ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

docs-serve: $(VENV)/.ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs serve --no-strict

# A manylinux_2_28 wheel in dist/. WHEEL_PYTHONS: interpreters to build the simulator for; by default
# those on PATH.
wheel: $(BUILT)
	$(BIN)/python tools/build_wheel.py $(if $(WHEEL_PYTHONS),--python $(WHEEL_PYTHONS))

# For a machine with a GPU and its own torch. WHEEL=dist/torchext_fp8-...whl comes from `make wheel`.
gpu-check:
	@test -n "$(WHEEL)" || { echo 'usage: make gpu-check WHEEL=dist/torchext_fp8-...whl'; exit 2; }
	$(PYTHON) -m tests.hardware.gpu_check --wheel $(WHEEL) $(ARGS)

clean:
	rm -rf build dist demo torchext/*.so torchext/_ptx torchext/include
