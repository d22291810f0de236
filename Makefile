# The first target to run makes a virtual environment with pinned packages; after that it costs nothing.
PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
READY := $(VENV)/.ready

.PHONY: demo setup test test-fast test-all test-parity test-faults parity-packages lint audit bench

demo: $(READY)
	$(PY) -m lslm_jax.main --config=configs/quickstart.py --workdir=runs/quickstart
	@echo "next: source $(VENV)/bin/activate, then: python -m lslm_jax.main generate --workdir=runs/quickstart" >&2

setup: $(READY)

# One worker more than cores, since some tests wait for processes; a file's tests share what they compile. A worker that
# crashes ends the run: where it is replaced, pytest-xdist waits for ever at the end.
WORKERS ?= $(shell cores=$$(getconf _NPROCESSORS_ONLN); echo $$(( cores < 8 ? cores + 1 : 8 )))
PYTEST := $(PY) -m pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder --max-worker-restart=0
ELSEWHERE := tests/launch/test_schemas.py
PARITY := $(addprefix tests/convert/test_,parity.py parity_check.py peft.py trained.py marian.py harness.py chat_parity.py \
  keys_parity.py tokenizer_parity.py generation_parity.py pipelines.py) \
  tests/launch/test_schemas.py tests/runtime/test_bucket.py

# The whole specification in its fast form. SEED=N runs it in a random order.
test: $(READY)
	$(PYTEST) -m "not exhaustive" --ignore=$(ELSEWHERE) $(if $(SEED),--random-order --random-order-seed=$(SEED)) $(ARGS)

test-fast: $(READY)
	$(PYTEST) -m "not slow and not exhaustive" $(TESTS)

# Everything: also the long forms (more meshes, kills, flipped bits, a longer chaos campaign) and all of test-parity.
test-all: $(READY)
	$(PYTEST) --ignore=$(ELSEWHERE) $(ARGS)
	$(MAKE) test-parity

# Against Hugging Face transformers, EleutherAI's lm-eval, a bucket's emulator, and the schemas of Kubernetes and SkyPilot,
# which the project itself does not install; with models from the package index. FUZZ=200 perturbs each family's settings
# so many times, which takes hours.
# SELECT="--changed-since=REVISION --share=K/N" runs what depends on a change, and a share of the rest, in the fast form.
test-parity: parity-packages
	$(PY) -m pytest -q -n $(WORKERS) $(PARITY) $(if $(SELECT),-m "not exhaustive" $(SELECT))

# Plants faults of one line in copies of the package; each must be caught.
test-faults: $(READY)
	$(PY) tests/planted_faults.py

parity-packages: $(READY)
	$(PY) -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(PY) -m pip install --quiet --disable-pip-version-check transformers accelerate gguf peft lm-eval \
	  gcsfs gcp-storage-emulator google-cloud-storage google-cloud-storage-control

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pyright --pythonpath $(PY)

# Known vulnerabilities of the pinned packages; asks a public service, hence no part of the tests.
audit: $(READY)
	$(PY) -m pip install --quiet --disable-pip-version-check pip-audit
	set -e; for pins in constraints/*.txt; do $(PY) -m pip_audit --strict --no-deps --disable-pip -r $$pins; done

bench: $(READY)
	set -e; for script in start input loop train_step decode checkpoint; do $(PY) benchmarks/$$script.py; done

$(READY): pyproject.toml constraints/py311.txt constraints/py312.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "lslm_jax needs Python 3.11 or newer, and $(PYTHON) is not; try: make PYTHON=python3.12" >&2; exit 1; }
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV): one to four minutes, once"
	@$(PY) -m pip install --quiet --disable-pip-version-check --editable '.[dev]' \
	  --constraint constraints/$$($(PY) -c 'import sys; print("py311" if sys.version_info < (3, 12) else "py312")').txt
	@touch $@
