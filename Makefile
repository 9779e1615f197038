# make demo: environment + train, merge and sample on what the clone holds. make test: environment + all tests.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WORKERS := $(shell expr $$(getconf _NPROCESSORS_ONLN) + 1)   # one more than cores: some tests wait
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --maxprocesses 4 --dist worksteal

.PHONY: demo test lint clean

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[plot,test]'
	touch $@

demo: $(VENV)/installed
	$(BIN)/python -m rwkv_bone.demo out/demo

test: $(VENV)/installed
	$(PYTEST) -m "not slow"
	$(PYTEST) -m slow

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) out
