# Every target sets up what it needs: a virtual environment (.venv), the packages of the `dev` group,
# NVIDIA's compiler from PyPI where no nvcc is found, and the compiled extension. A second run
# rebuilds nothing.

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
BUILT := build/.built
SOURCES := setup.py pyproject.toml $(shell find csrc ptx -type f -not -name '*.pyc' -not -name '*.md')

.PHONY: all demo test lint format bench soak wheel gpu-check sass-report clean
all: $(BUILT)

$(VENV)/.ready: pyproject.toml Makefile csrc/build/setup_venv.sh csrc/build/toolchain.py
	PYTHON="$(PYTHON)" TORCH="$(TORCH)" bash csrc/build/setup_venv.sh $(VENV)
	touch $@

$(BUILT): $(VENV)/.ready $(SOURCES)
	$(BIN)/python setup.py -q build_ext --inplace
	touch $@

demo: $(BUILT)
	$(BIN)/python -m torchext.demo

# Everything on the CPU kernels, then the tests of ops and layers on the CUDA kernels' PTX: all of
# them on Hopper's, those of products and a few others on the PTX of other generations.
OTHER_ARCHITECTURES := 89 80 75
ARCHITECTURE_TESTS := $(addprefix tests/gemm/test_fp8_gemm.py::, test_shapes test_out \
	test_every_code_is_decoded_exactly test_nan_in_the_data_alone) \
	$(addprefix tests/gemm/test_grouped.py::, test_group_ids test_along_k) \
	tests/gemm/test_fused.py::test_shapes \
	tests/quantize/test_quantize.py::test_matrices tests/quantize/test_dequantize.py::test_granularities
test: $(BUILT) lint
	$(BIN)/python -m pytest $(PYTEST_ARGS)
	@if ls torchext/_ptx/*/*.ptx >/dev/null 2>&1; then \
	  $(BIN)/python -m pytest --device sim tests/gemm tests/quantize tests/nn tests/compat \
	    tests/test_ops.py && \
	  for arch in $(OTHER_ARCHITECTURES); do \
	    $(BIN)/python -m pytest --device sim --sim-arch $$arch --sim-sms 3 $(ARCHITECTURE_TESTS) || exit; \
	  done; \
	else echo 'no nvcc, so no CUDA kernels to simulate'; fi
	$(BIN)/python tools/sass_report.py --check

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	git ls-files '*.h' '*.cpp' '*.cu' '*.cuh' | xargs $(BIN)/clang-format --dry-run --Werror

format: $(VENV)/.ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	git ls-files '*.h' '*.cpp' '*.cu' '*.cuh' | xargs $(BIN)/clang-format -i

# Arguments: make bench ARGS="--suite gemm --quick"
bench: $(BUILT)
	$(BIN)/python -m benchmarks $(ARGS)

# Arguments: make soak ARGS="--minutes 30 --seed 7"
soak: $(BUILT)
	$(BIN)/python -m tests.hardware.soak $(ARGS)

# What the compiler made of every kernel: writes docs/sass_report.md. Needs no GPU.
sass-report: $(BUILT)
	$(BIN)/python tools/sass_report.py

wheel: $(VENV)/.ready
	$(BIN)/python -m pip wheel -q --no-build-isolation --no-deps -w dist .
	ls -l dist/*.whl

# On a machine with a GPU and its own torch; WHEEL=dist/torchext-...whl from `make wheel`.
gpu-check:
	@test -n "$(WHEEL)" || { echo 'usage: make gpu-check WHEEL=dist/torchext-...whl'; exit 2; }
	$(PYTHON) -m tests.hardware.gpu_check --wheel $(WHEEL) $(ARGS)

clean:
	rm -rf build dist demo torchext/*.so torchext/_ptx torchext/include
