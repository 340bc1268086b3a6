"""How near vLLM's engine comes to the policy that it copies, by kind of policy, and what the probe sees of a transfer that was forgotten.

    .venv-vllm/bin/python -W ignore benchmarks/vllm_cpu.py          (`make bench-vllm`; the environment: tools/vllm_cpu_env.sh)

Writes results/vllm_cpu.json: the embedded policy, vLLM's engine on a CPU. Differences, not speed: what is fast on a CPU says nothing about a GPU."""
import argparse
import json
import sys
import time
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from statistics import median

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from emo_r3.data import EMOSET8  # noqa: E402
from emo_r3.experiments import machine  # noqa: E402
from emo_r3.policy import add_lora, completion_logps, load_policy, load_processor  # noqa: E402
from emo_r3.prompts import coherence_messages, consistency_messages, set_messages  # noqa: E402
from emo_r3.sampling import PolicyJudge  # noqa: E402
from emo_r3.scenes import make_scenes  # noqa: E402
from emo_r3.vllm_sampler import StaleWeights, VLLMSampler  # noqa: E402

SIZES = [(96, 96), (160, 96), (60, 150), (97, 101)]
KINDS = {"full, float32": {}, "LoRA as adapter, float32": {"lora": True}, "LoRA merged, float32": {"lora": True, "merged": True}, "four bits + LoRA, float32": {"lora": True, "four_bit": True}, "full, bfloat16": {"bf16": True},
         "LoRA as adapter, bfloat16": {"lora": True, "bf16": True}, "LoRA merged, bfloat16": {"lora": True, "merged": True, "bf16": True}}


@torch.no_grad()
def move(policy, seed: int, size: float) -> None:
    "Moves every weight that learns by `size` in the direction of a coin's throw, as AdamW's first update does with its learning rate."
    gen = torch.Generator().manual_seed(seed)
    for p in policy.parameters():
        if p.requires_grad: p.add_(size * torch.randn(p.shape, generator=gen).sign())


def measure(lora: bool = False, merged: bool = False, four_bit: bool = False, bf16: bool = False) -> dict:
    "Returns the differences of one kind of policy."
    processor, policy = load_processor(max_pixels=2 * 9216), load_policy(four_bit=four_bit)
    if lora: policy = add_lora(policy, 8, 16.0)
    move(policy, 0, 1e-3)
    asked = [set_messages(x.question, x.image.resize(SIZES[i % 4])) for i, x in enumerate(make_scenes("in_domain", "train", 8))]
    questions = [consistency_messages(m[0]["content"][0]["image"], "A ghost stands out.") for m in asked] + [coherence_messages("A ghost stands out.", "A viewer would shiver.", EMOSET8)]
    answers = [("Yes", "No")] * len(asked) + [EMOSET8.labels]
    sampler = VLLMSampler(policy, processor, ({"lora": "merged"} if merged else {}) | ({"dtype": "bfloat16"} if bf16 else {}))
    off, probes, syncs, stale = [], [], [], {}
    computed = lambda: torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext()  # as an update computes; entered anew each time, for it remembers casts of weights
    for step in range(3):
        with computed(): r = sampler.sample(asked, 8, 48, 1.0, seed=step)
        with computed(), torch.no_grad(): again = completion_logps(policy, *r.rows(torch.arange(64)), 1.0)
        off.append((again.float() - r.logps).abs()[r.completion_mask.bool()])
        probes.append(sampler.gap)
        syncs.append(sampler.sync_s)
        move(policy, step + 1, 1e-4)
        sampler.learned()
    with computed(): scores, theirs = sampler.score(questions, answers), PolicyJudge(policy, processor).score(questions, answers)
    differ = lambda row: [v - row[0] for v in row]  # only differences within a question count
    judged = max(abs(a - b) for x, y in zip(scores, theirs) for a, b in zip(differ(x), differ(y)))
    same = sum(x.index(max(x)) == y.index(max(y)) for x, y in zip(scores, theirs))
    for size in (1e-6, 1e-5, 1e-4, 1e-3):  # learning rates
        sampler.learned()
        with computed(), sampler.awake(): pass
        move(policy, 9, size)
        sampler.learned()
        real, sampler.engine.take = sampler.engine.take, lambda policy: None  # forgotten
        try:
            with computed(), sampler.awake(): stale[f"{size:g}"] = {"refused": False, "probe": sampler.gap}
        except StaleWeights as error: stale[f"{size:g}"] = {"refused": True, "why": "same bits" if "to the bit" in str(error) else "above the bound"}
        sampler.engine.take = real
    sampler.close()
    off = torch.cat(off)
    return {"tokens": len(off), "logp_mean": off.mean().item(), "logp_p99": off.quantile(0.99).item(), "logp_max": off.max().item(), "probe": max(probes), "reflection_max": judged, "verdicts_equal": f"{same} of {len(scores)}", "sync_s": median(syncs), "forgotten": stale}


def main() -> None:
    "Measures each kind, in this process one after another, and writes the record."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="vllm_cpu")
    args, found = parser.parse_args(), {}
    began = time.perf_counter()
    for name, kind in KINDS.items():
        found[name] = measure(**kind)
        print(name, json.dumps(found[name]), flush=True)
    target = ROOT / "benchmarks" / "results" / f"{args.output}.json"
    packages = {"vllm-cpu": version("vllm-cpu"), "torchvision": version("torchvision")}
    target.write_text(json.dumps({"command": "make bench-vllm", "machine": machine() | packages, "wall_s": round(time.perf_counter() - began), "kinds": found}, indent=1) + "\n")
    print(target.relative_to(ROOT))


if __name__ == "__main__": main()
