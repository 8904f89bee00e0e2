# `make help` lists what can be asked for. Every target first makes .venv from the
# lock if it is not there yet (.ci/setup).
SHELL := bash
.DEFAULT_GOAL := help
.PHONY: help venv reproduce miniature publish readme drawings course grade otter book \
  slides lab test bench gpu check environment notebooks strip lock clean

PROFILE ?= quick
CORES ?= $(shell nproc 2>/dev/null || sysctl -n hw.ncpu)
CLUSTER ?=
MINUTES ?= 25
ARGS ?=
# recipes take these from the environment, where quotes and spaces are only characters
export PROFILE CORES CLUSTER MINUTES
RUNS := "$${PRUNING_RUNS:-data/runs}"

# `python3` of a Jupyter kernel, `papermill` of a rule: those of .venv, always
export PATH := $(CURDIR)/.venv/bin:$(PATH)
unexport PYTHONPATH PYTHONHOME
export PYTHON

help:  ## this list
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | \
	  while IFS=$$'\t' read -r name text; do \
	    printf '  make %-10s %s\n' "$$name" "$$text"; done
	@echo '  PROFILE=quick|cifar10_cpu  CORES=processors to use  CLUSTER=slurm'
	@echo '  ARGS="more arguments"  PYTHON=the Python that .venv is made with'

venv:
	@.ci/setup

reproduce: venv  ## run a profile (PROFILE=quick) and print its table; resumes
	@.venv/bin/python .ci/reproduce.py "$$PROFILE" \
	  $(if $(CLUSTER),--cluster "$$CLUSTER",--cores "$$CORES") $(ARGS)

miniature: venv  ## PROFILE=imagenet or cifar10 in small, on generated pictures
	@.venv/bin/python .ci/miniature.py "$$PROFILE" --cores "$$CORES" $(ARGS)

publish: venv  ## copy a finished profile's figures and rows to where they are committed
	@.venv/bin/python .ci/publish.py --profile "$$PROFILE" --publish

readme: venv  ## write the measured parts of README.md from the committed rows
	@.venv/bin/python .ci/readme.py

drawings: venv  ## draw notebooks/drawings/*.py anew, into figures/drawings
	@.venv/bin/python .ci/drawings.py

course: venv  ## student and teacher versions of the notebooks, below data/runs/course
	@.venv/bin/python .ci/course.py $(if $(OUT),--out '$(OUT)') $(ARGS)

grade: venv  ## run the checks of students' notebooks (BOOKS="..."), print points
	@.venv/bin/python .ci/course.py --grade $(BOOKS)

otter: course  ## the same for otter-grader (BOOKS="notebooks/*.ipynb"), course/otter
	@.ci/otter $(or $(OUT),$(RUNS)/course) $(BOOKS)

book:  ## the notebooks as a book, below data/runs/book (needs npm the first time)
	@.ci/setup book
	@.venv/bin/python .ci/book.py book $(if $(OUT),--out '$(OUT)')

slides:  ## the same as slides for a lecture, below data/runs/slides
	@.ci/setup book
	@.venv/bin/python .ci/book.py slides $(if $(OUT),--out '$(OUT)')

lab: venv  ## open the notebooks in JupyterLab
	@jupyter lab --LabApp.default_url=/lab/tree/notebooks $(ARGS)

# one run for both, on one thread a process; a fresh folder keeps tests away from yours
test: venv  ## unit tests, and every committed notebook against its outputs
	@runs=$$(mktemp -d) && trap 'rm -rf "$$runs"' EXIT && \
	PRUNING_RUNS=$$runs TQDM_DISABLE=1 OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 \
	  .venv/bin/python -m pytest -q -n "$$CORES" --no-loadscope-reorder \
	  tests notebooks --ignore=tests/benchmarks --nbval-lax --nbval-current-env \
	  --nbval-cell-timeout=600 --nbval-kernel-startup-timeout=120 \
	  $(if $(MAKE_TERMOUT),,--color=no) $(ARGS)

bench:  ## speed and comparison scripts in tests/benchmarks
	@.ci/setup bench
	@for script in tests/benchmarks/[a-z]*.py; do \
	  echo "== $$script"; .venv/bin/python "$$script" $(ARGS) || exit 1; done

# also where there is no more than torch, torchvision and Triton: no venv is made for it
gpu:  ## checks, times and blocks of the comparison that need a GPU (MINUTES=25)
	@python=.venv/bin/python; [ -x $$python ] || python=python3; \
	  $$python tests/gpu/run.py --minutes "$$MINUTES" $(ARGS)

check: venv  ## style, form and types of library, tests and notebooks
	@ruff check lib tests notebooks .ci
	@ruff format --check --quiet lib tests .ci || \
	  { echo 'check: `.venv/bin/ruff format lib tests .ci` mends the form'; exit 1; }
	@.venv/bin/python .ci/check_types.py

environment: venv  ## versions and device, for a report of a fault
	@.venv/bin/python -m lib.settings

# committed notebooks are executed ones: in order, from nothing, without run metadata;
# `make publish` then copies their figures
notebooks: venv  ## execute the notebooks anew, in place, as they are committed
	@rm -rf $(RUNS)/quick; for book in notebooks/[0-9]*.ipynb; do \
	  echo "$$book"; TQDM_DISABLE=1 papermill "$$book" "$$book" -k python3 \
	    --no-progress-bar --log-level ERROR || exit 1; done
	@$(MAKE) --no-print-directory strip

strip:  # what differs from one execution to the next
	@nbstripout --keep-output --keep-count --drop-empty-cells --extra-keys \
	  "metadata.widgets metadata.papermill cell.metadata.papermill cell.metadata.execution" \
	  notebooks/[0-9]*.ipynb

lock:  ## write requirements.lock anew from pyproject.toml (needs uv)
	@uv pip compile pyproject.toml --extra test --extra bench --extra deploy --extra book \
	  --extra gpu --extra cluster --universal --python-version 3.11 \
	  --fork-strategy fewest --no-header \
	  --no-annotate --no-emit-index-url --quiet -o requirements.lock

clean:  ## forget the runs of a profile (PROFILE=quick); data sets stay
	@case "$$PROFILE" in ''|*/*|.*) echo 'clean: PROFILE must be a name'; exit 1;; esac; \
	  echo "removing" $(RUNS)"/$$PROFILE"; rm -rf -- $(RUNS)/"$$PROFILE"
