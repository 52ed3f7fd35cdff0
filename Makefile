# Every target sets itself up: a fresh clone on a fresh machine needs only Python 3.11 and make.
PYTHON ?= python3
# For `make gpu`: the environment that has the GPU's torch and Triton, and this package.
GPU_PYTHON ?= $(PYTHON)
VENV   := .venv
PY     := $(VENV)/bin/python
READY  := $(VENV)/.ready
PYTEST := $(PY) -m pytest -n 2 --dist worksteal

.PHONY: demo test test-all fuzz lint bench gpu accept clean

$(READY): pyproject.toml constraints.txt
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q "$$(grep '^torch==' constraints.txt)"
	$(PY) -m pip install -q -c constraints.txt -e '.[test,lint]'
	touch $(READY)

demo: $(READY)                  ## train the two-layer net, eager and compiled side by side
	$(PY) -m examples.demo

test: $(READY)                  ## compiled-process tests, then Triton's interpreter in its own process
	$(PYTEST) -m "not interpret and not slow" tests
	TRITON_INTERPRET=1 $(PYTEST) -m "interpret and not slow" tests

test-all: $(READY)
	TRACEJIT_TEST_ALL=1 $(PYTEST) -m "not interpret" tests
	TRACEJIT_TEST_ALL=1 TRITON_INTERPRET=1 $(PYTEST) -m interpret tests

N ?= 1000
fuzz: $(READY)                  ## N random programs against eager, in shards (FUZZ='--processes 2 --verify 2')
	PYTHONPATH=tests $(PY) -m support.fuzz --programs $(N) $(FUZZ)

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

bench: $(READY)                 ## times beside the peers (BENCH='--rounds 5 --case mlp …')
	$(PY) -m benchmarks.run $(BENCH)
	$(if $(BENCH),,$(PY) -m benchmarks.data_parallel)

gpu:                            ## all that a GPU can tell, in its own environment (GPU='--minutes 9 --resume')
	$(GPU_PYTHON) -m benchmarks.gpu $(GPU)

accept: $(READY)                ## rewrite the golden files after reading their diff
	TRACEJIT_ACCEPT=1 $(PY) -m pytest tests -k golden

clean:
	rm -rf $(VENV) build *.egg-info
