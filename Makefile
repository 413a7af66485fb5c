# make demo     fine-tunes the embedded model on its own data, in a few minutes without a GPU
# make check    what can be said within a minute: the style, and tests without runs and references
# make test     proves the claims of README.md against transformers, PEFT and bitsandbytes
# make torture  kills a run at 25 random moments, and tries 2,000 damaged files instead of 200
# make lowest   installs the lowest versions that requirements.txt allows, and tests with them
# make bench    measures speed and memory beside them

PYTHON ?= python3
BIN = .venv/bin
LOWEST = .venv/lowest

# The tests that start no run and, but for those with "transformers" in their name, need no
# reference.
CHECKED = data examples files loading machine packing project rows tiny
# With the lowest versions these run too: whole runs of each script.
RUNS = best claims cli describe page resume train
tests_of = $(wildcard $(patsubst %,tests/test_%.py,$(1)))

# Threads that wait for one another spin before they sleep: fast on an idle machine, and several
# times slower than sleep on a busy one. This is a short spin, for machines of either kind.
demo check test lowest torture: export GOMP_SPINCOUNT = 1000
# glibc keeps up to 256 MiB of freed memory, and takes blocks of up to 32 MiB from it. Otherwise
# each layer's tensors are new pages, which the system has to clear first.
export MALLOC_TRIM_THRESHOLD_ = 268435456
export MALLOC_MMAP_THRESHOLD_ = 33554432

demo: .venv/run
	$(BIN)/python train.py @tiny/args --rank 8 --out out/demo

check: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/python -m pytest -n 2 --dist loadfile -k "not transformers" $(call tests_of,$(CHECKED))

test: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

torture: .venv/dev
	KILLS=25 CASES=2000 $(BIN)/python -m pytest -n 2 --dist loadfile \
		tests/test_resume.py tests/test_hostile.py

lowest: $(LOWEST)/run
	$(LOWEST)/bin/python -m pytest -n 2 --dist loadfile -k "not transformers and not peft" \
		$(call tests_of,$(CHECKED) $(RUNS))

bench: .venv/dev
	$(BIN)/python -m scripts.bench

.venv/run: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.venv/dev: .venv/run requirements-dev.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

# torch>=2.11,<2.14 becomes torch==2.11.
$(LOWEST)/run: requirements.txt requirements-dev.txt
	$(PYTHON) -m venv $(LOWEST)
	sed 's/>=\([^,]*\),.*/==\1/' requirements.txt > $(LOWEST)/requirements.txt
	grep -E '^(pytest|hypothesis)' requirements-dev.txt >> $(LOWEST)/requirements.txt
	$(LOWEST)/bin/pip install --quiet --disable-pip-version-check -r $(LOWEST)/requirements.txt
	touch $@

.PHONY: demo check test torture lowest bench
