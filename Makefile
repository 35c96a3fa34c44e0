# make demo   a real five-fold finetune, killed and carried on, in a throw-away project
# make test   the whole test suite
# make test-oldest, test-colab  the tests that meet other packages, with the oldest versions that pyproject.toml admits
#             and with those that Colab has
# make sample-oldest, sample-colab  a sample of these tests, for CI
# make test-kernels  every GPU kernel compiled for every chip and precision, with a table; no GPU is needed
# make check  style, types, spelling and tests, as CI does
# make site   the documents as a site, in site/
#
# All of them make the environment in .venv first, and make it again only when its inputs change.

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

# Warnings of old packages are theirs.
test-oldest test-colab: test-%: .venv-%/.ready
	.venv-$*/bin/python -m pytest -q -n 2 --dist worksteal -o filterwarnings=default \
	  tests/data tests/train tests/results tests/cli tests/web

sample-oldest sample-colab: sample-%: .venv-%/.ready
	.venv-$*/bin/python -m pytest -q -n 2 --dist worksteal -o filterwarnings=default \
	  tests/data/test_batches.py tests/data/test_tables.py tests/data/test_readers.py \
	  tests/train/test_frozen.py tests/train/test_checkpoint.py \
	  tests/results/test_tables.py tests/results/test_matbench_file.py \
	  tests/cli/test_data_commands.py tests/cli/test_status.py

# Laid over .venv: only the packages that differ are installed.
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

# The marker is written last: an installation that was cut off is done again.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "mbqueue needs Python 3.11 or newer; $(PYTHON) is older. Try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
# If mbqueue was installed here without -e, its compiled code remains, and this folder would hide the editable package.
	rm -rf $(VENV)/lib/python3*/site-packages/mbqueue
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps matbench
	@touch $(READY)

clean:
	rm -rf $(VENV) $(OTHERS)
