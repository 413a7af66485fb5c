# make demo    fine-tunes the embedded model on its own data, in a few minutes without a GPU
# make test    proves the claims of README.md against transformers, PEFT and bitsandbytes
# make torture kills a run at 25 random moments, and feeds 2,000 cases of damaged and hostile files instead of 200
# make bench   measures speed and memory beside them

PYTHON ?= python3
BIN = .venv/bin
# Threads that wait asleep cost a tenth when nothing else runs, and spare the processor the rest of the time: see README.md
demo test torture: export OMP_WAIT_POLICY = passive

demo: .venv/run
	rm -rf out/demo
	$(BIN)/python train.py @tiny/args --rank 8 --out out/demo

test: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/python -m pytest -n 2 --dist loadfile

torture: .venv/dev
	KILLS=25 CASES=2000 $(BIN)/python -m pytest -n 2 --dist loadfile tests/test_resume.py tests/test_hostile.py

bench: .venv/dev
	$(BIN)/python bench.py

.venv/run: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.venv/dev: .venv/run requirements-dev.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

.PHONY: demo test torture bench
