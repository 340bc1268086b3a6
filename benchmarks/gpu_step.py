"""A whole step at Qwen2.5-VL-3B's real shape, with random weights: sampling, reflection, reference and update, ours fast and plain, and TRL's. Nothing is downloaded.

    python benchmarks/gpu_step.py                                      # on a GPU, all there is to measure: full, LoRA and four bits; each contender in a process of its own; commit the record
    python benchmarks/gpu_step.py --policies lora --contenders fast,plain --prompts 8 --checkpointing
    python benchmarks/gpu_step.py --tiny                               # on the CPU, a tiny shape: that the script works, no figures worth having

Random weights do the same work as trained ones. Prompts have 1,000 tokens, 784 of them the picture's, completions 300 (an end token that is never drawn), G = 8. Seconds are taken by CUDA
events around each phase, memory is the most that torch held in it (`max_memory_allocated`). MFU is the needed operations of the shared form (flops.py) over seconds and peak: removing waste cannot
raise it. Random completions cannot be read, so nothing in the step is reflected on; reflection is timed beside it, by `score`, on readable completions of about the same length.
A contender that runs out of memory is recorded as such.

Ours then makes 20 more steps, of which every loss and gradient has to be finite. Of policies held as training holds them (an adapter on bf16 weights, or fp32 weights that learn) the record also has what `emo-r3 plan` says of
the memory at each moment, and how long each phase would take at the device's limits: `emo-r3 plan` reads all records here by the name gpu_step*.json, and fits what it assumes to them. Not yet run on a GPU.
"""
import argparse
import json
import math
import shutil
import subprocess
import sys
import time
import warnings
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from tempfile import gettempdir

import torch

from contenders import Case, Ours, Phases, Trl, write
from flops import forward_cost, sampling_cost, step_cost, update_cost

from emo_r3.cost import Shape, known_gpu
from emo_r3.parsing import parse_set
from emo_r3.plan import LIMITS, Assumptions, memory_of, phases_of, recorded_run
from emo_r3.policy import EMBEDDED_POLICY
from emo_r3.reflection import reflect
from emo_r3.scenes import BOOK_COMPLETIONS
from emo_r3.config import CHOICES
from emo_r3.train import make_optimizer

warnings.filterwarnings("ignore")
QWEN_3B = {"text_config": {"hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16, "num_key_value_heads": 2, "vocab_size": 151_936, "max_position_embeddings": 128_000,
                           "rms_norm_eps": 1e-6, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}},
           "vision_config": {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 2048, "patch_size": 14, "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31]}}
TINY = {"text_config": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 1216, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}},
        "vision_config": {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64, "patch_size": 14, "window_size": 112, "fullatt_block_indexes": [1]}}
POLICIES = {"full": {}, "full_fp32": {"weights": "float32"}, "full_8bit": {"weights": "float32", "beta": 0.0}, "lora": {"lora_rank": 64, "weights": "bfloat16"}, "four_bit": {"lora_rank": 64, "four_bit": True, "weights": "bfloat16"}}
OURS_ALONE = ("full_fp32", "full_8bit")  # as ours holds weights that learn; the second with the 8-bit optimizer and without a reference, which is what 80 GB take
OPTIMIZERS = {"full_8bit": "paged_adamw_8bit", "four_bit": "paged_adamw_8bit"}  # the others: adamw


def model_folder(shape: dict, folder: Path, device: str) -> Path:
    "Writes a policy of a shape with random weights and the embedded policy's tokenizer, once; returns its folder."
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
    if (folder / "model_is_whole").exists(): return folder
    values = json.loads(Path(EMBEDDED_POLICY / "config.json").read_text())
    for part, replaced in shape.items(): values[part] |= replaced | {"dtype": "bfloat16"}
    values["text_config"].pop("layer_types", None)
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        with torch.device(device): model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**values))
    finally: torch.set_default_dtype(default)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"): shutil.copy(Path(EMBEDDED_POLICY / name), folder / name)
    pictures = json.loads(Path(EMBEDDED_POLICY / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps(pictures | {"patch_size": shape["vision_config"]["patch_size"]}))
    (folder / "model_is_whole").touch()
    return folder


class Clock(Phases):
    "Seconds and peak memory of each phase; on a GPU by events, which are read at the end."
    def __init__(self, device: str):
        super().__init__()
        self.on_gpu, self.peaks, self._marks = device != "cpu", {}, []

    def _mark(self):
        if not self.on_gpu: return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def __enter__(self):
        if self.on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        self._marks.append((None, self._mark()))
        return self

    def _settle(self) -> None:
        self._marks.append((self._open[-1], self._mark()))
        if self.on_gpu:
            self.peaks[self._open[-1]] = max(self.peaks.get(self._open[-1], 0), torch.cuda.max_memory_allocated())
            torch.cuda.reset_peak_memory_stats()

    def __exit__(self, *error):
        super().__exit__(*error)
        if self.on_gpu: torch.cuda.synchronize()
        for (_, before), (name, after) in zip(self._marks, self._marks[1:]):
            self.phases[name] = self.phases.get(name, 0) + (before.elapsed_time(after) / 1000 if self.on_gpu else after - before)


def readable(case: Case, words: int) -> list:
    "Returns well-formed completions, no two alike, whose first step is some words longer than the book's."
    text = BOOK_COMPLETIONS[0]
    return [parse_set(text.replace("key.", f"key, number {i}, in" + " the" * words + ".")) for i in range(case.prompts * case.num_generations)]


def measure(case: Case, contender: str, steps: int, optimizer: str, steady: int = 0) -> dict:
    "Runs one contender in this process: a step to warm up, then some; returns medians of seconds and peaks of memory by phase, and what became of some more steps of ours."
    if contender == "trl": runner = Trl(case, reflect=False, forced=True, steps=steps + 1)
    else: runner = Ours(case, contender == "fast", reflect=True, forced=True, steps=steps + 1)
    if contender == "trl" and optimizer != "adamw": runner.args.optim = {"adamw_8bit": "adamw_bnb_8bit"}.get(optimizer, optimizer)
    if contender != "trl" and optimizer != "adamw": runner.trainer.optimizer = make_optimizer(replace(runner.trainer.config, optimizer=optimizer), list(runner.trainer.learns.values()), say=False)
    clocks, current = [], None
    def turn():  # from one step to the next
        nonlocal current
        if current is not None:
            current.__exit__(None, None, None)
            clocks.append(current)
        current = Clock(case.device).__enter__()
        runner.watch(current)
    if contender == "trl": runner.run(steps + 1, between=turn)
    else:
        for _ in range(steps + 1):
            runner.step()
            turn()
    current.__exit__(None, None, None)  # nothing happened in this one
    seconds = {k: median(c.phases.get(k, 0) for c in clocks) for k in clocks[0].phases}
    if contender != "trl":
        written, asked = readable(case, case.completion_tokens // 3), [x for x in runner.examples[:case.prompts] for _ in range(case.num_generations)]
        for _ in range(2):
            with Clock(case.device) as clock, clock.phase("reflection, beside it"), runner.trainer.autocast(): reflect(written, asked, runner.trainer.judge, runner.trainer.weights, "score")
        seconds["reflection, beside it"] = clock.phases["reflection, beside it"]
        clocks.append(clock)
    more = {"steady": keep_on(runner, steady)} if contender != "trl" and steady else {}
    return more | {"seconds": seconds, "step_s": sum(v for k, v in seconds.items() if "beside" not in k), "peak_bytes": {k: max(c.peaks.get(k, 0) for c in clocks) for k in {k for c in clocks for k in c.peaks}}}


def keep_on(runner: Ours, steps: int) -> dict:
    "Makes some more steps; returns whether every loss and gradient was finite, and what they were."
    rows = [runner.step() for _ in range(steps)]
    column = lambda name: [r.get(name) for r in rows]
    numbers = [r.get(name, math.nan) for r in rows for name in ("loss", "grad_norm", "reward")]
    return {"steps": steps, "finite": all(map(math.isfinite, numbers)), "skipped_updates": sum(column("skipped_updates")), "loss": column("loss"), "grad_norm": column("grad_norm"), "kl": column("kl"),
            "sampling_logp_difference_max": max(column("sampling/sampling_logp_difference/max"))}


MOMENTS = {"sampling": ("sampling",), "reference": ("scoring",), "update": ("forward", "backward", "optimizer")}  # a phase's, as `emo-r3 plan` calls them


def planned(found: dict, case: Case, optimizer: str, shape: dict, gpu: str | None) -> dict:
    "Returns what the plan says of a case held as training holds it: bytes by phase, over what was measured where that is known, and the seconds at the device's limits."
    if case.weights != ("bfloat16" if case.lora_rank else "float32"): return {}
    config, model, sizes = recorded_run(asdict(case) | {"optimizer": optimizer}, shape)
    moments, device = memory_of(config, model, sizes).moments, known_gpu(gpu) if gpu else None
    memory = {phase: max(moments[m] for m in names) for phase, names in MOMENTS.items() if phase in found["seconds"]}
    out = {"bytes": memory, "over_measured": {phase: memory[phase] / size for phase, size in found["peak_bytes"].items() if phase in memory and size}}
    if device is None: return out
    limits = {name: p.seconds for name, p in phases_of(config, model, sizes, 1, device, replace(Assumptions(), **LIMITS)).items()}
    floor = {"sampling": limits["prefill"] + limits["decode"], "update": limits["update"], **({"reference": limits["reference"]} if "reference" in limits else {})}
    return out | {"floor_s": floor, "over_floor": {phase: found["seconds"][phase] / s for phase, s in floor.items() if s and found["seconds"].get(phase)}}


def figures(found: dict, case: Case, peak: float | None) -> dict:
    "Returns tokens and completions a second, and MFU by the needed operations of the shared form."
    from transformers import AutoConfig
    shape, seconds = Shape.of(AutoConfig.from_pretrained(case.policy)), found["seconds"]
    needed = {"update": update_cost(shape, case, case.prompt_tokens, weight_gradients=not case.lora_rank).total, "reference": forward_cost(shape, case, case.prompt_tokens).total,
              "sampling": sampling_cost(shape, case, case.prompt_tokens).total}
    out = {"needed_flop": needed, "sampled_tokens_per_s": case.prompts * case.num_generations * case.completion_tokens / seconds["sampling"], "completions_per_s": case.prompts * case.num_generations / found["step_s"]}
    return out | {"mfu": {k: v / seconds[k] / peak for k, v in needed.items() if seconds.get(k)}} if peak else out


def peak_of(device: str, given: float | None) -> float | None:
    "Returns the device's peak in operations a second, None where it is not known."
    if given: return given * 1e12
    gpu = known_gpu(torch.cuda.get_device_name()) if device != "cpu" else None
    return gpu.tflops * 1e12 if gpu and gpu.tflops else None


def in_a_process(case: Case, *rest: str | int) -> dict:
    command = [sys.executable, "-W", "ignore", __file__, "--one", json.dumps([asdict(case), *rest])]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 0: return json.loads(done.stdout.splitlines()[-1])
    if "OutOfMemoryError" in done.stderr: return {"out_of_memory": True}
    raise RuntimeError(f"{rest[0]}: exit code {done.returncode}\n{done.stderr[-3000:]}")


def line_of(row: dict) -> str:
    "Returns what to say of a row."
    if "seconds" not in row: return f"{row['policy']:10s} {row['contender']:6s} out of memory"
    few, plan, steady = lambda numbers, digits: {k: round(v, digits) for k, v in numbers.items()}, row.get("planned") or {}, row.get("steady")
    parts = [f"step {row['step_s']:.2f} s  {few(row['seconds'], 3)}", f"{row['sampled_tokens_per_s']:.0f} tokens/s sampled"]
    if row.get("mfu"): parts.append(f"MFU {few(row['mfu'], 3)}")
    if plan.get("over_floor"): parts.append(f"seconds over the device's limit {few(plan['over_floor'], 1)}")
    if row["peak_bytes"]: parts.append(f"peak GB {few({k: v / 1e9 for k, v in row['peak_bytes'].items()}, 1)}")
    if plan.get("over_measured"): parts.append(f"plan over peak {few(plan['over_measured'], 2)}{'' if all(abs(v - 1) <= 0.15 for v in plan['over_measured'].values()) else '  MORE THAN 15 % OFF'}")
    if steady: parts.append(f"{steady['steps']} steps more: {'all finite' if steady['finite'] and not steady['skipped_updates'] else 'NOT ALL FINITE'}")
    return f"{row['policy']:10s} {row['contender']:6s} " + "\n                  ".join(parts)


def main() -> None:
    "Measures, writes results/gpu_step.json."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a tiny shape on the CPU, short lengths")
    parser.add_argument("--policies", type=lambda t: t.split(","), default=list(POLICIES), help=", ".join(POLICIES))
    parser.add_argument("--contenders", type=lambda t: t.split(","), default=["fast", "plain", "trl"])
    parser.add_argument("--prompts", type=int, default=4, help="pictures a step")
    parser.add_argument("--num-generations", type=int, default=8, help="G")
    parser.add_argument("--prompt-tokens", type=int, default=1000)
    parser.add_argument("--side", type=int, default=28, help="a picture's edge in image tokens")
    parser.add_argument("--completion-tokens", type=int, default=300)
    parser.add_argument("--tokens-per-forward", type=int, default=4096)
    parser.add_argument("--weights", default="bfloat16", choices=("float32", "bfloat16"), help="in which a fully trained policy is held; float32 is what ours trains by default")
    parser.add_argument("--optimizer", choices=CHOICES["optimizer"], help="of all policies (default: paged_adamw_8bit for full_8bit and four_bit, adamw for the others)")
    parser.add_argument("--checkpointing", action=argparse.BooleanOptionalAction, default=True, help="recompute layers in the backward pass, as the recipes do")
    parser.add_argument("--freeze-vision", action="store_true")
    parser.add_argument("--beta", type=float, default=0.01)
    parser.add_argument("--steps", type=int, default=3, help="after one to warm up")
    parser.add_argument("--steady", type=int, default=20, help="steps of ours after these, which have to stay finite; 0: none")
    parser.add_argument("--peak-tflops", type=float, help="the device's dense bf16 peak, where the script does not know it")
    parser.add_argument("--folder", type=Path, default=None, help="where the random policy is written; kept for the next run")
    parser.add_argument("--output", default=None, help="name of the file in benchmarks/results; gpu_step, or gpu_step_tiny")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        case, *rest = json.loads(args.one)
        return print(json.dumps(measure(Case(**case), *rest)))
    if unknown := [p for p in args.policies if p not in POLICIES]: parser.error(f"--policies: {unknown[0]!r}; allowed: {', '.join(POLICIES)}")
    if args.tiny: args.prompts, args.num_generations, args.prompt_tokens, args.side, args.completion_tokens, args.steps, args.steady = 1, 4, 150, 4, 6, 1, min(args.steady, 3)
    device = "cpu" if args.tiny else "cuda"
    if device == "cuda" and not torch.cuda.is_available(): parser.error("no GPU here; --tiny runs a tiny shape on the CPU")
    folder = model_folder(TINY if args.tiny else QWEN_3B, args.folder or Path(gettempdir()) / f"emo_r3_random_{'tiny' if args.tiny else '3b'}", device)
    base = Case(args.prompts, args.num_generations, args.prompt_tokens, args.completion_tokens, args.side, args.freeze_vision, args.beta, args.tokens_per_forward, policy=str(folder), device=device,
                weights=args.weights, precision="fp32" if args.tiny else "bf16", gradient_checkpointing=args.checkpointing)
    if args.tiny: base = replace(base, weights="float32")
    rows, peak = [], peak_of(device, args.peak_tflops)
    name, shape = None if args.tiny else torch.cuda.get_device_name(), TINY if args.tiny else QWEN_3B
    for policy in args.policies:
        case, optimizer = replace(base, **POLICIES[policy]), args.optimizer or OPTIMIZERS.get(policy, "adamw")
        if args.tiny: case = replace(case, weights="float32", lora_rank=min(case.lora_rank, 4))
        for contender in args.contenders:
            if policy in OURS_ALONE and contender != "fast": continue
            found = in_a_process(case, contender, args.steps, optimizer, args.steady if contender == "fast" else 0)
            if "seconds" in found: found |= figures(found, case, peak)
            if "seconds" in found and contender == "fast": found["planned"] = planned(found, case, optimizer, shape, name)
            rows.append({"policy": policy, "contender": contender, "case": asdict(case) | {"policy": folder.name}, "optimizer": optimizer, **found})
            print(line_of(rows[-1]), flush=True)
    gpu = None if args.tiny else {"name": name, "cuda": torch.version.cuda, "peak_flop_per_s": peak}
    awaits = {"awaits": "a GPU: these figures are a tiny shape's on a CPU and say only that the script works"} if args.tiny else {}
    print(write(args.output or ("gpu_step_tiny" if args.tiny else "gpu_step"), " ".join(["python", "benchmarks/gpu_step.py", *sys.argv[1:]]), gpu=gpu, rows=rows, **awaits))


if __name__ == "__main__": main()
