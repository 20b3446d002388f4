# The two commands that matter are `make demo` and `make test`. Both prepare everything they need, and start at once
# when it is there already. Needed: Python 3.11 with venv, a C and C++ compiler, cmake, git, make.

PYTHON ?= python3
BACKEND ?=
VENV := .venv
RUN := $(VENV)/bin
INSTALLED := $(VENV)/installed
# Half of the tests' time goes into waiting for real processes. A file's tests stay together, for they share servers;
# the files keep their order, in which what only calculates comes before what starts services.
TWO_AT_A_TIME := --numprocesses 2 --dist loadfile --no-loadscope-reorder

# pip takes the pins for isolated build environments from here; newer versions ask for the second name.
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_BUILD_CONSTRAINT := $(PIP_CONSTRAINT)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help demo test lint format types imports venv llama tools clean

help: ## show the targets
	@sed -n 's/^\([a-z]*\):[^#]*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 10

demo: tools ## explain, serve and ask a small model, from nothing
	@$(RUN)/python scripts/demo.py

test: tools ## run all tests, against the real llama.cpp
	@$(RUN)/python -m pytest $(TWO_AT_A_TIME) $(ARGS)

lint: venv ## ruff: rules and format
	@$(RUN)/ruff check
	@$(RUN)/ruff format --check

format: venv ## ruff: write the format
	@$(RUN)/ruff format

types: venv ## mypy, strict
	@$(RUN)/mypy
	@$(RUN)/mypy scripts fixtures

imports: venv ## import-linter: who may know whom
	@$(RUN)/lint-imports

venv: $(INSTALLED) ## .venv with the pinned dependencies and the planner command

llama: venv ## build llama.cpp's tools anew where needed: BACKEND=cpu|cuda|hip|vulkan, else what this machine has
	@$(RUN)/python scripts/build_llama.py $(if $(BACKEND),--backend $(BACKEND))

# What demo and test need: any working build of the tools. One made for a GPU on purpose is kept.
tools: venv
	@$(RUN)/python scripts/build_llama.py $(if $(BACKEND),--backend $(BACKEND),--keep)

clean: ## remove .venv and caches of the tree; the wheel of llama.cpp stays in ~/.cache/loadmaster
	rm -rf $(VENV) .demo .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache build *.egg-info

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) scripts/make_venv.py $(VENV)
	@echo "installing the pinned dependencies into $(VENV)"
	@$(RUN)/python -m pip install --quiet --editable '.[fixtures,lint,test]'
	@touch $@
