# Every target sets up what it needs in .venv; nothing is installed twice.
# Two stamps: .venv/core (what training needs) and .venv/all (lessons, site and tests too).

VENV := .venv
BIN := $(VENV)/bin
SITE := .site
LESSONS := $(patsubst lessons/%.py,.build/lessons/%,$(wildcard lessons/[0-9][0-9]_*.py))
LIBRARY := $(shell find picotron_mini -name '*.py')
CHECKED := picotron_mini tests $(wildcard lessons)
# Two tests at a time: starting ranks leaves cores idle.
PYTEST := $(BIN)/python -m pytest -n 2
export NO_MKDOCS_2_WARNING := 1
export HF_HUB_OFFLINE := 1

.DEFAULT_GOAL := help
.PHONY: help setup train test quick verify-all lint lab lessons site docs clean

help: ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | awk -F '\t' '{printf "  make %-10s %s\n", $$1, $$2}'

setup: $(VENV)/all ## prepare .venv for everything below

train: $(VENV)/core ## train a language model: all the GPUs there are, else 4 CPU ranks
	$(BIN)/picotron-mini train

test: $(VENV)/all lint ## check everything that this repository claims
	$(PYTEST) --dist loadfile lessons --nbval --nbval-current-env --nbval-cell-timeout=120 \
	  --nbval-sanitize-with tests/nbval_sanitize.cfg
	@# coverage is counted where that is cheap, and judged once, at the end
	$(PYTEST) --dist worksteal tests -m slow --ignore tests/course
	$(PYTEST) --dist worksteal tests/course -m slow --cov --cov-report= --cov-fail-under=0
	$(PYTEST) --dist worksteal tests -m "not slow" --cov --cov-append --cov-report=term

quick: $(VENV)/all lint ## the checks of a few minutes
	$(PYTEST) --dist worksteal tests -m "not slow"

verify-all: $(VENV)/core ## verify every legal combination of techniques; goes on where it was interrupted
	$(BIN)/python -m picotron_mini.verify_all summary/07_3d_parallel_verify_all.log

lint: $(VENV)/all ## style and types
	$(BIN)/ruff check $(CHECKED)
	$(BIN)/ruff format --check $(CHECKED)
	$(BIN)/mypy

lab: $(VENV)/all ## open the lessons in JupyterLab
	$(BIN)/jupyter lab --notebook-dir=lessons

lessons: $(LESSONS) ## bring notebooks in step with their .py, and run those that changed

.build/lessons/%: lessons/%.py $(LIBRARY) $(VENV)/all
	@mkdir -p $(@D)
	$(BIN)/jupytext --sync $<
	$(BIN)/jupyter nbconvert --to notebook --execute --inplace --ExecutePreprocessor.timeout=120 \
	  --ExecutePreprocessor.record_timing=False lessons/$*.ipynb
	$(BIN)/jupytext --sync lessons/$*.ipynb
	@touch $@

site: $(VENV)/all ## build the site, strictly, into .site/html
	$(BIN)/python -m picotron_mini.course.site . $(SITE)/docs
	$(BIN)/mkdocs build --strict

docs: site ## build the site and serve it on this machine
	$(BIN)/python -m http.server --bind 127.0.0.1 --directory $(SITE)/html 8000

clean: ## remove what was built; .venv and runs/ stay
	rm -rf $(SITE) .build build .pytest_cache .ruff_cache .mypy_cache .hypothesis .coverage .coverage.*

$(VENV)/core: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --constraint constraints.txt --editable .
	@touch $@

$(VENV)/all: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[dev]'
	@touch $(VENV)/core $@

# PYTHON=... chooses; else the first of these that is new enough.
PYTHONS := $(or $(PYTHON),python3 python3.13 python3.12 python3.11)
$(BIN)/python:
	@for python in $(PYTHONS); do \
	  if $$python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; \
	  then echo "$$python -m venv $(VENV)"; exec $$python -m venv $(VENV); fi; \
	done; \
	echo "Python 3.11, 3.12 or 3.13 is needed; $(firstword $(PYTHONS)) is $$($(firstword $(PYTHONS)) --version 2>&1)." >&2; \
	echo "Install one, or name it: make $(MAKECMDGOALS) PYTHON=/path/to/python3.12" >&2; exit 1
