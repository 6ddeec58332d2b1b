# `make demo` and `make test` do all their set-up in .venv; nothing outside the checkout is changed.
#
# TORCH_INDEX=<address of your PyTorch CPU index>  takes torch from there. Without it the CPU wheel is tried first
# where pip already knows one, and the ordinary wheel (gigabytes on Linux x86) only if there is none.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH := torch==2.13.0
OUT ?= demo-bundle

export HF_HUB_OFFLINE ?= 1

.PHONY: demo test fuzz table readme schemas lint format native wheels gpu-check clean

demo: $(VENV)/.ready
	$(BIN)/python -m engines.native.compile_cpu
	$(BIN)/btp-export --model demo --out $(OUT) --force
	@echo
	@echo "report: $(OUT)/report/index.html"

# A process of tests a core, four at most: each takes 2 GB of memory.
# Tests start many interpreters, which need not compile the same sources each.
test: export PYTHONDONTWRITEBYTECODE :=
test: $(VENV)/.ready-dev
	$(BIN)/python -m engines.native.compile_cpu
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --durations=25

# Damaged and hostile files and options, new ones each time, for about an hour; `make test` tries the same few.
fuzz: $(VENV)/.ready-dev
	BTP_FUZZ=hour $(BIN)/python -m pytest tests/fuzz --timeout=0

# The accuracy tables of docs/results.md, measured again (about ten minutes on two idle cores).
table: $(VENV)/.ready-dev
	$(BIN)/python -m engines.native.compile_cpu
	$(BIN)/python -m benchmarks.table

# The outputs and the picture in the README, from running its commands again (about two minutes on two idle cores).
readme: $(VENV)/.ready
	$(BIN)/python -m benchmarks.readme

# docs/schemas/, JSON schemas of what the commands print, and the signatures in docs/api.md: both from the code.
schemas: $(VENV)/.ready-dev
	$(BIN)/python -m btp_export.results.schemas
	$(BIN)/python -m btp_export.api_reference

lint: $(VENV)/.ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy tests/btp_export/user_script.py

format: $(VENV)/.ready-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Optional: the native operators (docs/native.md), as far as the compilers and headers at hand allow.
NATIVE_OPTIONS ?=
native:
	cmake -S engines/native -B engines/native/build $(NATIVE_OPTIONS)
	cmake --build engines/native/build

# dist/: wheels for x86_64 and aarch64 that carry the CPU operators; this machine's is tried in a bare environment.
wheels: $(VENV)/.ready
	$(BIN)/python -m pip install --quiet -e '.[wheels]'
	$(BIN)/python -m engines.native.wheels --out dist

# On a machine with an NVIDIA GPU and nvcc: verifies the kernels, then times them, by themselves, in torch and in ONNX
# Runtime (docs/gpu-check.md, which also has the two prepared calls for a machine that has nothing of ours).
# TARGET=h200 (or another target of `btp-export build`): then the engines of the demo model too, which needs TensorRT.
gpu-check:
	$(PYTHON) -m benchmarks.gpu_check
ifdef TARGET
	$(PYTHON) -m benchmarks.gpu_engines --target $(TARGET)
endif

clean:
	rm -rf $(VENV) build *.egg-info

$(VENV)/.ready: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or later is needed: make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c 'import torch' 2>/dev/null || $(MAKE) --no-print-directory torch
	$(BIN)/python -m pip install --quiet -e '.[export]'
	touch $@

$(VENV)/.ready-dev: $(VENV)/.ready
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	touch $@

.PHONY: torch
torch:
ifdef TORCH_INDEX
	$(BIN)/python -m pip install --quiet --index-url $(TORCH_INDEX) $(TORCH)
else
	$(BIN)/python -m pip install --quiet $(TORCH)+cpu || $(BIN)/python -m pip install --quiet $(TORCH)
endif
