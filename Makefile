# Two commands do everything from a fresh clone: `make demo` and `make test`.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check
STAMP := $(VENV)/.cpu-setup
GPU_VENV := .venv-gpu
GPU_STAMP := $(GPU_VENV)/.gpu-setup

.PHONY: setup setup-gpu demo test test-versions test-overlap test-media test-candidates test-campaign test-cuda-imports test-flashinfer-workspace lint bench paper docs clean test-reliability test-ray bench-cluster peers test-clients

setup: $(STAMP)

# PyTorch comes first and with its own dependencies, whatever build pip's index has for this
# machine; all else is pinned in the lock files and installed without following dependencies,
# because SGLang's own list would bring many gigabytes of CUDA libraries.
$(STAMP): requirements/cpu.txt requirements/torchvision.txt requirements/dev.txt pyproject.toml $(wildcard sgl_kernel_ext/cpu/csrc/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --constraint requirements/cpu.txt torch
	$(PIP) install --quiet --no-deps --requirement requirements/cpu.txt --requirement requirements/dev.txt
	$(PIP) install --quiet --no-deps --upgrade --target $(VENV)/torchvision --requirement requirements/torchvision.txt
	$(PIP) install --quiet --no-deps --no-build-isolation --editable .
	touch $@

# SGLang with CUDA, in an environment of its own: 9 GB. Needs a driver for CUDA 13 and, because
# FlashInfer compiles at first use, nvcc.
setup-gpu: $(GPU_STAMP)

$(GPU_STAMP): requirements/gpu.txt pyproject.toml
	test -x $(GPU_VENV)/bin/python || $(PYTHON) -m venv $(GPU_VENV)
	$(GPU_VENV)/bin/pip install --quiet --no-deps --requirement requirements/gpu.txt
	$(GPU_VENV)/bin/pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

demo: setup
	$(BIN)/python examples/demo.py

# Tests with an engine run one after the other, beside all others. One worker more than cores,
# because many tests wait for processes of theirs.
test: setup
	$(BIN)/python -m pytest --numprocesses 3 --no-loadscope-reorder

# The other releases of SGLang that are supported: what is compared at start, and the scheduler with
# our queues and cache inside. Each is unpacked beside the installed one.
OTHER_SGLANGS := 0.5.20 0.5.23
test-versions: $(OTHER_SGLANGS:%=test-sglang-%)

test-sglang-%: setup
	test -d $(VENV)/sglang-$* || $(PIP) install --quiet --no-deps --target $(VENV)/sglang-$* sglang==$*
	PYTHONPATH=$(CURDIR)/$(VENV)/sglang-$* $(BIN)/python -c \
		"import importlib.metadata as m; assert m.version('sglang') == '$*', m.version('sglang')"
	PYTHONPATH=$(CURDIR)/$(VENV)/sglang-$* $(BIN)/python -m pytest \
		test/runtime/test_guard.py test/runtime/test_scheduler.py test/runtime/test_side_queues.py

# What a GPU's defaults change: overlapped steps, mixed chunks, pages, two ranks; on the CPU engine.
test-overlap: setup
	$(BIN)/python test/end_to_end/overlap_engines.py --log test/logs/overlap-engines.log

# Lines with pictures and videos on tiny models of each family: tokens, cache, answers, bad media.
test-media: setup
	$(BIN)/python benchmark/runtime/media_counts.py --json benchmark/results/media-counts.json
	$(BIN)/python benchmark/runtime/media_job.py --json benchmark/results/media-job.json
	$(BIN)/python benchmark/runtime/media_faults.py --json benchmark/results/media-faults.json

# SGLang's CUDA build with everything of ours, without a GPU: a driver that fails every call.
test-cuda-imports: setup-gpu
	$(GPU_VENV)/bin/pip install --quiet --no-deps --requirement requirements/dev.txt
	$(GPU_VENV)/bin/python test/gpu/cuda_imports.py --log test/logs/cuda-imports.log

# FlashInfer's own planner never asks for more workspace than we give it; needs nvcc.
test-flashinfer-workspace: setup-gpu
	$(GPU_VENV)/bin/python test/gpu/flashinfer_workspace.py --log test/logs/flashinfer-workspace.log

# The GPU campaign on a CPU: tiny sizes, kernels in Triton's interpreter.
test-campaign: setup
	$(BIN)/python benchmark/gpu/campaign.py --dry-run --out $$(mktemp -d)

# Every setting that the Triton kernels try, compiled for three architectures.
test-candidates: setup
	$(BIN)/python test/kernels/candidate_resources.py --json test/logs/candidates.json

# LiteLLM, LangChain, instructor, llm and the newest OpenAI SDK, unmodified, against a server on a tiny model.
test-clients: setup
	test -x $(VENV)/clients/bin/python || $(BIN)/python -m venv $(VENV)/clients
	$(VENV)/clients/bin/pip --disable-pip-version-check install --quiet --no-deps \
		--requirement requirements/clients.txt
	$(BIN)/python test/clients/run_clients.py --log test/logs/clients.log

# What takes one to two hours: kills at random instants, storms of batches, odd requests, a backlog, a locked
# database. Each ends with a status of its own and leaves its result in benchmark/results.
test-reliability: setup
	$(BIN)/python benchmark/batch/kill_rounds.py --kills 1000 --real-kills 60 --workers 3 \
		--json benchmark/results/batch-kill.json
	$(BIN)/python benchmark/batch/storm.py --json benchmark/results/batch-storm.json
	$(PIP) install --quiet --no-deps --target $(VENV)/reliability --upgrade \
		--requirement requirements/reliability.txt
	PYTHONPATH=$(CURDIR)/$(VENV)/reliability $(BIN)/python benchmark/batch/fuzz_api.py \
		--requests 20000 --json benchmark/results/batch-fuzz.json
	$(BIN)/python benchmark/batch/backlog.py --json benchmark/results/batch-backlog.json
	$(BIN)/python benchmark/batch/locked.py --json benchmark/results/batch-locked.json

# Ray beside the pinned stack, without touching it: 80 MB in a folder of its own. About ten minutes.
test-ray: setup
	$(PIP) install --quiet --no-deps --target $(VENV)/ray --upgrade --requirement requirements/ray.txt
	PYTHONPATH=$(CURDIR)/$(VENV)/ray $(BIN)/python test/cluster/ray_nodes.py \
		--log test/logs/ray-nodes.log

bench-cluster: setup
	$(BIN)/python benchmark/cluster/two_engines.py
	$(BIN)/python benchmark/cluster/faults.py
	$(BIN)/python benchmark/cluster/coordinator.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: setup
	$(BIN)/python benchmark/planner/run.py
	$(BIN)/python examples/demo.py --json benchmark/results/demo-kv4096.json
	$(BIN)/python examples/demo.py --kv-tokens 16384 --json benchmark/results/demo-kv16384.json

# vLLM's CPU build and llama.cpp's server in environments of their own, then all engines in turn.
# PEERS chooses a part: make peers PEERS="--engines vllm blendserve --jobs demo --continue"
peers: setup
	$(BIN)/python benchmark/peers/install.py
	$(BIN)/python benchmark/peers/run.py $(PEERS)

# The paper's evaluation on the modelled engine: what is in the results already, of the sources as
# they are, is not run again.
paper: setup
	$(BIN)/python benchmark/simulator/worlds.py
	$(BIN)/python benchmark/simulator/run.py
	$(BIN)/python benchmark/simulator/ruled_out.py
	$(BIN)/python benchmark/simulator/paper.py

# The docs are Markdown; what can rot in them is checked: links, and the map of the house.
docs: setup
	$(BIN)/python -m pytest test/test_docs_map.py

clean:
	rm -rf $(VENV) $(GPU_VENV)
