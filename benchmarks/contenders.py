"""The same GRPO step three ways, for the other scripts here: ours with shared prompts ("fast"), ours one padded row a completion ("plain"), and TRL's GRPOTrainer ("trl").

A `Case` says what is sampled and how long it is; `Ours(case, ...)` and `Trl(case, ...)` run it: same policy, pictures, prompts, G, lengths, loss and optimizer.
`Meter` counts floating-point operations by phase. Nothing here is meant to be run by itself.

Where TRL cannot be set to the same: its group's standard deviation is the sample's, plus 1e-4 (ours: the population's, no constant); its KL estimate is not clamped;
AdamW's weight decay leaves out norms and biases; it bans one vision token from sampling where we ban four; off a Triton device its fused head also scores the prompt's
positions. None of it changes what a step costs, but for the last, which is counted as it runs and named where it matters.
"""
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from transformers import PreTrainedModel

import emo_r3.train as ours
from emo_r3.advantages import group_advantages
from emo_r3.data import EmotionExample
from emo_r3.parsing import parse_set
from emo_r3.policy import LORA_LAYERS, VLProcessor, add_lora, load_policy, load_processor, unwrapped
from emo_r3.prompts import DEFAULT_TEMPLATES, coherence_messages, consistency_messages, set_messages
from emo_r3.reflection import reflected_steps, written_verdict
from emo_r3.rewards import RewardWeights, accuracy_reward, format_reward
from emo_r3.scenes import make_scenes
from emo_r3.config import TrainConfig
from emo_r3.train import Experience, Trainer

HERE = Path(__file__).parent
RESULTS = HERE / "results"
transformers.utils.logging.disable_progress_bar()


# -- what is measured ---------------------------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Case:
    "One set of sizes."
    prompts: int = 2  # B, pictures a step
    num_generations: int = 8  # G
    prompt_tokens: int | None = None  # P, reached exactly by words added to the question; None: as the question comes
    completion_tokens: int = 64  # R: the longest a completion may be, and its length where lengths are forced
    side: int = 4  # a picture's edge, in image tokens: 4 is the scenes' own, side**2 tokens a picture
    freeze_vision: bool = False
    beta: float = 0.01
    tokens_per_forward: int = 16_384  # in one forward and backward pass
    learning_rate: float = 1e-6  # small, so that the last step samples what the first did
    policy: str = "embedded"  # or a model's folder
    device: str = "cpu"
    weights: str = "float32"  # in which they are held
    precision: str = "fp32"  # of the forward pass
    gradient_checkpointing: bool = False
    lora_rank: int = 0  # 0: the weights themselves are trained
    four_bit: bool = False  # the weights under the adapter

    @property
    def label(self) -> str: return f"P{self.prompt_tokens or 'own'} G{self.num_generations} R{self.completion_tokens}"

    def config(self, shared_prefix: bool, method: str = "emo_r3", reflection: str = "score") -> TrainConfig:
        "Returns our configuration of the case."
        return TrainConfig(policy=self.policy, method=method, reflection=reflection, shared_prefix=shared_prefix, num_generations=self.num_generations,
                           max_completion_tokens=self.completion_tokens, prompts_per_step=self.prompts, prompts_per_update=self.prompts, train_size=self.prompts,
                           tokens_per_forward=self.tokens_per_forward, freeze_vision=self.freeze_vision, beta=self.beta, learning_rate=self.learning_rate, precision=self.precision,
                           gradient_checkpointing=self.gradient_checkpointing, lora_rank=self.lora_rank, four_bit=self.four_bit, min_pixels=None, max_pixels=None)


def base_of(case: Case) -> PreTrainedModel:
    "Returns the policy's weights, no adapter on them."
    return load_policy(case.policy, case.weights, case.device, case.four_bit)


def policy_of(case: Case) -> PreTrainedModel:
    "Returns the policy as ours trains it."
    return add_lora(base_of(case), case.lora_rank, case.config(True).lora_alpha) if case.lora_rank else base_of(case)


def processor_of(case: Case) -> VLProcessor:
    "Returns the policy's processor, set so that every picture becomes side x side image tokens."
    images = load_processor(case.policy).image_processor
    area = (case.side * images.patch_size * images.merge_size) ** 2
    return load_processor(case.policy, min_pixels=area, max_pixels=area)


def encoded(processor: VLProcessor, questions: list) -> transformers.BatchFeature:
    "Returns chats as transformers takes them, padded on the left."
    texts = [processor.apply_chat_template(q, tokenize=False, add_generation_prompt=True) for q in questions]
    return processor(images=[part["image"] for q in questions for part in q[0]["content"] if part["type"] == "image"] or None, text=texts)


def prompts_of(processor: VLProcessor, examples: list[EmotionExample]) -> transformers.BatchFeature:
    "Returns the SET prompts of some examples."
    return encoded(processor, [set_messages(x.question, x.load_image()) for x in examples])


def examples_of(case: Case, processor: VLProcessor, n: int, filler: str = " the") -> list[EmotionExample]:
    "Returns n scenes whose SET prompt has exactly the case's number of tokens: one-token words are added to the question. Raises ValueError for too short a prompt."
    scenes = make_scenes("in_domain", "train", n, seed=11)
    if case.prompt_tokens is None: return scenes
    missing = case.prompt_tokens - prompts_of(processor, scenes[:1])["input_ids"].shape[1]
    if missing < 0: raise ValueError(f"prompt_tokens = {case.prompt_tokens}; allowed with pictures of {case.side ** 2} tokens: {case.prompt_tokens - missing} or more")
    scenes = [replace(x, question=x.question + filler * missing) for x in scenes]
    got = prompts_of(processor, scenes)["attention_mask"].sum(1)
    assert (got == case.prompt_tokens).all(), f"{filler!r} is no single token here: prompts of {got.tolist()} tokens"
    return scenes


def forced_ids(case: Case, model: PreTrainedModel, n: int, seed: int = 0) -> torch.Tensor: # (n, R)
    "Returns completions of exactly R random tokens, special ones and the end left out."
    return torch.randint(16, unwrapped(model).config.get_text_config().vocab_size, (n, case.completion_tokens), generator=torch.Generator().manual_seed(seed))


def never_end(model: PreTrainedModel) -> None:
    "Takes the end token's probability away, so that every completion runs to its limit; costs no counted operation."
    base = unwrapped(model)
    ends = torch.tensor([base.config.get_text_config().eos_token_id]).flatten()
    base.lm_head.register_forward_hook(lambda module, inputs, logits: logits.index_fill(-1, ends.to(logits.device), torch.finfo(logits.dtype).min))


# -- counting -----------------------------------------------------------------------------------------------------------------------------------------
def _addmm(into, a, b, *args, out_shape=None, **kwargs) -> int: return 2 * a[0] * a[1] * b[1]


def _sdpa(query, key, value, *args, out_shape=None, **kwargs) -> int: return sdpa_flop_count(query, key, value)


def _sdpa_backward(grad, query, key, value, *args, out_shape=None, **kwargs) -> int: return sdpa_backward_flop_count(grad, query, key, value)


UNCOUNTED = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _sdpa,  # torch counts the CPU's attention kernel as nothing,
             torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _sdpa_backward,
             torch.ops.aten.addmm_: _addmm}  # nor the product in place, which TRL's head uses
IN_LINEAR = ("mm", "addmm", "addmm_", "convolution", "convolution_backward", "_convolution")  # everything else that is counted is attention


class Phases:
    "Shares out something that grows - operations, seconds - among named phases while it is open: an inner phase is taken from the outer one."
    def __init__(self): self.phases, self._open, self._undo = {}, ["other"], []

    def spent(self) -> float: # since the last call
        raise NotImplementedError

    def __enter__(self):
        self.spent()
        return self

    def __exit__(self, *error):
        self._settle()
        for owner, name, original in reversed(self._undo): setattr(owner, name, original)

    def _settle(self) -> None: self.phases[self._open[-1]] = self.phases.get(self._open[-1], 0) + self.spent()

    @contextmanager
    def phase(self, name: str):
        self._settle()
        self._open.append(name)
        try: yield
        finally:
            self._settle()
            self._open.pop()

    def watch(self, owner: object, method: str, name: str | Callable[[], str]) -> None:
        "Makes what a method does a phase, until this closes."
        original = getattr(owner, method)
        def watched(*args, **kwargs):
            with self.phase(name() if callable(name) else name): return original(*args, **kwargs)
        self._undo.append((owner, method, original))
        setattr(owner, method, watched)


class Meter(Phases):
    "Counts floating-point operations, in all, by kind and by phase."
    def __init__(self):
        super().__init__()
        self.counter, self._seen = FlopCounterMode(display=False, custom_mapping=UNCOUNTED), 0

    def spent(self) -> int:
        before, self._seen = self._seen, self.counter.get_total_flops()
        return self._seen - before

    def __enter__(self):
        self.counter.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        return self.counter.__exit__(*error)

    @property
    def kinds(self) -> dict[str, int]: # operations in matrix products with weights, and in attention
        linear = sum(n for op, n in self.counter.get_flop_counts().get("Global", {}).items() if str(op).removeprefix("aten.") in IN_LINEAR)
        return {"linear": linear, "attention": self.counter.get_total_flops() - linear}


# -- ours ---------------------------------------------------------------------------------------------------------------------------------------------
class Ours:
    "Our trainer on a case, with pictures for a number of steps: none comes twice before that, so nothing is remembered from an earlier step."
    def __init__(self, case: Case, shared_prefix: bool, reflect: bool = True, reflection: str = "score", forced: bool = False, steps: int = 1, model: PreTrainedModel | None = None):
        self.case, self.processor, self.model = case, processor_of(case), model or policy_of(case)
        if forced: never_end(self.model)
        self.examples = examples_of(case, self.processor, steps * case.prompts)
        self.config = case.config(shared_prefix, "emo_r3" if reflect else "set", reflection)
        self.trainer, self.steps, self.log = Trainer(self.config, self.model, self.processor), 0, Path(tempfile.mkdtemp(prefix="emo_r3_bench_"))

    def step(self) -> dict:
        "Runs one whole step as `train` does, its line in metrics.jsonl included; returns the metrics."
        B, n = self.case.prompts, len(self.examples)
        chosen = [self.examples[(self.steps * B + i) % n] for i in range(B)]
        experience, metrics = ours.train_step(self.trainer, chosen, seed=ours.step_seed(1, self.steps))
        self.steps += 1
        ours.append_metrics(self.log, self.steps, metrics)
        metrics["asked"] = sum(v.asked for v in experience.verdicts or ())
        return metrics

    def forced_experience(self) -> Experience:
        "Returns made-up completions of exactly R tokens, with advantages that leave no group dead."
        B, G = self.case.prompts, self.case.num_generations
        trainer = Trainer(replace(self.config, method="set", max_completion_tokens=1), self.model, self.processor)
        short = ours.collect(trainer, self.examples[:B], 0, {})
        ids = forced_ids(self.case, self.model, B * G)
        rollouts = replace(short.rollouts, completion_ids=ids, completion_mask=torch.ones_like(ids), logps=torch.full(ids.shape, -7.0))
        return replace(short, rollouts=rollouts, advantages=group_advantages(torch.randn(B, G, generator=torch.Generator().manual_seed(1))))

    def update(self, experience: Experience) -> dict:
        "Runs one update on made-up completions, no reference."
        trainer = self.trainer
        if trainer.config.beta: raise ValueError("beta: update alone is measured without a reference; make the case with beta = 0")
        return ours.update(trainer, experience, torch.arange(len(experience.examples)), None, None)

    def watch(self, meter: Meter) -> None:
        "Names the phases of a step."
        meter.watch(self.trainer.sampler, "sample", "sampling")
        for name in ("score", "generate"):
            if self.trainer.judge is not None: meter.watch(self.trainer.judge, name, "reflection")
        meter.watch(ours, "score_rollouts", "reference")
        meter.watch(ours, "update", "update")


# -- TRL ----------------------------------------------------------------------------------------------------------------------------------------------
def trl_rewards(model: PreTrainedModel, processor: VLProcessor, examples: list[EmotionExample], weights: RewardWeights, reflect: bool, answer_tokens: int = 64, counts: dict | None = None) -> dict[str, tuple[Callable, float]]:
    "Returns the paper's rewards as TRL's reward functions, with their weights; reflection asks the model by `generate`, one batch for each of the two questions."
    text_of = lambda completions: [parse_set(c[0]["content"]) for c in completions]

    def accuracy(completions, row, **_): return [accuracy_reward(c.answer, examples[i].label, examples[i].label_set, weights) for c, i in zip(text_of(completions), row)]

    def form(completions, **_): return [format_reward(c, weights) for c in text_of(completions)]

    def ask(questions) -> list[str]:
        inputs = encoded(processor, questions).to(model.device)
        out = model.generate(**inputs, max_new_tokens=answer_tokens, do_sample=weights.judge_temperature > 0, temperature=weights.judge_temperature or None, top_p=weights.judge_top_p, top_k=0)
        return processor.tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1]:], skip_special_tokens=True)

    def reflective(completions, row, **_):
        steps = [reflected_steps(c, weights) for c in text_of(completions)]
        asked = [k for k, s in enumerate(steps) if s is not None]
        if counts is not None: counts["asked"] = len(asked)
        rewards = [(weights.unparseable, weights.unparseable)] * len(steps)
        if asked:
            about_image = ask([consistency_messages(examples[row[k]].load_image(), steps[k][0]) for k in asked])
            about_text = ask([coherence_messages(*steps[k], examples[row[k]].label_set) for k in asked])
            for k, said, felt in zip(asked, about_image, about_text):
                verdict = written_verdict(said, felt, examples[row[k]], weights)
                rewards[k] = (verdict.consistency, verdict.coherence)
        return [(a + b) / 2 if weights.reflective == "mean" else a + b for a, b in rewards]

    found = {"accuracy": (accuracy, weights.lambda_accuracy), "format": (form, weights.lambda_format)}
    return found | {"reflective": (reflective, weights.lambda_reflective)} if reflect else found


class Trl:
    "TRL's GRPOTrainer on a case; `run` is its own `train()`."
    def __init__(self, case: Case, reflect: bool = True, forced: bool = False, made_up: bool = False, steps: int = 1, model: PreTrainedModel | None = None, **options):
        import datasets
        from peft import LoraConfig
        from trl import GRPOConfig, GRPOTrainer
        datasets.disable_progress_bars()
        self.case, self.processor, self.model, self.counts = case, processor_of(case), model or base_of(case), {}
        if forced: never_end(self.model)
        self.model.model.visual.requires_grad_(not case.freeze_vision)
        self.examples = examples_of(case, self.processor, steps * case.prompts)
        texts = [set_messages(x.question, x.load_image())[0]["content"][1]["text"] for x in self.examples]
        rows = datasets.Dataset.from_dict({"prompt": [[{"role": "user", "content": t}] for t in texts], "image": [x.load_image() for x in self.examples], "row": list(range(len(texts)))})
        mine = case.config(True, "emo_r3" if reflect else "set")
        rewards = trl_rewards(self.model, self.processor, self.examples, ours.reward_weights(mine), reflect, counts=self.counts)
        if case.lora_rank: options["peft_config"] = LoraConfig(r=case.lora_rank, lora_alpha=mine.lora_alpha, target_modules=LORA_LAYERS)
        if made_up:  # nothing is sampled or judged: the given completions, and rewards that leave no group dead
            rewards = {"drawn": (lambda completions, **_: torch.randn(len(completions), generator=torch.Generator().manual_seed(1)).tolist(), 1.0)}
            options["rollout_func"] = self._given
        N, row_tokens = case.prompts * case.num_generations, prompts_of(self.processor, self.examples[:1])["input_ids"].shape[1] + case.completion_tokens
        at_once = max(n for n in range(1, N + 1) if N % n == 0 and (n == 1 or n * row_tokens <= case.tokens_per_forward))
        self.args = GRPOConfig(output_dir=tempfile.mkdtemp(prefix="emo_r3_bench_"), per_device_train_batch_size=at_once, gradient_accumulation_steps=N // at_once, num_generations=case.num_generations,
                               max_completion_length=case.completion_tokens, temperature=1.0, top_p=1.0, top_k=0, beta=case.beta, loss_type="dapo", scale_rewards="group", importance_sampling_level="token",
                               epsilon=mine.epsilon_low, epsilon_high=mine.epsilon_high, delta=mine.delta, num_iterations=1, use_bias_correction_kl=False, mask_truncated_completions=False, reward_weights=[w for _, w in rewards.values()],
                               learning_rate=mine.learning_rate, lr_scheduler_type="constant", weight_decay=mine.weight_decay, adam_beta1=mine.adam_betas[0], adam_beta2=mine.adam_betas[1],
                               max_grad_norm=mine.max_grad_norm, optim="adamw_torch", shuffle_dataset=False, max_steps=1, logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True,
                               use_cpu=case.device == "cpu", bf16=case.precision == "bf16", gradient_checkpointing=case.gradient_checkpointing, remove_unused_columns=False, seed=1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.trainer = GRPOTrainer(model=self.model, reward_funcs=[f for f, _ in rewards.values()], args=self.args, train_dataset=rows, processing_class=self.processor, **options)
        self.trainer.remove_callback(transformers.PrinterCallback)

    def _given(self, prompts, trainer) -> dict:
        ids = forced_ids(self.case, self.model, len(prompts))
        prompt = prompts_of(self.processor, self.examples[:self.case.prompts])["input_ids"].tolist()
        return {"prompt_ids": [p for p in prompt for _ in range(self.case.num_generations)], "completion_ids": ids.tolist(), "logprobs": None}

    def run(self, steps: int, between: Callable[[], None] = lambda: None) -> list[dict]:
        "Trains for some steps; returns for each its wall and CPU seconds: from the end of one to the end of the next, so that loading, logging and the loop count. `between` runs after each, uncounted."
        rows, clock = [], {}
        def start(): clock["wall"], clock["cpu"] = time.perf_counter(), time.process_time()
        class Stopwatch(transformers.TrainerCallback):
            def on_train_begin(self, *_, **__): start()
            def on_step_end(self, args, state, control, **_):
                rows.append({"wall_s": time.perf_counter() - clock["wall"], "cpu_s": time.process_time() - clock["cpu"]})
                between()
                start()
        stopwatch = Stopwatch()
        self.trainer.add_callback(stopwatch)
        self.args.max_steps = steps
        self.trainer.train()
        self.trainer.remove_callback(stopwatch)
        logged = [line for line in self.trainer.state.log_history if "reward" in line][-steps:]
        return [row | {"completions/mean_length": line["completions/mean_length"]} for row, line in zip(rows, logged)]

    def watch(self, meter: Meter) -> None:
        "Names the phases of a step."
        meter.watch(self.trainer, "_generate", "sampling")
        meter.watch(self.trainer, "_calculate_rewards", "reflection")
        meter.watch(self.trainer, "_get_per_token_logps_and_entropies", lambda: "update" if torch.is_grad_enabled() else "reference")
        meter.watch(self.trainer, "training_step", "update")  # what is left of it is the backward pass


# -- records ------------------------------------------------------------------------------------------------------------------------------------------
def machine() -> dict:
    "What the figures were measured on."
    from emo_r3.experiments import machine as described
    import importlib.metadata as installed
    return described() | {"threads": torch.get_num_threads(), "trl": installed.version("trl"), "platform": platform.system(), "load_1min": round(os.getloadavg()[0], 2)}


def write(name: str, command: str, **content) -> Path:
    "Writes results/NAME.json; returns its path."
    RESULTS.mkdir(exist_ok=True)
    target = RESULTS / f"{name}.json"
    target.write_text(json.dumps({"command": command, "machine": machine()} | content, indent=1) + "\n")
    return target


def in_a_process(script: str, options: list[str]) -> dict:
    "Runs a script of this folder in a process of its own; returns what it prints last, as JSON. Raises RuntimeError, with what it said, if it fails."
    command = [sys.executable, "-W", "ignore", script, *options]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode: raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def peak_bytes() -> int:
    "The most memory that this process has held since it started or `forget_peak` was called."
    status = Path("/proc/self/status")
    if status.exists(): return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM")) * 1024
    import resource  # survives an exec on Linux, hence the other way above
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if platform.system() == "Darwin" else 1024)


def forget_peak() -> None:
    "Lets the peak start anew from what is held now, where the system can."
    try: Path("/proc/self/clear_refs").write_text("5")
    except OSError: pass
