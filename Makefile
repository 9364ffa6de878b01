# Two commands: `make lab` to work through the notebooks, `make test` to prove all of it. Both set up what is missing.
PYTHON ?= $(shell for p in python3 python3.12 python3.11 python3.13; do \
	$$p -c 'import sys; sys.exit(not (3,11) <= sys.version_info[:2] <= (3,13))' 2>/dev/null && echo $$p && break; done)
ifeq ($(PYTHON),)
PYTHON := python3
endif
BIN := .venv/bin

.PHONY: lab test setup doctor notebooks adapters bench clean

lab: setup
	$(BIN)/jupyter lab --ServerApp.root_dir="$(CURDIR)" --LabApp.default_url=/lab/tree/notebooks/00_start_here.ipynb

test: setup
	$(BIN)/python -m pytest

setup: .venv/ready

.venv/ready: requirements.txt pyproject.toml install.py
	@$(PYTHON) install.py

doctor: setup
	$(BIN)/python -m reference doctor

notebooks: setup  # run every notebook from the top and keep its outputs
	$(BIN)/jupyter nbconvert --to notebook --execute --inplace notebooks/*.ipynb

adapters: setup  # train every shipped adapter anew (an hour or more each); one that is no worse is put into use
	for name in closed_book qualify voice; do $(BIN)/python -m reference train $$name || exit 1; done

bench: setup
	$(BIN)/python -m benchmarks

clean:
	rm -rf .venv build *.egg-info
