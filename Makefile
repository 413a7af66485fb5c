# make demo     fine-tunes the embedded model on its own data, in a few minutes without a GPU
# make check    what can be said within a minute: the style, and tests without runs and references
# make test     proves the claims of README.md against transformers, PEFT and bitsandbytes
# make torture  kills a run at 25 random moments, and tries 2,000 damaged files instead of 200
# make lowest   installs the lowest versions that requirements.txt allows, and tests with them
# make bench    measures speed and memory beside them
# make experiments    answers the questions of experiments/, in some three hours

PYTHON ?= python3
BIN = .venv/bin
LOWEST = .venv/lowest

# Without the tests that compare with a reference library, as their names say.
ALONE = -k "not transformers and not peft and not reference"
# The files whose other tests start no run.
CHECKED = $(patsubst %,tests/test_%.py,data examples files machine packing project rows tiny)
# With the lowest versions these run too: whole runs of each script.
RUNS = $(patsubst %,tests/test_%.py,best claims cli describe page resume train)

# Threads that wait for one another spin before they sleep: fast on an idle machine, and several
# times slower than sleep on a busy one. This is a short spin, for machines of either kind.
demo check test lowest torture experiments: export GOMP_SPINCOUNT = 1000
# glibc keeps up to 256 MiB of freed memory, and takes blocks of up to 32 MiB from it. Otherwise
# each layer's tensors are new pages, which the system has to clear first.
export MALLOC_TRIM_THRESHOLD_ = 268435456
export MALLOC_MMAP_THRESHOLD_ = 33554432

demo: .venv/run
	$(BIN)/python train.py @tiny/args --rank 8 --out out/demo

check: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/python -m pytest -n 2 --dist loadfile $(ALONE) $(CHECKED)

test: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

torture: .venv/dev
	KILLS=25 CASES=2000 $(BIN)/python -m pytest -n 2 --dist loadfile \
		tests/test_resume.py tests/test_hostile.py

lowest: $(LOWEST)/run
	$(LOWEST)/bin/python -m pytest -n 2 --dist loadfile $(ALONE) $(CHECKED) $(RUNS)

bench: .venv/dev
	$(BIN)/python -m scripts.bench

experiments: .venv/run
	$(BIN)/python -m experiments

.venv/run: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.venv/dev: .venv/run requirements-dev.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

# torch>=2.9,<2.14 becomes torch==2.9.
$(LOWEST)/run: requirements.txt requirements-dev.txt
	$(PYTHON) -m venv $(LOWEST)
	sed 's/>=\([^,]*\),.*/==\1/' requirements.txt > $(LOWEST)/requirements.txt
	grep -E '^(pytest|hypothesis)' requirements-dev.txt >> $(LOWEST)/requirements.txt
	$(LOWEST)/bin/pip install --quiet --disable-pip-version-check -r $(LOWEST)/requirements.txt
	touch $@

.PHONY: demo check test torture lowest bench experiments
