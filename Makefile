# make demo: train on real digits and sample from them. make frontier, distill: the quality and time of samplers and students.
# make mnist, mnist-distill: the same of MNIST, on CPUs. make fashion: models of pixels and of latents of Fashion-MNIST.
# make bench: what networks cost. make results: the tables of docs/results.
# make test, test-fast, crash, parity, lint, docs, lesson: checks. make mutants: plant faults and print those that no test catches.
# make clean: remove what these have installed and built.
# Everything is installed into .venv, but for the peers of make parity. PYTHON chooses another interpreter of 3.11 or newer, and
# WORKERS the number of processes that share the tests: one has 8 fake devices, and takes 2 to 3 GB.

PYTHON ?= python3
BIN := .venv/bin
RUN ?= runs/digits
TRAIN ?=
DEMO ?=
TESTS ?=
MUTANTS ?=
WORKERS ?= 2
IMAGES := docs/images
LESSON = tests/docs/test_examples.py::test_lesson_runs
SHARED = --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder

# $(call insert,NAME,FILE,PAGE): put a file between the marks of this name in a page of results.
insert = sed -i -e "/<!-- $(1) -->/,/<!-- \/$(1) -->/{//!d}" -e "/<!-- $(1) -->/r $(2)" docs/results/$(3).md

.PHONY: demo demo-check frontier distill mnist mnist-distill fashion bench results
.PHONY: test test-fast crash mutants parity lint docs lesson clean

# ------------------------------------------------------------------------------- runs

demo: .venv/installed
	$(BIN)/diffjax train digits --workdir $(RUN) $(TRAIN)
	$(BIN)/diffjax demo $(RUN) $(DEMO)

# What a demo leaves is right; two edits beside it.
demo-check: demo .venv/installed-test
	$(BIN)/diffjax edit reconstruct $(RUN) --steps 10,50 --out $(RUN)/reconstruct.png --report $(RUN)/reconstruct.md
	$(BIN)/diffjax edit inpaint $(RUN) --steps 20 --out $(RUN)/inpaint.png --report $(RUN)/inpaint.md
	cat $(RUN)/reconstruct.md $(RUN)/inpaint.md > $(RUN)/edit.txt
	DEMO_RUN=$(abspath $(RUN)) $(BIN)/python -m pytest tests/cli/test_demo.py -k "not mistakes"

frontier: demo
	$(BIN)/diffjax frontier $(RUN) --sampler ddim,dpm_solver_pp_2m,heun,ddpm:1000 \
		--steps 2,4,5,8,10,20,50 --guidance 1,2 --num 500 --out $(RUN)/frontier
	$(BIN)/diffjax frontier $(RUN) --sampler ddim,dpm_solver_pp_2m,heun \
		--steps 2,4,5,8,10,20,50 --guidance 1,2 --seed 0,1,2 --out $(RUN)/frontier
	$(BIN)/diffjax frontier $(RUN) --sampler "ddpm:1000,ddpm(variance=fixed_large):1000" \
		--guidance 1 --seed 0,1,2 --out $(RUN)/frontier
	$(BIN)/diffjax frontier $(RUN) --sampler ddim:50 --guidance 3,4 --seed 0,1,2 --out $(RUN)/frontier
	mkdir -p $(IMAGES) && cp $(RUN)/frontier/frontier.png $(IMAGES)/frontier.png
	$(call insert,frontier,$(RUN)/frontier/frontier.md,digits)

# Students of few steps, of both kinds, beside their teacher on its plot.
STUDENTS = $(RUN)-distilled
distill: frontier
	$(BIN)/diffjax distill $(RUN) --workdir $(STUDENTS) --guidance 2
	$(BIN)/diffjax distill $(RUN) --workdir $(STUDENTS) --guidance 2 --method consistency
	$(BIN)/diffjax frontier $(foreach n,16 8 4 2 1 consistency,$(STUDENTS)/$(n)) --guidance 1,2 --seed 0,1,2 \
		--out $(RUN)/frontier
	$(BIN)/diffjax frontier $(STUDENTS)/any --sampler ddim --steps 4,8,20,50 --guidance 2 --seed 0,1,2 \
		--out $(RUN)/frontier
	$(BIN)/diffjax sample $(RUN) --guidance 2 --num 30 --out $(IMAGES)/distilled-teacher.png
	for n in 4 1; do \
		$(BIN)/diffjax sample $(STUDENTS)/$$n --guidance 2 --num 30 --out $(IMAGES)/distilled-$$n.png; done
	cp $(RUN)/frontier/frontier.png $(IMAGES)/frontier.png
	$(call insert,frontier,$(RUN)/frontier/frontier.md,digits)

# MNIST on CPUs. NPZ names a file of x and y; without it tensorflow-datasets downloads its own.
mnist: .venv/installed
	$(BIN)/diffjax train mnist_small $(if $(NPZ),--data.source npz --data.path $(NPZ)) --workdir runs/mnist-small
	mkdir -p $(IMAGES) && cp runs/mnist-small/curve.png $(IMAGES)/mnist-curve.png
	$(BIN)/diffjax sample runs/mnist-small --guidance 2 --num 30 --out $(IMAGES)/mnist.png
	$(BIN)/diffjax evaluate runs/mnist-small --sampler ddim:50 --guidance 2 --num 500 \
		--report runs/mnist-small/quality.md
	$(BIN)/diffjax frontier runs/mnist-small --sampler ddim,dpm_solver_pp_2m --steps 4,10,50 --guidance 1,2 \
		--num 250 --out runs/mnist-small/frontier
	cp runs/mnist-small/frontier/frontier.png $(IMAGES)/mnist-frontier.png
	$(call insert,quality,runs/mnist-small/quality.md,mnist)
	$(call insert,mnist-frontier,runs/mnist-small/frontier/frontier.md,mnist)

# The first student halves 16 steps, and stages are short, since each step takes a second.
mnist-distill: mnist
	$(BIN)/diffjax distill runs/mnist-small --workdir runs/mnist-distilled --guidance 2 --start 16 \
		--train.steps 400 --train.batch 32
	for n in 4 1; do $(BIN)/diffjax sample runs/mnist-distilled/$$n --guidance 2 --num 30 \
		--out $(IMAGES)/mnist-distilled-$$n.png; done
	$(BIN)/diffjax frontier $(foreach n,8 4 2 1,runs/mnist-distilled/$(n)) --guidance 1,2 --num 250 \
		--out runs/mnist-small/frontier
	cp runs/mnist-small/frontier/frontier.png $(IMAGES)/mnist-frontier.png
	$(call insert,mnist-frontier,runs/mnist-small/frontier/frontier.md,mnist)

# Fashion-MNIST on CPUs: a UNet and a DiT of pixels, and a DiT of the latents of an autoencoder. IDX names the folder of its
# files, where they are not where Debian puts them.
PATH_OF_IMAGES = $(if $(IDX),--data.path $(IDX))
fashion: .venv/installed
	$(BIN)/diffjax train fashion_unet $(PATH_OF_IMAGES) --workdir runs/fashion-unet
	$(BIN)/diffjax train fashion_dit $(PATH_OF_IMAGES) --workdir runs/fashion-dit
	$(BIN)/diffjax train fashion_autoencoder $(PATH_OF_IMAGES) --workdir runs/fashion-autoencoder
	$(BIN)/diffjax evaluate runs/fashion-autoencoder --num 2000 --report runs/fashion-autoencoder/quality.md
	$(BIN)/diffjax encode runs/fashion-autoencoder --out runs/fashion-latents
	$(BIN)/diffjax train fashion_latent_dit --workdir runs/fashion-latent-dit
	for run in unet dit latent-dit; do \
		$(BIN)/diffjax sample runs/fashion-$$run --guidance 2 --num 30 --out $(IMAGES)/fashion-$$run.png; done
	$(BIN)/diffjax frontier runs/fashion-unet runs/fashion-dit runs/fashion-latent-dit \
		--sampler ddim:50,dpm_solver_pp_2m:10 --guidance 1,2 --num 2000 --out runs/fashion-frontier

# Beside diffusers, where make parity has installed it.
bench: .venv-parity/installed
	.venv-parity/bin/diffjax bench networks --out runs/bench
	mkdir -p $(IMAGES) && cp runs/bench/bench.png $(IMAGES)/bench.png
	$(call insert,networks,runs/bench/bench.md,bench)

# The tables and pictures of docs/results that the digits and this machine give in minutes.
results: demo .venv/installed-test
	mkdir -p $(IMAGES) && cp $(RUN)/overview.png $(IMAGES)/
	$(BIN)/diffjax sample $(RUN) --guidance 2 --num 10 --animate $(IMAGES)/ddim.gif --out $(RUN)/ddim.png
	$(BIN)/diffjax edit reconstruct $(RUN) --num 32 --steps 10,20,50,100,200,500,1000 \
		--out $(IMAGES)/reconstruct.png --report $(RUN)/reconstruct.md
	$(BIN)/diffjax edit interpolate $(RUN) --num 8 --out $(IMAGES)/interpolate.png
	$(BIN)/diffjax edit vary $(RUN) --condition 8 --guidance 2 --out $(IMAGES)/vary.png
	$(BIN)/diffjax edit inpaint $(RUN) --out $(IMAGES)/inpaint.png
	$(BIN)/diffjax likelihood $(RUN) --report $(RUN)/bits.md
	$(BIN)/diffjax bench sampler --report $(RUN)/bench.md
	$(BIN)/diffjax bench training --report $(RUN)/training.md
	$(call insert,demo,$(RUN)/demo.md,digits)
	$(call insert,reconstruct,$(RUN)/reconstruct.md,digits)
	$(call insert,bits,$(RUN)/bits.md,digits)
	$(call insert,bench,$(RUN)/bench.md,bench)
	$(call insert,training,$(RUN)/training.md,bench)

# ------------------------------------------------------------------------------- checks

test: .venv/installed-test
	$(BIN)/python -m pytest --ignore tests/docs $(SHARED) $(TESTS)

test-fast: .venv/installed-test
	$(BIN)/python -m pytest -m "not slow" $(wildcard tests/test_*.py) tests/nn tests/data tests/devices $(SHARED) $(TESTS)

crash: .venv/installed-test
	KILLS=25 $(BIN)/python -m pytest tests/training/test_crash.py -k killed

mutants: .venv/installed-test
	$(BIN)/python -m tools.mutants $(MUTANTS)

parity: .venv-parity/installed
	.venv-parity/bin/python -m pytest -rs tests/test_parity.py tests/interop \
		tests/evaluation/test_metrics_parity.py tests/bench/test_networks.py::test_the_baseline_samples_the_same_images $(TESTS)

lint: .venv/installed-lint .venv/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyrefly check --python-interpreter-path $(BIN)/python

# The site, and every block of code and command line of the pages.
docs: .venv/installed-docs .venv/installed-test
	$(BIN)/mkdocs build --strict
	$(BIN)/python -m pytest tests/docs --deselect $(LESSON)

# It trains for minutes.
lesson: .venv/installed-test
	$(BIN)/python -m pytest $(LESSON)

clean:
	rm -rf .venv .venv-parity .pytest_cache .hypothesis .ruff_cache site

# ------------------------------------------------------------------------------- environments

INSTALL = -m pip install --quiet --disable-pip-version-check --editable

.venv/bin/python .venv-parity/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "diffjax needs Python 3.11 or newer: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)" >&2; exit 2; }
	$(PYTHON) -m venv $(@:%/bin/python=%)

.venv/installed: .venv/bin/python pyproject.toml
	$(BIN)/python $(INSTALL) .
	touch $@

.venv/installed-%: .venv/installed pyproject.toml
	$(BIN)/python $(INSTALL) '.[$*]'
	touch $@

# On its own: torch and diffusers must change nothing of what other targets run on.
.venv-parity/installed: .venv-parity/bin/python pyproject.toml
	.venv-parity/bin/python $(INSTALL) '.[test,parity]'
	touch $@
