# make demo          run a real five-fold finetune in a temporary project, kill it and resume it
# make test          run the whole test suite
# make test-oldest   run the tests that depend on other packages, with the oldest versions that pyproject.toml accepts
# make test-colab    run the same tests with Colab's versions
# make sample-oldest, make sample-colab   run a sample of these tests, as CI does
# make test-kernels  compile every GPU kernel for every chip and precision, and print a table; needs no GPU
# make check         check style, types and spelling, and run the tests
# make site          build the documentation as a website, in site/
#
# Each target first creates the environment in .venv, unless it exists and its inputs have not changed.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

OTHERS := .venv-oldest .venv-colab

.PHONY: demo test test-kernels test-oldest test-colab sample-oldest sample-colab check lint site clean

# Two test workers with one thread each: with more threads than cores, OpenMP's threads wait for one another.
test test-oldest test-colab sample-oldest sample-colab: export OMP_NUM_THREADS := 1

demo: $(READY)
	$(BIN)/mbqueue demo

test: $(READY)
	$(BIN)/python -m pytest -q -n 2 --dist worksteal

test-kernels: $(READY)
	MBQUEUE_TEST_KERNELS=all $(BIN)/python -m pytest -q -s tests/train/test_offline.py

# Do not treat warnings as errors, because old packages give warnings of their own.
test-oldest test-colab: test-%: .venv-%/.ready
	.venv-$*/bin/python -m pytest -q -n 2 --dist worksteal -o filterwarnings=default \
	  tests/data tests/train tests/results tests/cli tests/web

sample-oldest sample-colab: sample-%: .venv-%/.ready
	.venv-$*/bin/python -m pytest -q -n 2 --dist worksteal -o filterwarnings=default \
	  tests/data/test_batches.py tests/data/test_tables.py tests/data/test_readers.py \
	  tests/train/test_frozen.py tests/train/test_checkpoint.py \
	  tests/results/test_tables.py tests/results/test_matbench_file.py \
	  tests/cli/test_data_commands.py tests/cli/test_status.py

# Install only the packages whose versions differ, and take all other packages from .venv.
$(OTHERS:%=%/.ready): .venv-%/.ready: constraints-%.txt $(READY)
	$(PYTHON) -m venv .venv-$*
	echo "import site; site.addsitedir('$(CURDIR)/'+'$$(echo $(VENV)/lib/python3*/site-packages)')" \
	  > "$$(echo .venv-$*/lib/python3*/site-packages)/over.pth"
	.venv-$*/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r constraints-$*.txt
	@touch $@

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell

check: lint test

site: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

# Create the marker file last, so that make repeats an interrupted installation.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "mbqueue needs Python 3.11 or newer; $(PYTHON) is older. Try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
# An earlier installation without -e leaves this folder behind, which would hide the editable package.
	rm -rf $(VENV)/lib/python3*/site-packages/mbqueue
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps matbench
	@touch $(READY)

clean:
	rm -rf $(VENV) $(OTHERS)
