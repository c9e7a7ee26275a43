# Two commands do everything: `make demo` and `make test`. Both begin by making .venv.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test test-fast lint format bench slurm clean
.DELETE_ON_ERROR:

demo: $(VENV)/.installed  ## train, score and compare the paper's methods on the generated world
	$(BIN)/bfpo-exp -m experiment=methods

# Two tests at a time.  The long ones start processes of their own, whose idle threads are not to hold a core.
test: $(VENV)/.installed-dev lint slurm  ## every check and every test
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadscope -m "not slow and not slurm"
	OMP_WAIT_POLICY=PASSIVE $(BIN)/pytest -n 2 --dist loadgroup --durations 15 -m "slow or slurm"

test-fast: $(VENV)/.installed-dev  ## the tests that take seconds
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadscope -m "not slow and not slurm"

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.installed-dev  ## our step beside TRL's, and how its cost grows, on this machine
	$(BIN)/python -m benchmarks

SLURM_PACKAGES := munge slurmctld slurmd slurm-client

slurm:  ## a real SLURM for its tests, where this user may install one; elsewhere they skip and say why
	@if ! dpkg --status $(SLURM_PACKAGES) >/dev/null 2>&1 && [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  apt-get update -qq && DEBIAN_FRONTEND=noninteractive \
	  apt-get install -qq --yes --no-install-recommends $(SLURM_PACKAGES) >/dev/null || \
	  echo "SLURM could not be installed; its tests are skipped"; fi

# torch first and alone: pip then takes the build that suits the machine (CPU or CUDA).
$(VENV)/.installed: pyproject.toml constraints.txt
	$(or $(shell command -v $(PYTHON)),python3) -m venv $(VENV)
	$(PIP) torch==2.13.0
	$(PIP) --editable .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) dist build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
