# make demo: train on real digits and sample from them.   make test: the whole test suite.   make lint: ruff and types.
# make parity: live against diffusers and torch-fidelity.   make bench: what networks cost, beside diffusers.   make readme: README's tables.
# make crash: one run killed 25 times, which has to end as if it had not been.
# Everything is installed into .venv; PYTHON chooses another interpreter of 3.11 or newer.

PYTHON ?= python3
BIN := .venv/bin
RUN ?= runs/digits
TRAIN ?=
DEMO ?=

.PHONY: demo readme test crash lint parity bench clean

demo: .venv/installed
	$(BIN)/python train.py digits --workdir $(RUN) $(TRAIN)
	$(BIN)/python -m diffjax.demo $(RUN) $(DEMO)

readme: demo .venv/installed-test
	mkdir -p docs && cp $(RUN)/overview.png docs/
	$(BIN)/python sample.py $(RUN) --guidance 2 --num 10 --animate docs/ddim.gif --out $(RUN)/ddim.png
	$(BIN)/python -m diffjax.edit reconstruct $(RUN) --num 32 --steps 10,20,50,100,200,500,1000 \
		--out docs/reconstruct.png | grep '^|' > $(RUN)/reconstruct.md
	$(BIN)/python -m diffjax.edit interpolate $(RUN) --num 8 --out docs/interpolate.png
	$(BIN)/python -m diffjax.edit vary $(RUN) --labels 8 --guidance 2 --out docs/vary.png
	$(BIN)/python -m diffjax.edit inpaint $(RUN) --out docs/inpaint.png
	$(BIN)/python -m diffjax.evaluate $(RUN) --bits-per-dim | grep '^|' > $(RUN)/bits.md
	$(BIN)/python -m diffjax.testing > $(RUN)/orders.md
	$(BIN)/python -m diffjax.bench sampler > $(RUN)/bench.md
	$(BIN)/python -m diffjax.bench training > $(RUN)/training.md
	{ echo '```'; $(BIN)/python -c 'from diffjax import sampler, schedule; levels = schedule.linear(1000); \
		print(sampler.ddim(levels, schedule.trailing(levels, 4), eta=0.5))'; echo '```'; } > $(RUN)/plan.md
	for name in demo plan orders bench training reconstruct bits; do \
		sed -i -e "/<!-- $$name -->/,/<!-- \/$$name -->/{//!d}" -e "/<!-- $$name -->/r $(RUN)/$$name.md" README.md; done

test: .venv/installed-test
	$(BIN)/python -m pytest $(TESTS)

crash: .venv/installed-test
	KILLS=25 $(BIN)/python -m pytest tests/test_crash.py -k killed_again

lint: .venv/installed-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyrefly check --python-interpreter-path $(BIN)/python

parity: .venv/installed-parity .venv/installed-test
	$(BIN)/python -m pytest tests/test_parity.py tests/interop tests/evaluation/test_metrics_parity.py -rs

bench: .venv/installed-parity
	$(BIN)/python -m diffjax.bench --out runs/bench
	mkdir -p docs && cp runs/bench/bench.png docs/
	sed -i -e '/<!-- networks -->/,/<!-- \/networks -->/{//!d}' -e '/<!-- networks -->/r runs/bench/bench.md' README.md

clean:
	rm -rf .venv .pytest_cache .hypothesis .ruff_cache

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "diffjax needs Python 3.11 or newer: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)" >&2; exit 2; }
	$(PYTHON) -m venv .venv

.venv/installed: .venv/bin/python pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	touch $@

.venv/installed-%: .venv/installed pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[$*]'
	touch $@
