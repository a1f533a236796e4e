# Everything runs in .venv/, made here. `make demo` and `make test` do their own set-up.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: setup test browser lint format docs wheel bench demo g2vlm-demo clean

setup: $(STAMP)

# One pip command with the pins as constraints: a second one could install another torch. DS_BUILD_OPS=0: DeepSpeed
# compiles no operators.
$(STAMP): setup.py pyproject.toml constraints.txt $(wildcard csrc/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e '.[dev]'
	touch $@

# Two test files at a time, one thread each. In the order of their names: otherwise files of few, long tests come last,
# one of them alone. The timed tests (marker `alone`) run afterwards, by themselves.
test: setup lint browser
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not alone"
	$(BIN)/python -m pytest -m alone

# A Chromium for the tests that open a page in it (tests/*/test_*_in_browser.py); they are skipped without.
CHROMIUM := PYTHONPATH=tests $(BIN)/python -m support.browser
browser: setup
	@$(CHROMIUM) || test "$$(id -u)" != 0 || (apt-get -qq update && apt-get -qq install -y --no-install-recommends chromium-headless-shell) >/dev/null 2>&1 || true
	@$(CHROMIUM) || echo "no Chromium: tests/*/test_*_in_browser.py will be skipped; install chromium-headless-shell, chromium or google-chrome"

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	rm -rf build/imports && mkdir -p build/imports && cp -rL gasp_fast build/imports && touch build/imports/gasp_fast/kernels/__init__.py
	cd build/imports && PYTHONPATH=. $(CURDIR)/$(BIN)/lint-imports --no-cache --config $(CURDIR)/pyproject.toml

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# tests/docs/test_site.py builds it, too. The variable hides a notice about the next major version of mkdocs.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# For this Python; .github/workflows/wheels.yml builds those of a release.
wheel: setup
	rm -rf dist && $(BIN)/python -m build --no-isolation

bench: setup
	$(BIN)/gasp-fast bench

demo: setup
	$(BIN)/python examples/demo.py --out demo

# Stopped, it continues when called again.
g2vlm-demo: setup
	$(BIN)/python examples/g2vlm_demo.py --out g2vlm-demo

clean:
	rm -rf build dist *.egg-info gasp_fast/*.so .pytest_cache .mypy_cache .ruff_cache
