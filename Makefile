# make demo    fine-tunes the embedded model on its own data, in a few minutes without a GPU
# make test    proves the claims of README.md against transformers, PEFT and bitsandbytes
# make bench   measures speed and memory beside them

PYTHON ?= python3
BIN = .venv/bin

demo: .venv/run
	rm -rf out/demo
	$(BIN)/python train.py @tiny/args --rank 8 --out out/demo

test: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/python -m pytest

bench: .venv/dev
	$(BIN)/python bench.py

.venv/run: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.venv/dev: .venv/run requirements-dev.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

.PHONY: demo test bench
