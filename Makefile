# make demo     fine-tunes the embedded model on its own data, in a few minutes without a GPU
# make check    what can be said within a minute: the style, and tests without runs and references
# make test     proves the claims of README.md against transformers, PEFT and bitsandbytes
# make torture  kills a run at 25 random moments, and tries 2,000 damaged files instead of 200
# make lowest   installs the lowest versions that requirements.txt allows, and tests with them
# make newest   installs the newest versions there are, and tests with them
# make bench    measures speed and memory beside them
# make experiments    answers the questions of experiments/, in about an hour and a half

PYTHON ?= python3
BIN = .venv/bin
LOWEST = .venv/lowest
NEWEST = .venv/newest
INSTALL = -m pip install --quiet --disable-pip-version-check

# Without the tests that compare with a reference library, as their names say.
ALONE = -k "not transformers and not peft and not reference"
# The files whose other tests start no run.
CHECKED = $(patsubst %,tests/test_%.py,data examples files machine packing project rows tiny)
# With the lowest versions these run too: whole runs of each script, and a Hub.
RUNS = $(patsubst %,tests/test_%.py,best claims cli describe hub page push resume train)
# Three, because many tests wait for a process or for the disk.
TESTS = -m pytest -n 3 --dist loadfile

# Threads that wait for one another spin before they sleep: fast on an idle machine, and several
# times slower than sleep on a busy one. This is a short spin, for machines of either kind.
demo check test lowest newest torture experiments: export GOMP_SPINCOUNT = 1000
# glibc keeps up to 256 MiB of freed memory, and takes blocks of up to 32 MiB from it. Otherwise
# each layer's tensors are new pages, which the system has to clear first.
export MALLOC_TRIM_THRESHOLD_ = 268435456
export MALLOC_MMAP_THRESHOLD_ = 33554432

demo: .venv/run
	$(BIN)/python train.py @tiny/args --rank 8 --out out/demo

check: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/python $(TESTS) $(ALONE) $(CHECKED)

test: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/python $(TESTS) --no-loadscope-reorder

torture: .venv/dev
	KILLS=25 CASES=2000 $(BIN)/python $(TESTS) \
		tests/test_resume.py tests/test_hostile.py

lowest: $(LOWEST)/run
	$(LOWEST)/bin/python $(TESTS) $(ALONE) $(CHECKED) $(RUNS)

# torch>=2.9,<3 becomes torch>=2.9. What is newest changes, so each call upgrades.
newest:
	@$(VENV) $(NEWEST)
	cat requirements.txt requirements-dev.txt | sed '/^-r/d; s/,<.*//' > $(NEWEST)/requirements.txt
	$(NEWEST)/bin/python $(INSTALL) --upgrade -r $(NEWEST)/requirements.txt
	$(NEWEST)/bin/python $(TESTS) --no-loadscope-reorder

bench: .venv/dev
	$(BIN)/python -m scripts.bench

experiments: .venv/run
	$(BIN)/python -m experiments

# Apple's python3 is 3.9, for which pip would find "no matching distribution".
TOO_OLD = import sys; sys.exit(sys.version_info < (3, 11) and "$(PYTHON) is Python " + \
	sys.version.split()[0] + ", and 3.11 or later is needed: make PYTHON=python3.12")
VENV = $(PYTHON) -c '$(TOO_OLD)' && $(PYTHON) -m venv

.venv/run: requirements.txt constraints.txt
	@$(VENV) .venv
	$(BIN)/python $(INSTALL) -r requirements.txt -c constraints.txt
	touch $@

.venv/dev: .venv/run requirements-dev.txt
	$(BIN)/python $(INSTALL) -r requirements-dev.txt -c constraints.txt
	touch $@

# torch>=2.9,<3 becomes torch==2.9. There are wheels of all of them for Python 3.11 and 3.12.
$(LOWEST)/run: requirements.txt requirements-dev.txt
	@$(VENV) $(LOWEST)
	sed 's/>=\([^,]*\).*/==\1/' requirements.txt > $(LOWEST)/requirements.txt
	grep -E '^(pytest|hypothesis)' requirements-dev.txt >> $(LOWEST)/requirements.txt
	$(LOWEST)/bin/python $(INSTALL) -r $(LOWEST)/requirements.txt
	touch $@

.PHONY: demo check test torture lowest newest bench experiments
