# The first target to run makes a virtual environment with pinned packages; after that it costs nothing.
PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
READY := $(VENV)/.ready

.PHONY: demo setup test test-fast test-parity lint audit bench

demo: $(READY)
	$(PY) -m lslm_jax.main --config=configs/quickstart.py --workdir=runs/quickstart

setup: $(READY)

# Two processes suit two cores; a file's tests share what they compile. One that crashes ends the run: where it is
# replaced, pytest-xdist waits for ever at the end.
PYTEST := $(PY) -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder --max-worker-restart=0

test: $(READY)
	$(PYTEST) --ignore=tests/launch/test_schemas.py

test-fast: $(READY)
	$(PYTEST) -m "not slow" $(TESTS)

# Against Hugging Face transformers, EleutherAI's lm-eval, a bucket's emulator, and the schemas of Kubernetes and SkyPilot,
# which the project itself does not install; with models from the package index.
test-parity: $(READY)
	$(PY) -m pip install --quiet --disable-pip-version-check torch==2.13.0 transformers accelerate gguf peft lm-eval \
	  gcsfs gcp-storage-emulator google-cloud-storage google-cloud-storage-control
	$(PY) -m pytest -q -n 2 $(addprefix tests/convert/test_,parity.py check.py peft.py trained.py marian.py harness.py chat_parity.py) \
	  tests/launch/test_schemas.py tests/test_bucket.py

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
