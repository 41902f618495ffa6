# make demo: train on real digits and sample from them.   make test: the whole test suite.   make lint: ruff and types.
# make frontier: quality and latency of every sampler, into README.   make mnist: the same of MNIST, trained on CPUs.
# make distill: students of few steps, beside their teacher.   make mnist-distill: the same of MNIST.
# make parity: live against diffusers and torch-fidelity.   make bench: what networks cost, beside diffusers.   make readme: README's tables.
# make crash: one run killed 25 times, which has to end as if it had not been.
# Everything is installed into .venv; PYTHON chooses another interpreter of 3.11 or newer.

PYTHON ?= python3
BIN := .venv/bin
RUN ?= runs/digits
TRAIN ?=
DEMO ?=

# $(call insert,NAME,FILE): put a file between the marks of this name in README.
insert = sed -i -e "/<!-- $(1) -->/,/<!-- \/$(1) -->/{//!d}" -e "/<!-- $(1) -->/r $(2)" README.md

.PHONY: demo readme frontier distill mnist mnist-distill test crash lint parity bench clean

demo: .venv/installed
	$(BIN)/diffjax train digits --workdir $(RUN) $(TRAIN)
	$(BIN)/diffjax demo $(RUN) $(DEMO)

readme: demo .venv/installed-test
	mkdir -p docs && cp $(RUN)/overview.png docs/
	$(BIN)/diffjax sample $(RUN) --guidance 2 --num 10 --animate docs/ddim.gif --out $(RUN)/ddim.png
	$(BIN)/diffjax edit reconstruct $(RUN) --num 32 --steps 10,20,50,100,200,500,1000 \
		--out docs/reconstruct.png | grep '^|' > $(RUN)/reconstruct.md
	$(BIN)/diffjax edit interpolate $(RUN) --num 8 --out docs/interpolate.png
	$(BIN)/diffjax edit vary $(RUN) --labels 8 --guidance 2 --out docs/vary.png
	$(BIN)/diffjax edit inpaint $(RUN) --out docs/inpaint.png
	$(BIN)/diffjax evaluate $(RUN) --bits-per-dim | grep '^|' > $(RUN)/bits.md
	$(BIN)/python -m diffjax.testing > $(RUN)/orders.md
	$(BIN)/diffjax bench sampler > $(RUN)/bench.md
	$(BIN)/diffjax bench training > $(RUN)/training.md
	{ echo '```'; $(BIN)/python -c 'from diffjax import sampler, schedule; levels = schedule.linear(1000); \
		print(sampler.ddim(levels, schedule.trailing(levels, 4), eta=0.5))'; echo '```'; } > $(RUN)/plan.md
	for name in demo plan orders bench training reconstruct bits; do $(call insert,$$name,$(RUN)/$$name.md); done

# The first command is the one that README tells; the others add what its claims need.
frontier: demo
	$(BIN)/diffjax frontier $(RUN) --samplers ddim,dpm_solver_pp_2m,heun,ddpm:1000 \
		--steps 2,4,5,8,10,20,50 --guidance 1,2 --num 500 --out $(RUN)/frontier
	$(BIN)/diffjax frontier $(RUN) --samplers ddim,dpm_solver_pp_2m,heun \
		--steps 2,4,5,8,10,20,50 --guidance 1,2 --seeds 0,1,2 --out $(RUN)/frontier
	$(BIN)/diffjax frontier $(RUN) --samplers "ddpm:1000,ddpm(variance=fixed_large):1000" \
		--guidance 1 --seeds 0,1,2 --out $(RUN)/frontier
	$(BIN)/diffjax frontier $(RUN) --samplers ddim:50 --guidance 3,4 --seeds 0,1,2 --out $(RUN)/frontier
	mkdir -p docs && cp $(RUN)/frontier/pareto.png docs/frontier.png
	$(call insert,frontier,$(RUN)/frontier/pareto.md)

# Students of few steps, of both kinds, beside their teacher on its plot.
STUDENTS = $(RUN)-distilled
distill: frontier
	$(BIN)/diffjax train distill --teacher $(RUN) --workdir $(STUDENTS) --guidance 2
	$(BIN)/diffjax train distill --teacher $(RUN) --workdir $(STUDENTS) --guidance 2 --method consistency
	$(BIN)/diffjax frontier $(foreach n,16 8 4 2 1 consistency,$(STUDENTS)/$(n)) --guidance 1,2 --seeds 0,1,2 \
		--out $(RUN)/frontier
	$(BIN)/diffjax frontier $(STUDENTS)/any --samplers ddim --steps 4,8,20,50 --guidance 2 --seeds 0,1,2 \
		--out $(RUN)/frontier
	$(BIN)/diffjax sample $(RUN) --guidance 2 --num 30 --out docs/distilled-teacher.png
	for n in 4 1; do $(BIN)/diffjax sample $(STUDENTS)/$$n --guidance 2 --num 30 --out docs/distilled-$$n.png; done
	cp $(RUN)/frontier/pareto.png docs/frontier.png
	$(call insert,frontier,$(RUN)/frontier/pareto.md)

# MNIST on CPUs. NPZ names a file of x and y; without it tensorflow-datasets downloads its own.
mnist: .venv/installed
	$(BIN)/diffjax train mnist_small $(if $(NPZ),--data.source npz --data.path $(NPZ)) --workdir runs/mnist-small
	mkdir -p docs && cp runs/mnist-small/curve.png docs/mnist-curve.png
	$(BIN)/diffjax sample runs/mnist-small --guidance 2 --num 30 --out docs/mnist.png
	$(BIN)/diffjax evaluate runs/mnist-small --sampler ddim --steps 50 --guidance 2 --num 500 \
		| grep '^|' > runs/mnist-small/quality.md
	$(BIN)/diffjax frontier runs/mnist-small --samplers ddim,dpm_solver_pp_2m --steps 4,10,50 --guidance 1,2 \
		--num 250 --out runs/mnist-small/frontier
	cp runs/mnist-small/frontier/pareto.png docs/mnist-frontier.png
	$(call insert,quality,runs/mnist-small/quality.md)
	$(call insert,mnist-frontier,runs/mnist-small/frontier/pareto.md)

# The first student halves 16 steps, and stages are short, since each step takes a second.
mnist-distill: mnist
	$(BIN)/diffjax train distill --teacher runs/mnist-small --workdir runs/mnist-distilled --guidance 2 --start 16 \
		--train.steps 400 --train.batch 32
	for n in 4 1; do \
		$(BIN)/diffjax sample runs/mnist-distilled/$$n --guidance 2 --num 30 --out docs/mnist-distilled-$$n.png; done
	$(BIN)/diffjax frontier $(foreach n,8 4 2 1,runs/mnist-distilled/$(n)) --guidance 1,2 --num 250 \
		--out runs/mnist-small/frontier
	cp runs/mnist-small/frontier/pareto.png docs/mnist-frontier.png
	$(call insert,mnist-frontier,runs/mnist-small/frontier/pareto.md)

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
	$(BIN)/diffjax bench --out runs/bench
	mkdir -p docs && cp runs/bench/bench.png docs/
	$(call insert,networks,runs/bench/bench.md)

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
