PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Python compiles what is imported, not all that is installed: half of the time.
QUIETLY := --quiet --no-compile --disable-pip-version-check
STARTED := $(shell date +%s)

.PHONY: demo test test-all chaos fuzz lint clean

$(VENV)/.base: setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(QUIETLY) -e .
	touch $@

$(VENV)/.test: setup.py $(VENV)/.base
	$(BIN)/python -m pip install $(QUIETLY) -e '.[test]'
	touch $@

demo: $(VENV)/.base  ## train, evaluate and draw on the embedded data set
	$(BIN)/python launch/demo.py --config=configs/procedural.py --output=demo \
	  --started=$(STARTED)

test: $(VENV)/.test  ## the whole suite but the slow checks
	$(BIN)/python -m pytest -n 2

test-all: $(VENV)/.test  ## the slow checks as well
	$(BIN)/python -m pytest -n 2 -m ''

chaos: $(VENV)/.test  ## kills and damages tiny runs; see docs/reliability.md
	$(BIN)/python tests/chaos.py --kills=50

fuzz: $(VENV)/.test  ## 1,500 hostile configs, records, images and weights
	$(BIN)/python -m pytest tests/test_fuzz.py -s -m ''

lint: $(VENV)/.test
	$(BIN)/python -m compileall -q spectraldiffusion_jax configs launch tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) demo build *.egg-info
