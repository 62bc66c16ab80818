# Each target sets up what it needs: `make study` and `make test` work as the first command in a fresh clone.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Kernels, tests and studies run one process a core; more threads than cores only get in each other's way.
WORKERS ?= $(shell getconf _NPROCESSORS_ONLN)
CXX_FILES := $(wildcard src/batchnorm/csrc/*/*.h src/batchnorm/csrc/*/*.cpp tests/csrc/*.cpp benchmarks/*.cpp)

.PHONY: sanitize setup study figure test test-all fuzz lint format clean

setup: $(READY)

$(READY): pyproject.toml setup.py constraints.txt $(wildcard src/batchnorm/csrc/* src/batchnorm/csrc/*/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --upgrade pip setuptools wheel
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch numpy ninja
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-build-isolation --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-deps lightning mmengine mmcv-lite timm
	touch $@

study: $(READY)
	$(BIN)/batchnorm study --out study --resume

test: $(READY)
	$(BIN)/python -m pytest -n $(WORKERS) -m 'not slow'

test-all: $(READY)
	$(BIN)/python -m pytest -n $(WORKERS)

# Random programs against each tool for SECONDS in all; TARGETS is a comma-separated list.
SECONDS ?= 600
TARGETS ?=
fuzz: $(READY)
	$(BIN)/python -m tests.fuzz --seconds $(SECONDS) --targets '$(TARGETS)' --kinds

# The README's figure and claims from the last `make study`; needs Chromium.
figure: $(READY)
	$(BIN)/python benchmarks/readme_figure.py study docs/images/study.png
	$(BIN)/python benchmarks/readme_claims.py study README.md

# The CPU kernels under ASan + UBSan and under TSan, without torch.
sanitize:
	scripts/sanitize.sh

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell --builtin en-GB_to_en-US --dictionary - --dictionary scripts/words.txt $$(git ls-files '*.py' '*.md' '*.cpp' '*.h' '*.toml' '*.sh')
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/clang-format -i $(CXX_FILES)

clean:
	rm -rf $(VENV) build src/*.egg-info src/batchnorm/*.so
