# vitviz: `make setup` once, then `make test`; every target sets up what it needs.
PYTHON ?= python3
BIN := .venv/bin
SCENE := sample_images/scenes/star-ring.png
SCENE_CLASSES := star ring
BENCH ?=
SCALE ?=
WORKERS ?= 2
PYTEST_PARALLEL = $(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal

# Threads of torch that wait for work leave the processor to others meanwhile.
export OMP_WAIT_POLICY ?= PASSIVE

.DEFAULT_GOAL := help
.PHONY: help setup setup-lowest demo test test-slow test-long check coverage zoo bench scale census stub notebook figures screenshot browser docs format clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: .venv/installed  ## create .venv and install vitviz with its tools into it

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable . --group dev
	@touch $@

setup-lowest:  ## the same, with the lowest versions that pyproject.toml accepts
	$(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --quiet --upgrade pip uv
	$(BIN)/python -m uv pip compile --quiet --python $(BIN)/python --resolution lowest-direct \
		--no-deps --output-file .venv/lowest.txt pyproject.toml
	$(BIN)/python -m pip install --quiet --constraint .venv/lowest.txt --editable . --group dev
	@touch .venv/installed

demo: setup  ## explain the sample scenes with the bundled model, into vitviz-out/
	$(BIN)/vitviz relevance -m demo sample_images/scenes
	$(BIN)/vitviz compare -m demo $(SCENE) $(addprefix --class ,$(SCENE_CLASSES)) \
		--methods relevance --methods evidence

test: setup  ## run the quick tests, four minutes on two cores (WORKERS=4: on four)
	$(PYTEST_PARALLEL)

test-slow: setup  ## run the others: clusters, stores, browsers, kills, hostile folders, terminals
	$(PYTEST_PARALLEL) -m "slow and not long"

test-long: setup  ## run many times what these try a few times: kills, unseen scenes
	$(PYTEST_PARALLEL) -m long

check: setup  ## check format, lint and types, then run the quick and the slow tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	test -e .venv/lowest.txt || $(BIN)/mypy  # the lowest versions lack types
	$(PYTEST_PARALLEL) -m "not long"

coverage: .venv/coverage  ## tell which lines and branches no test runs
	$(BIN)/python -m coverage erase
	$(BIN)/python -m coverage run -m pytest -q -m "not long"
	$(BIN)/python -m coverage combine --quiet
	$(BIN)/python -m coverage report --show-missing --skip-covered

.venv/coverage: .venv/installed
	$(BIN)/python -m pip install --quiet --group coverage
	@touch $@

zoo: setup  ## prove the maps of every model of timm that is supported (long)
	$(BIN)/python -m pytest -q -s tests/sweep_zoo.py tests/sweep_stages.py

bench: .venv/benchmark  ## measure speed and memory against plain forwards (long; BENCH=--quick)
	$(BIN)/python -m tests.bench $(BENCH)

.venv/benchmark: .venv/installed
	$(BIN)/python -m pip install --quiet --group bench
	$(BIN)/python -m pip install --quiet --no-deps grad-cam ttach
	@touch $@

scale: setup  ## measure runs of 20,000 images here and on Ray, killed and disturbed (long)
	$(BIN)/python -m tests.scale $(SCALE)

stub: setup  ## write the signatures of the Python functions anew, for editors
	$(BIN)/python -m tests.stub

census: setup  ## judge every model of timm anew, for `vitviz models`
	$(BIN)/python -m vitviz.models.catalogue

notebook: setup  ## run docs/notebook.ipynb and show in it what its cells give
	$(BIN)/python -m tests.notebook

figures: setup  ## measure the bundled model on 500 scenes that it has never seen
	$(BIN)/python -m tests.demo_model.evaluate

screenshot: setup  ## draw the README's picture of a report anew (needs `make browser`)
	$(BIN)/python -m tests.report_figure

browser:  ## install Chromium and its driver for the tests of reports (as root, by apt-get)
	@command -v chromedriver >/dev/null || (apt-get -qq update \
		&& apt-get -qq install -y --no-install-recommends chromium chromium-driver) >/dev/null 2>&1 \
		|| echo "no chromedriver, and apt-get cannot install it here: tests that need it are skipped"

docs: setup  ## write the option tables of docs/commands.md from the commands
	$(BIN)/python -m tests.reference

format: setup  ## format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:  ## remove what was made here
	rm -rf .venv .bench .coverage* vitviz-out .pytest_cache .mypy_cache .ruff_cache
