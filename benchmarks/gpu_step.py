"""A whole step at Qwen2.5-VL-3B's real shape, with random weights: sampling, reflection, reference and update, ours fast and plain, and TRL's. Nothing is downloaded.

    python benchmarks/gpu_step.py                                      # on a GPU: full, LoRA and four bits; each contender in a process of its own
    python benchmarks/gpu_step.py --policies lora --contenders fast,plain --prompts 8 --checkpointing
    python benchmarks/gpu_step.py --tiny                               # on the CPU, a tiny shape: that the script works, no figures worth having

Random weights do the same work as trained ones. Prompts have 1,000 tokens, 784 of them the picture's, completions 300 (an end token that is never drawn), G = 8. Seconds are taken by CUDA
events around each phase, memory is the most that torch held in it (`max_memory_allocated`). MFU is the needed operations of the shared form (flops.py) over seconds and peak: removing waste cannot
raise it. Random completions cannot be read, so nothing in the step is reflected on; reflection is timed beside it, by `score`, on readable completions of about the same length.
A contender that runs out of memory is recorded as such.
"""
import argparse
import json
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

from emo_r3.groups import Shape
from emo_r3.parsing import parse_set
from emo_r3.policy import EMBEDDED_POLICY
from emo_r3.reflection import reflect
from emo_r3.scenes import BOOK_COMPLETIONS

warnings.filterwarnings("ignore")
QWEN_3B = {"text_config": {"hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16, "num_key_value_heads": 2, "vocab_size": 151_936, "max_position_embeddings": 128_000,
                           "rms_norm_eps": 1e-6, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}},
           "vision_config": {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 2048, "patch_size": 14, "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31]}}
TINY = {"text_config": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 1216, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}},
        "vision_config": {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64, "patch_size": 14, "window_size": 112, "fullatt_block_indexes": [1]}}
POLICIES = {"full": {}, "lora": {"lora_rank": 64, "weights": "bfloat16"}, "four_bit": {"lora_rank": 64, "four_bit": True, "weights": "bfloat16"}}
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "H20": 148e12, "L40S": 362e12, "4090": 165e12}  # dense bf16, operations a second


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


def eight_bit(runner: Ours) -> None:
    "Gives ours bitsandbytes' 8-bit AdamW, which holds two bytes a weight where torch's holds eight."
    from bitsandbytes.optim import AdamW8bit
    group = runner.trainer.optimizer.param_groups[0]
    runner.trainer.optimizer = AdamW8bit(group["params"], lr=group["lr"], betas=group["betas"], weight_decay=group["weight_decay"])


def readable(case: Case, words: int) -> list:
    "Returns well-formed completions, no two alike, whose first step is some words longer than the book's."
    text = BOOK_COMPLETIONS[0]
    return [parse_set(text.replace("key.", f"key, number {i}, in" + " the" * words + ".")) for i in range(case.prompts * case.num_generations)]


def measure(case: Case, contender: str, steps: int, optimizer: str) -> dict:
    "Runs one contender in this process: a step to warm up, then some; returns medians of seconds and peaks of memory by phase."
    if contender == "trl": runner = Trl(case, reflect=False, forced=True, steps=steps + 1)
    else: runner = Ours(case, contender == "fast", reflect=True, forced=True, steps=steps + 1)
    if contender == "trl" and optimizer == "adamw8bit": runner.args.optim = "adamw_bnb_8bit"
    if contender != "trl" and optimizer == "adamw8bit": eight_bit(runner)
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
    return {"seconds": seconds, "step_s": sum(v for k, v in seconds.items() if "beside" not in k), "peak_bytes": {k: max(c.peaks.get(k, 0) for c in clocks) for k in {k for c in clocks for k in c.peaks}}}


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
    return next((p for name, p in PEAKS.items() if device != "cpu" and name in torch.cuda.get_device_name()), None)


def in_a_process(case: Case, contender: str, steps: int, optimizer: str) -> dict:
    command = [sys.executable, "-W", "ignore", __file__, "--one", json.dumps([asdict(case), contender, steps, optimizer])]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 0: return json.loads(done.stdout.splitlines()[-1])
    if "OutOfMemoryError" in done.stderr: return {"out_of_memory": True}
    raise RuntimeError(f"{contender}: exit code {done.returncode}\n{done.stderr[-3000:]}")


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
    parser.add_argument("--optimizer", default="adamw", choices=("adamw", "adamw8bit"))
    parser.add_argument("--checkpointing", action="store_true", help="recompute layers in the backward pass")
    parser.add_argument("--freeze-vision", action="store_true")
    parser.add_argument("--beta", type=float, default=0.01)
    parser.add_argument("--steps", type=int, default=3, help="after one to warm up")
    parser.add_argument("--peak-tflops", type=float, help="the device's dense bf16 peak, where the script does not know it")
    parser.add_argument("--folder", type=Path, default=None, help="where the random policy is written; kept for the next run")
    parser.add_argument("--output", default=None, help="name of the file in benchmarks/results; gpu_step, or gpu_step_tiny")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        case, *rest = json.loads(args.one)
        return print(json.dumps(measure(Case(**case), *rest)))
    if unknown := [p for p in args.policies if p not in POLICIES]: parser.error(f"--policies: {unknown[0]!r}; allowed: {', '.join(POLICIES)}")
    if args.tiny: args.prompts, args.num_generations, args.prompt_tokens, args.side, args.completion_tokens, args.steps = 1, 4, 150, 4, 6, 1
    device = "cpu" if args.tiny else "cuda"
    if device == "cuda" and not torch.cuda.is_available(): parser.error("no GPU here; --tiny runs a tiny shape on the CPU")
    folder = model_folder(TINY if args.tiny else QWEN_3B, args.folder or Path(gettempdir()) / f"emo_r3_random_{'tiny' if args.tiny else '3b'}", device)
    base = Case(args.prompts, args.num_generations, args.prompt_tokens, args.completion_tokens, args.side, args.freeze_vision, args.beta, args.tokens_per_forward, policy=str(folder), device=device,
                weights=args.weights, precision="fp32" if args.tiny else "bf16", gradient_checkpointing=args.checkpointing)
    if args.tiny: base = replace(base, weights="float32")
    rows, peak = [], peak_of(device, args.peak_tflops)
    for policy in args.policies:
        case = replace(base, **POLICIES[policy])
        if args.tiny: case = replace(case, weights="float32", lora_rank=min(case.lora_rank, 4))
        for contender in args.contenders:
            found = in_a_process(case, contender, args.steps, args.optimizer)
            if "seconds" in found: found |= figures(found, case, peak)
            rows.append({"policy": policy, "contender": contender, "case": asdict(case) | {"policy": folder.name}, "optimizer": args.optimizer, **found})
            print(f"{policy:8s} {contender:5s} ", "out of memory" if "seconds" not in found else f"step {found['step_s']:.2f} s  { {k: round(v, 3) for k, v in found['seconds'].items()} }  "
                  f"{found['sampled_tokens_per_s']:.0f} tokens/s sampled  MFU { {k: round(v, 3) for k, v in found.get('mfu', {}).items()} }  peak GB { {k: round(v / 1e9, 1) for k, v in found['peak_bytes'].items()} }", flush=True)
    gpu = None if args.tiny else {"name": torch.cuda.get_device_name(), "cuda": torch.version.cuda, "peak_flop_per_s": peak}
    awaits = {"awaits": "a GPU: these figures are a tiny shape's on a CPU and say only that the script works"} if args.tiny else {}
    print(write(args.output or ("gpu_step_tiny" if args.tiny else "gpu_step"), " ".join(["python", "benchmarks/gpu_step.py", *sys.argv[1:]]), gpu=gpu, rows=rows, **awaits))


if __name__ == "__main__": main()
