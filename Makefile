# `make demo` and `make test` do all of their own set-up on a machine with Python 3.11 or newer.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
export HF_HUB_OFFLINE ?= 1
# Where it is set, every process of the tests compiles the package again, and each worker rewrites all assertions.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-fast test-faults lint style bench docs linkcheck install clean

# mypy runs from elsewhere: beside the sources it would find diffusion_align/ without the mapped folders.
MYPY  := bin/mypy --config-file ../pyproject.toml --cache-dir .mypy_cache
TYPES := cd $(VENV) && $(MYPY) && $(MYPY) ../integrations/comfyui

# The stamp makes a second `make` start at once; it is remade when the dependencies or the tree of files change.
SOURCES := $(shell find diffusion_align rewards training -type f -not -name '*.pyc' 2>/dev/null)
STAMP   := $(VENV)/.installed

install: $(STAMP)

$(BIN)/python:
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Python 3.11 or newer is needed, found " + sys.version.split()[0]'
	$(PYTHON) -m venv $(VENV)

# Strict editable mode: it lets mypy and editors see the mapped folders rewards/ and training/ (re-run after adding a module).
$(STAMP): pyproject.toml constraints.txt $(BIN)/python $(shell echo "$(sort $(SOURCES))" | cksum | sed 's/ .*//' | sed 's#^#$(VENV)/.tree-#')
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]' --config-settings editable_mode=strict
	touch $@

$(VENV)/.tree-%: | $(BIN)/python
	rm -f $(VENV)/.tree-*
	touch $@

demo: $(STAMP)
	$(BIN)/diffusion-align demo

# mypy keeps one core busy for half a minute: it runs beside the tests, and what it says comes after theirs.
test: $(STAMP) style
	@($(TYPES)) >$(VENV)/types.log 2>&1 & types=$$!; \
	$(BIN)/pytest; tests=$$?; \
	wait $$types; types=$$?; \
	cat $(VENV)/types.log; \
	if [ $$tests -ne 0 ]; then echo "make test: pytest failed with status $$tests, see above" >&2; fi; \
	if [ $$types -ne 0 ]; then echo "make test: mypy failed with status $$types, see above" >&2; fi; \
	[ $$tests -eq 0 ] && [ $$types -eq 0 ]

# Without what is marked slow: whatever takes over half a second (trainings, notebooks, several processes).
test-fast: $(STAMP) lint
	$(BIN)/pytest -m "not slow and not faults"

# Full disks, flipped bytes, signals, fuzzed files; then the runs that are killed and started again. Under half an hour.
test-faults: $(STAMP)
	$(BIN)/pytest -m "faults or not faults" tests/faults
	$(BIN)/python -m benchmarks faults

style: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

lint: style
	$(TYPES)

bench: $(STAMP)
	$(BIN)/python -m benchmarks dpo-step --model scenes-sdxl --vs baseline

# -E reads every page anew: those that are made from the code change when no Markdown file does.
SPHINX := $(BIN)/sphinx-build -W --keep-going -E -q -c docs/site -d build/doctrees .

docs: $(STAMP)
	$(SPHINX) build/site
	@echo build/site/index.html

# Asks the web whether outside links still lead somewhere.
linkcheck: $(STAMP)
	$(SPHINX) -b linkcheck build/linkcheck

clean:
	rm -rf $(VENV) build *.egg-info runs
