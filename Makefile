# Two commands: `make demo` goes the whole way, `make test` checks what needs neither a GPU nor root, in about 15 minutes on two cores.
# Both set up .venv first; nothing is assumed but Linux, make and Python 3.11.5 or newer.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
export OMP_NUM_THREADS ?= 1
export HF_HUB_OFFLINE ?= 1

.PHONY: setup datasets/ablation demo test test-ray test-kernels test-gpu test-track test-browser bench-wire bench-loader bench-scale docs lint clean fuzz test-slurm test-slurm-short chaos ablation ablation-variants ablation-gpu

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("place: Python " + sys.version.split()[0] + " found, 3.11.5 or newer needed; call make PYTHON=python3.12" if sys.version_info < (3, 11, 5) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

# On CPU cores, also where there is a GPU: each of its two workers would want one. `make demo CUDA_VISIBLE_DEVICES=0,1` gives them two.
demo: export CUDA_VISIBLE_DEVICES =
demo: $(READY)
	rm -rf runs/demo
	$(BIN)/place prepare --source phantom --count 8000 --size-px 80 --split 0.9 0.03 0.07 --output datasets/demo
	$(BIN)/place pretrain --config configs/demo.yaml
	$(BIN)/place evaluate --run runs/demo --data datasets/demo --tasks all

test: $(READY)
	$(BIN)/pytest

# A standing Ray head with a token on this machine: jobs, their stop, doctor. About 2 minutes.
test-ray: $(READY)
	$(BIN)/pytest -m standing tests/cluster

# Every case of the kernels in Triton's interpreter, and compilation of each configuration for Hopper. About 10 minutes.
test-kernels: $(READY) build/triton36
	PLACE_TRITON_36=build/triton36 $(BIN)/pytest -m 'kernels and not gpu' tests/kernels

build/triton36: $(READY)
	$(BIN)/pip install --quiet --no-deps --upgrade --target $@ triton==3.6.0

# 20,000 mutated DICOM files and 20,000 of JPEG, PNG, XML and text: no crash, hang or full memory. About 5 minutes.
fuzz: $(READY)
	$(BIN)/pytest -m fuzz -s tests/data/test_fuzz.py

# Bytes on the wire of a step, ZeRO stage by stage, between machines in network namespaces (root, Linux). 8 minutes on busy cores.
bench-wire: $(READY)
	$(BIN)/python tests/rig/bench_wire.py --hosts 3 --output build/wire.json

# Samples a second of one core against image files, WebDataset and HDF5; time to resume; share of waiting. About 5 minutes.
bench-loader: $(READY)
	$(BIN)/python -m place.data.benchmark --output build/loader.json

# `place scale` on three machines: a ladder, a shaped network against the model, a machine that is cut off (root, Linux). 25 minutes.
bench-scale: $(READY)
	$(BIN)/python tests/rig/bench_scale.py --output build/scale

# Every case of the cluster run on three machines with a real Slurm (root, Debian; installs Slurm). About 30 minutes; stopped, it
# goes on where it was, as long as the commit is the same.
test-slurm: $(READY)
	PLACE_SLURM_PASSED=build/slurm-$$(git rev-parse --short HEAD).txt $(BIN)/pytest -m slurm tests/slurm

# One of these cases. About 2 minutes.
test-slurm-short: $(READY)
	$(BIN)/pytest -m slurm_short tests/slurm

# What each part of PLACE buys: rows of configs/ablation/main.yaml over seeds; stopped, it goes on where it was.
ablation: datasets/ablation
	$(BIN)/python -m place.evaluation.ablation configs/ablation/main.yaml

# What each choice within PLACE is worth, judged on the validation split; hours.
ablation-variants: datasets/ablation
	$(BIN)/python -m place.evaluation.ablation configs/ablation/variants.yaml

# The rows of the first at ViT-S and 224 px; needs a GPU. Not yet timed.
ablation-gpu: $(READY)
	$(BIN)/place prepare --source phantom --count 6000 --seed 3 --size-px 256 --split 0.8 0.1 0.1 --output datasets/ablation224
	$(BIN)/python -m place.evaluation.ablation configs/ablation/vits224.yaml --parallel 1

# Asked each time: a folder of other phantoms, such as those that were looked at before, is refused.
datasets/ablation: $(READY)
	$(BIN)/place prepare --source phantom --count 6000 --seed 3 --size-px 80 --split 0.8 0.1 0.1 --output $@

# Twenty random faults over one run. About 25 minutes.
chaos: $(READY)
	$(BIN)/pytest -m chaos -s tests/slurm

# Native equality of the kernels, 200 reruns, memory, the gate of the benchmark. About 5 minutes.
test-gpu: $(READY)
	$(BIN)/pytest -m gpu

# Weights & Biases and MLflow by their own packages, offline; installs the extra `track`. About 1 minute.
test-track: $(READY)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[track]'
	$(BIN)/pytest -m track tests/track

# The pages that PLACE writes, at 1,400 and 400 px in a headless Chromium, which must be there. About 1 minute.
test-browser: $(READY)
	$(BIN)/pytest -m browser

# The pages of docs/ into build/docs; they open from disk, without a network.
docs: $(READY)
	$(BIN)/mkdocs build --strict

lint: $(READY)
	$(BIN)/ruff check .
	rm -rf build/types/place
	mkdir -p build/types/place
	cd build/types/place && ln -s ../../../place/* ../../../cluster ../../../kernels .
	cd build/types && ../../$(BIN)/mypy --config-file ../../pyproject.toml

clean:
	rm -rf $(VENV) build *.egg-info
