"""Memory by part and moment as torch allocates it on a CPU: a whole step of a Qwen2.5-VL of middling size with random weights. Page 15b holds its formulas against it.

    python benchmarks/memory.py                       # all cases that the record does not have yet, each in a process of its own; a minute a case at most, 30 in all
    python benchmarks/memory.py --ways lora --shapes long --output memory_lora

What is held all the time is counted in the tensors that are there; what comes on top at each moment by torch's profiler, which sees every block that its CPU allocator hands out and takes
back: the running sum since the step began, and its maximum between the marks that this script sets around the real trainer's sampling, scoring, passes and optimizer, and around answers to
some pictures at once, as in an evaluation. A GPU's allocator rounds and keeps blocks, and its kernels need other scratch: what is measured here is what a program asks for, and `plan` keeps a
reserve for the rest.
"""
import argparse
import json
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

import emo_r3.train as ours
from contenders import RESULTS, Case, Ours, in_a_process, write
from gpu_step import model_folder

from emo_r3.plan import memory_of, recorded_run

warnings.filterwarnings("ignore")
MIDDLING = {"text_config": {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 3, "num_key_value_heads": 1, "vocab_size": 8192, "rms_norm_eps": 1e-6,
                            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}},
            "vision_config": {"depth": 4, "hidden_size": 320, "intermediate_size": 856, "num_heads": 4, "out_hidden_size": 384, "patch_size": 14, "window_size": 112, "fullatt_block_indexes": [1, 3]}}
WAYS = {"full": {}, "full, fp32": {"precision": "fp32"}, "full, vision frozen": {"freeze_vision": True}, "lora": {"lora_rank": 16, "weights": "bfloat16", "freeze_vision": True},
        "four_bit": {"lora_rank": 16, "four_bit": True, "weights": "bfloat16", "freeze_vision": True}}
SHAPES = {"usual": {"prompts": 2, "num_generations": 8, "prompt_tokens": 228, "completion_tokens": 48, "side": 8}, "long": {"prompts": 1, "num_generations": 4, "prompt_tokens": 228, "completion_tokens": 128, "side": 8},
          "wide": {"prompts": 2, "num_generations": 4, "prompt_tokens": 560, "completion_tokens": 24, "side": 20}}
EVALUATED = 8  # pictures that are answered at once


def peaks(run: Callable[[], object]) -> dict[str, int]:
    "Runs something; returns for each moment that it marked the most bytes that were allocated then and not before the beginning."
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen: run()
    events = seen.profiler.kineto_results.events()
    spans = [(e.name().removeprefix("moment "), e.start_ns(), e.start_ns() + e.duration_ns()) for e in events if e.name().startswith("moment ")]
    changes, found, now = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"), {}, 0
    for at, size in changes:
        now += size
        for name, begin, end in spans:
            if begin <= at <= end: found[name] = max(found.get(name, 0), now)
    return found


def marked(stack: ExitStack, owner: object, name: str, moment: Callable[[], str]) -> None:
    "Sets marks around a method until the stack closes."
    original = getattr(owner, name)
    def watched(*args, **kwargs):
        with record_function(f"moment {moment()}"): return original(*args, **kwargs)
    setattr(owner, name, watched)
    stack.callback(setattr, owner, name, original)


def held(tensors: Iterable[torch.Tensor]) -> int:
    "Returns the bytes under some tensors, each storage once."
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def weight_tensors(model: torch.nn.Module) -> list[torch.Tensor]:
    "Returns a model's weights, with what NF4 needs beside its four bits."
    out = list(model.parameters())
    for p in out[:]:
        if (state := getattr(p, "quant_state", None)) is not None: out += [state.absmax] + ([state.state2.absmax] if state.nested else [])
    return out


def measure(case: Case) -> dict:
    "Returns a step's memory as torch allocates it, a step to warm up before."
    runner = Ours(case, True, reflect=False, forced=True, steps=EVALUATED)
    trainer = runner.trainer
    for group in trainer.optimizer.param_groups: group["foreach"] = True  # as on a GPU, where AdamW takes all weights at once; on a CPU one after the other
    runner.step()
    frozen = trainer.reference if trainer.reference is not trainer.policy else None
    parts = {"weights": held(weight_tensors(trainer.policy)), "optimizer": held([v for state in trainer.optimizer.state.values() for v in state.values() if torch.is_tensor(v)]),
             "reference": held(weight_tensors(frozen)) if frozen is not None else 0}
    def answer():
        with record_function("moment evaluation"), trainer.autocast(): trainer.sampler.sample(ours.asked(trainer, runner.examples[-EVALUATED:]), 1, case.completion_tokens, 0.0)
    with ExitStack() as stack:
        marked(stack, trainer.sampler, "sample", lambda: "sampling")
        marked(stack, ours, "row_logps", lambda: "forward" if torch.is_grad_enabled() else "scoring")
        marked(stack, torch.Tensor, "backward", lambda: "backward")
        marked(stack, trainer.optimizer, "step", lambda: "optimizer")
        step = peaks(runner.step)
    trainer.pictures.clear()
    return {"held": parts, "on_top": step | peaks(answer)}


def main() -> None:
    "Measures, writes results/memory.json after each case."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ways", type=lambda t: t.split(";"), default=list(WAYS), help="with ; between them: " + "; ".join(WAYS))
    parser.add_argument("--shapes", type=lambda t: t.split(","), default=list(SHAPES), help=", ".join(SHAPES))
    parser.add_argument("--output", default="memory", help="name of the file in benchmarks/results; a case that it has is not measured again")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one: return print(json.dumps(measure(Case(**json.loads(args.one)))))
    target = RESULTS / f"{args.output}.json"
    rows = json.loads(target.read_text())["rows"] if target.exists() else []
    for option, known in (("ways", WAYS), ("shapes", SHAPES)):
        if unknown := [x for x in getattr(args, option) if x not in known]: parser.error(f"--{option}: {unknown[0]!r}; allowed: {', '.join(known)}")
    with tempfile.TemporaryDirectory() as folder:
        policy = model_folder(MIDDLING, Path(folder) / "middling", "cpu")
        for way in args.ways:
            for shape in args.shapes:
                for again in (False, True):
                    case = replace(Case(policy=str(policy), precision="bf16", gradient_checkpointing=again, tokens_per_forward=100_000), **SHAPES[shape] | WAYS[way])
                    named = asdict(case) | {"policy": "middling", "evaluated": EVALUATED}
                    if any(r["case"] == named for r in rows): continue
                    rows.append({"way": way, "shape": shape, "case": named, **in_a_process(__file__, ["--one", json.dumps(asdict(case))])})
                    config, model, sizes = recorded_run(rows[-1]["case"], MIDDLING)
                    m = memory_of(config, model, sizes)
                    said = {f"{k}:": (getattr(m, k), v) for k, v in rows[-1]["held"].items() if v} | {k: (m.moments[k] - m.always + m.features, v) for k, v in rows[-1]["on_top"].items()}
                    print(f"{way:20s} {shape:6s} {'again' if again else 'kept':6s} MB measured (by the formula): " + "  ".join(f"{k} {v / 1e6:.1f} ({f / 1e6:.1f})" for k, (f, v) in said.items()), flush=True)
                    write(args.output, " ".join(["python", "benchmarks/memory.py", *sys.argv[1:]]), shape=MIDDLING, rows=rows)
    print(target)


if __name__ == "__main__": main()
