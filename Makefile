# make demo     fine-tunes the embedded model on its own data, in a few minutes without a GPU
# make test     proves the claims of README.md against transformers, PEFT and bitsandbytes
# make torture  kills a run at 25 random moments, and tries 2,000 damaged files instead of 200
# make bench    measures speed and memory beside them

PYTHON ?= python3
BIN = .venv/bin

# Threads that wait for one another spin before they sleep: fast on an idle machine, and several
# times slower than sleep on a busy one. This is a short spin, for machines of either kind.
demo test torture: export GOMP_SPINCOUNT = 1000
# glibc keeps up to 256 MiB of freed memory, and takes blocks of up to 32 MiB from it. Otherwise
# each layer's tensors are new pages, which the system has to clear first.
export MALLOC_TRIM_THRESHOLD_ = 268435456
export MALLOC_MMAP_THRESHOLD_ = 33554432

demo: .venv/run
	$(BIN)/python train.py @tiny/args --rank 8 --out out/demo

test: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

torture: .venv/dev
	KILLS=25 CASES=2000 $(BIN)/python -m pytest -n 2 --dist loadfile \
		tests/test_resume.py tests/test_hostile.py

bench: .venv/dev
	$(BIN)/python -m scripts.bench

.venv/run: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.venv/dev: .venv/run requirements-dev.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

.PHONY: demo test torture bench
