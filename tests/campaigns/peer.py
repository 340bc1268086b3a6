"""How TRL's GRPOTrainer stands kills, damaged checkpoints, SIGTERM and numbers that are none: the peer's column of the reliability scorecard.

    OMP_NUM_THREADS=1 python tests/campaigns/peer.py    # about ten minutes on one core; writes results/peer.json beside it; --keep FOLDER keeps the runs

Every training is a process of its own: the embedded policy, the embedded scenes, the paper's format and accuracy rewards, learning rate and beta; six updates of two pictures by four
completions, a checkpoint after each; for the rest TRL's own defaults where a CPU allows them (no bf16, no gradient checkpointing). What a run ends with - weights and AdamW's state - is compared by sha256.

Resume: killed by SIGKILL in the fourth update, after the third's checkpoint, which lies inside a batch of completions where a batch serves several updates; then `train(resume_from_checkpoint=True)`
in a new process. Extra rows: from a checkpoint at a batch's end, and in the second pass over the pictures. Each is compared with an uninterrupted run, which a second one must equal.
transformers saves this architecture's weights under other names than a resume looks for, warns, and goes on with the weights that the process started from (huggingface/transformers issue 43701), so
each resume is also shown "names mended": the tensors in model.safetensors are renamed by hand before it. All that follows is measured with the names mended, to the peer's advantage.
Damage: in copies of the first killed run's folder (checkpoints 2 and 3 are kept), one file of checkpoint 3 is cut to half, removed, or gets a bit of its middle byte flipped (the lowest); then it is resumed.
Controls: the folder undamaged, and checkpoint 3 taken away by hand.
SIGTERM comes while the third batch is rewarded, with no checkpoint written so far; the numbers go wrong in the third update, once.
"""
import argparse
import functools
import hashlib
import importlib.metadata
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1] / "benchmarks"))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import transformers
from safetensors.torch import load_file, save_file

from contenders import Case, base_of, examples_of, machine, ours, processor_of, trl_rewards
from emo_r3.prompts import set_messages

STEPS, KILL, WRONG = 6, 4, 3  # updates of a run; the one that is killed; the one whose numbers go wrong, or in which SIGTERM comes
MODES = {"one update a batch": {}, "several updates a batch": {"steps_per_generation": 4}, "several epochs a batch": {"num_iterations": 2}, "one update a batch, second pass over the pictures": {"pictures": 4}}
FILES = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")
RECOVERED, ERROR, SAME, WRONG_SILENT = OUTCOMES = ("recovered from the one before, bitwise", "error", "silent, same result", "silent, WRONG numbers")
WRONGS = ("one reward of one completion is NaN", "every reward of the batch is NaN", "one reward of one completion is inf", "an activation in the update's forward pass is NaN")
CASE = Case(prompts=2, num_generations=4, completion_tokens=64)


# -- one training, in its own process -----------------------------------------------------------------------------------------------------------------
def digest(tensors: dict[str, torch.Tensor]) -> str:
    "Returns sha256 over names and bytes."
    whole = hashlib.sha256()
    for name in sorted(tensors): whole.update(name.encode() + tensors[name].detach().contiguous().cpu().numpy().tobytes())
    return whole.hexdigest()


class Diary(transformers.TrainerCallback):
    "Writes a line for each batch of completions, update and log as it comes, so that it outlives a kill; kills the process before the update `kill`."
    def __init__(self, target: Path, kill: int | None): self.target, self.kill, self.step = target, kill, 0
    def write(self, **line) -> None:
        with self.target.open("a") as file: file.write(json.dumps(line) + "\n")
    def on_train_begin(self, args, state, control, **_): self.step = state.global_step + 1
    def on_step_begin(self, args, state, control, model, **_): self.step, self.before = state.global_step + 1, digest(dict(model.named_parameters()))
    def on_pre_optimizer_step(self, args, state, control, **_):
        if self.step == self.kill: os.kill(os.getpid(), signal.SIGKILL)
    def on_step_end(self, args, state, control, model, **_):
        weights = dict(model.named_parameters())
        self.write(step=self.step, changed=digest(weights) != self.before, finite=all(bool(w.isfinite().all()) for w in weights.values()), advantages=[round(a, 4) for a in self.trainer._logs["advantages"]][-8:])
    def on_log(self, args, state, control, logs, **_):
        if "reward" in logs: self.write(logged=self.step, **{k: str(logs.get(k)) for k in ("loss", "grad_norm", "reward")})


def disturbed(rewards: dict, diary: Diary, fault: str) -> list:
    "Returns the reward functions, which also note what was sampled; at the update WRONG they do what the fault says."
    def around(name, reward):
        @functools.wraps(reward)
        def call(completions, row, **more):
            found = reward(completions=completions, row=row, **more)
            if name == "accuracy": diary.write(sampled=diary.step, pictures=sorted(set(row)))
            if diary.step != WRONG: return found
            if fault == "SIGTERM" and name == "accuracy":
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(5)  # a slow judge
            if fault == WRONGS[0] and name == "accuracy": found[0] = math.nan
            if fault == WRONGS[1]: found = [math.nan] * len(found)
            if fault == WRONGS[2] and name == "accuracy": found[0] = math.inf
            return found
        return call
    return [around(name, reward) for name, (reward, _) in rewards.items()]


def child(folder: Path, mode: str, resume: bool, kill: int | None, fault: str, options: dict) -> None:
    "Trains, and leaves FOLDER/end.safetensors behind: weights and AdamW's state."
    import datasets
    from trl import GRPOConfig, GRPOTrainer
    datasets.disable_progress_bars()
    chosen, processor, model, diary = dict(MODES[mode]), processor_of(CASE), base_of(CASE), Diary(folder / "diary.jsonl", kill)
    examples = examples_of(CASE, processor, chosen.pop("pictures", 32))
    texts = [set_messages(x.question, x.load_image())[0]["content"][1]["text"] for x in examples]
    rows = datasets.Dataset.from_dict({"prompt": [[{"role": "user", "content": t}] for t in texts], "image": [x.load_image() for x in examples], "row": list(range(len(texts)))})
    rewards = trl_rewards(model, processor, examples, ours.reward_weights(CASE.config(True, "set")), reflect=False)
    args = GRPOConfig(output_dir=str(folder), max_steps=STEPS, **{"save_steps": 1, "save_total_limit": 2} | chosen | options, per_device_train_batch_size=4, gradient_accumulation_steps=2,
                      num_generations=CASE.num_generations, max_completion_length=CASE.completion_tokens, beta=CASE.beta, learning_rate=2e-6, reward_weights=[w for _, w in rewards.values()],
                      logging_steps=1, report_to="none", disable_tqdm=True, use_cpu=True, bf16=False, gradient_checkpointing=False, seed=1)
    diary.trainer = trainer = GRPOTrainer(model=model, reward_funcs=disturbed(rewards, diary, fault), args=args, train_dataset=rows, processing_class=processor, callbacks=[diary])
    if fault == WRONGS[3]:
        def spoil(module, inputs, states):
            if not torch.is_grad_enabled() or diary.step != WRONG: return states
            return states.index_put((torch.tensor(0), torch.tensor(-20), torch.tensor(0)), torch.tensor(math.nan))  # inside a completion
        model.model.language_model.norm.register_forward_hook(spoil)
    trainer.train(resume_from_checkpoint=resume or None)
    state = trainer.optimizer.state_dict()["state"]
    save_file({f"weights/{n}": p.detach().clone() for n, p in model.named_parameters()} | {f"optimizer/{i}/{k}": v.clone() for i, of in state.items() for k, v in of.items()}, folder / "end.safetensors")
    diary.write(ended=trainer.state.global_step)


# -- the campaign -------------------------------------------------------------------------------------------------------------------------------------
class Run:
    "A training that has ended, however it did."
    def __init__(self, folder: Path, mode: str, resume: bool = False, kill: int | None = None, fault: str = "", codes: tuple = (0,), **options): # codes: the exit codes that may come, as subprocess gives them
        folder.mkdir(parents=True, exist_ok=True)
        for old in ("diary.jsonl", "end.safetensors"): (folder / old).unlink(missing_ok=True)
        command = [sys.executable, "-W", "ignore", __file__, "--child", json.dumps({"folder": str(folder), "mode": mode, "resume": resume, "kill": kill, "fault": fault, "options": options})]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        self.folder, self.code, self.stderr = folder, done.returncode, done.stderr
        self.diary = [json.loads(line) for line in (folder / "diary.jsonl").read_text().splitlines()] if (folder / "diary.jsonl").exists() else []
        ended = bool(self.diary) and self.diary[-1].get("ended") is not None
        raised = self.code == 1 and "Traceback (most recent call last)" in self.stderr
        if self.code not in codes or self.code == 0 and not ended or self.code == 1 and not raised:
            raise RuntimeError(f"a run in {folder.name} ({mode}, resume={resume}, kill={kill}, {fault!r}) ended with {self.code}, expected {codes}:\n{self.stderr[-3000:]}")
        self.end = load_file(folder / "end.safetensors") if ended else None
        print(f"  {folder.name}: {'ended' if ended else self.last_line}", flush=True)

    @property
    def last_line(self) -> str: # the error, or the signal
        if self.code < 0: return f"killed by {signal.Signals(-self.code).name}"
        return re.sub(r"[^\s'\"]*" + re.escape(self.folder.name), "RUN", [line for line in self.stderr.splitlines() if re.match(r"[\w.]+(Error|Exception|Interrupt)\b", line)][-1])[:200]

    @property
    def warnings(self) -> list[str]: return [line for line in self.stderr.splitlines() if re.match(r"\[(transformers|RANK \d+)\]", line)]

    @property
    def not_found(self) -> int: # weights that a resume did not find, lm_head aside: it is the tied embedding
        return len({name for line in self.warnings if "missing keys" in line for name in re.findall(r"'([^']+)'", line)} - {"lm_head.weight"})

    @property
    def checkpoints(self) -> list[int]: return sorted(int(p.name.split("-")[1]) for p in self.folder.glob("checkpoint-*"))

    def part(self, of: str) -> dict[str, torch.Tensor]: return {n: t for n, t in self.end.items() if n.startswith(of)}

    def sampled(self, since: int) -> list[str]: # batches of completions
        return [f"update {line['sampled']}: pictures {line['pictures']}" for line in self.diary if line.get("sampled", 0) >= since]


def compared(one: Run, other: Run) -> dict:
    "Returns whether two runs end in the same bits, and how far their weights are apart."
    if one.end.keys() != other.end.keys(): raise RuntimeError(f"{one.folder.name} and {other.folder.name} hold other tensors: {sorted(one.end.keys() ^ other.end.keys())[:4]}")
    apart = max((t - other.end[n]).abs().max().item() for n, t in one.part("weights").items())
    return {"weights_equal": digest(one.part("weights")) == digest(other.part("weights")), "optimizer_equal": digest(one.part("optimizer")) == digest(other.part("optimizer")), "largest_difference": apart}


def mend(folder: Path, like: Run) -> Path:
    "Renames the tensors of a folder's checkpoints to the names that the model in memory has; returns the folder."
    for file in folder.glob("checkpoint-*/model.safetensors"):
        mended = {re.sub("^model[.](?!language_model|visual)", "model.language_model.", re.sub("^visual[.]", "model.visual.", n)): t for n, t in load_file(file).items()}
        if wrong := {f"weights/{n}" for n in mended} ^ like.part("weights").keys(): raise RuntimeError(f"{file.parent.name}: {len(wrong)} names fit no weight of the model, {min(wrong)} among them")
        save_file(mended, file, {"format": "pt"})
    return folder


def resumed(at: Path) -> tuple[list[dict], Run, Path]:
    "Returns the rows of the first table, an uninterrupted run, and the folder of the same run killed."
    rows, firsts = [], []
    for mode in MODES:
        name = re.sub(r"\W+", "_", mode)
        whole, twin = Run(at / f"{name}_whole", mode), Run(at / f"{name}_twin", mode)
        again = compared(twin, whole)
        if not (again["weights_equal"] and again["optimizer_equal"]): raise RuntimeError(f"{mode}: two uninterrupted runs differ ({again}), so a resumed one shows nothing")
        batch = {"several updates a batch": 2, "several epochs a batch": 2}.get(mode, 1)  # updates that one batch of completions serves
        for kill in (KILL, KILL + 1) if batch > 1 else (KILL,):
            killed = Run(at / f"{name}_killed_{kill}", mode, kill=kill, codes=(-signal.SIGKILL,))
            if killed.checkpoints[-1] != kill - 1: raise RuntimeError(f"{name}: checkpoints {killed.checkpoints} after a kill in update {kill}")
            for mended in ((False, True) if kill == KILL and "pass" not in mode else (True,)):
                resumable = shutil.copytree(killed.folder, at / f"{name}_resumed_{kill}{'_mended' * mended}")
                if mended: mend(resumable, whole)
                run = Run(resumable, mode, resume=True)
                rows.append({"mode": mode, "checkpoint": "at a batch's end" if (kill - 1) % batch == 0 else "inside a batch", "names_mended": mended, "uninterrupted_twice_equal": True} | compared(run, whole)
                            | {"weights_sha256": [digest(r.part("weights"))[:16] for r in (whole, run)], "tensors_not_found": run.not_found, "sampled_uninterrupted": whole.sampled(kill), "sampled_resumed": run.sampled(kill)})
            firsts += [whole, mend(killed.folder, whole)]
    return rows, *firsts[:2]


def damaged(at: Path, whole: Run, killed: Path) -> list[dict]:
    "Returns the rows of the second table, controls first."
    mode, rows, usual, half = "one update a batch", [], [], lambda content: len(content) // 2
    ways = {"cut to half": lambda file, content: file.write_bytes(content[:half(content)]), "removed": lambda file, content: file.unlink(),
            "bit flipped": lambda file, content: file.write_bytes(content[:half(content)] + bytes([content[half(content)] ^ 1]) + content[half(content) + 1:])}
    def attempt(name, change):
        folder = shutil.copytree(killed, at / re.sub(r"\W+", "_", f"damage {name}"))
        newest = folder / f"checkpoint-{KILL - 1}"
        change(newest)
        run = Run(folder, mode, resume=True, codes=(0, 1))
        shutil.rmtree(folder)
        if run.end is None: return {"outcome": ERROR, "says": run.last_line}
        same, since = compared(run, whole), min(line["step"] for line in run.diary if "step" in line)
        outcome = WRONG_SILENT if not same["weights_equal"] else RECOVERED if since == KILL - 1 else SAME
        usual.extend(run.warnings if name == "none" else ())
        return {"outcome": outcome, "first_update": since, "warns": [line[:160] for line in run.warnings if line not in usual]} | same
    for name, change in {"none": lambda newest: None, "newest checkpoint taken away by hand": shutil.rmtree}.items():
        rows.append({"file": "(control)", "damage": name} | attempt(name, change))
        if not (rows[-1].get("weights_equal") and rows[-1]["optimizer_equal"]): raise RuntimeError(f"control {name!r} differs, so damages show nothing: {rows[-1]}")
    for file in FILES:
        for how, change in ways.items(): rows.append({"file": file, "damage": how} | attempt(f"{how} {file}", lambda newest: change(newest / file, (newest / file).read_bytes())))
    return rows


def counted(rows: list[dict]) -> dict[str, int]:
    "Returns how often each outcome came, controls left out."
    rows = [r for r in rows if r["file"] != "(control)"]
    return {outcome: sum(r["outcome"] == outcome for r in rows) for outcome in OUTCOMES} | {f"{SAME}, but AdamW's state differs": sum(r["outcome"] == SAME and not r["optimizer_equal"] for r in rows)}


def terminated(at: Path, whole: Run) -> list[dict]:
    "Returns what SIGTERM leaves, as things are by default and with enable_jit_checkpoint=True."
    rows, mode = [], "one update a batch"
    for setting in ({}, {"enable_jit_checkpoint": True}):
        run = Run(at / f"sigterm_{len(rows)}", mode, fault="SIGTERM", codes=(0, -signal.SIGTERM, 128 + signal.SIGTERM), save_steps=500, **setting)
        row = {"setting": ", ".join(f"{k}={v}" for k, v in setting.items()) or "default", "exit_code_in_a_shell": 128 - run.code if run.code < 0 else run.code,
               "checkpoint_left": bool(run.checkpoints), "checkpoints": run.checkpoints}
        rows.append(row | ({"resumed": compared(Run(mend(run.folder, whole), mode, resume=True, save_steps=500, **setting), whole)} if run.checkpoints else {}))
    return rows


def wrong_numbers(at: Path, whole: Run) -> list[dict]:
    "Returns what a NaN or an inf does to the update that it meets, and to the run."
    rows, at_update = [], lambda run, key: next(line for line in run.diary if line.get(key) == WRONG)
    for fault in WRONGS:
        run = Run(at / re.sub(r"\W+", "_", fault), "one update a batch", fault=fault, codes=(0, 1))
        update, clean, logged = at_update(run, "step"), at_update(whole, "step"), at_update(run, "logged")
        spoilt = [k for k in run.checkpoints if not all(t.isfinite().all() for t in load_file(run.folder / f"checkpoint-{k}" / "model.safetensors").values())]
        row = {"fault": fault, "weights_unchanged": not update["changed"], "weights_finite_after": update["finite"], "warned": "All reward functions returned None" in run.stderr,
               "run_went_on": run.end is not None, "checkpoints_with_nan": spoilt}
        words = ["the weights stay as they were" if not update["changed"] else "an update is made" if update["finite"] else "an update is made that leaves NaN in the weights",
                 f"{update['advantages'].count(0)} of {len(update['advantages'])} advantages are 0, {clean['advantages'].count(0)} in a clean run", f"checkpoint {spoilt} holds NaN" if spoilt else "",
                 "a warning" if row["warned"] else "no warning", "the run goes on" if row["run_went_on"] else f"later: {run.last_line}"]
        rows.append(row | {"words": "; ".join(filter(None, words)), "logged": logged, "logged_in_a_clean_run": at_update(whole, "logged"), "advantages": str(update["advantages"]), "advantages_in_a_clean_run": str(clean["advantages"])})
    return rows


def table(title: str, heads: list[str], rows: list[list]) -> None:
    "Prints a table."
    cells = [heads, *[["yes" if c is True else "no" if c is False else f"{c:.1e}" if isinstance(c, float) else str(c) for c in row] for row in rows]]
    widths = [max(map(len, column)) for column in zip(*cells)]
    print(f"\n{title}", *("  " + "  ".join(c.ljust(w) for c, w in zip(row, widths)).rstrip() for row in cells), sep="\n")


def show(found: dict) -> None:
    "Prints the tables."
    table("Killed and resumed, against an uninterrupted run", ["mode", "checkpoint", "names", "weights equal", "optimizer equal", "largest difference of weights", "tensors not found"],
          [[r["mode"], r["checkpoint"], "mended" if r["names_mended"] else "as saved", r["weights_equal"], r["optimizer_equal"], r["largest_difference"], r["tensors_not_found"]] for r in found["resume"]])
    says = lambda r: r["says"][:110] if "says" in r else f"weights apart by {r['largest_difference']:.1e}, optimizer {'equal' if r['optimizer_equal'] else 'differs'}"
    table("The newest checkpoint damaged, then resumed", ["file", "damage", "outcome", ""], [[r["file"], r["damage"], r["outcome"], says(r)] for r in found["damage"]])
    print(" ", found["damage_counts"])
    table("SIGTERM", ["setting", "exit code", "checkpoint left", "resumed: weights equal"],
          [[r["setting"], r["exit_code_in_a_shell"], r["checkpoint_left"], r["resumed"]["weights_equal"] if "resumed" in r else "-"] for r in found["sigterm"]])
    short = lambda logged: ", ".join("-" if logged[k] == "None" else f"{float(logged[k]):.2g}" for k in ("loss", "grad_norm", "reward"))
    table("Wrong numbers, once", ["fault", "weights unchanged", "finite after", "loss, norm, reward logged (clean)", ""],
          [[r["fault"], r["weights_unchanged"], r["weights_finite_after"], f"{short(r['logged'])} ({short(r['logged_in_a_clean_run'])})", r["words"]] for r in found["numbers"]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keep", help="keep the runs' folders under this one, which exists")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        warnings.simplefilter("ignore")
        asked = json.loads(given.child)
        return child(Path(asked.pop("folder")), **asked)
    began, at = time.time(), Path(tempfile.mkdtemp(prefix="emo_r3_peer_", dir=given.keep)).resolve()
    try:
        resumes, whole, killed = resumed(at)
        damages = damaged(at, whole, killed)
        found = {"resume": resumes, "damage": damages, "damage_counts": counted(damages), "sigterm": terminated(at, whole), "numbers": wrong_numbers(at, whole)}
    finally:
        if not given.keep: shutil.rmtree(at)
    show(found)
    stamp = machine() | {name: importlib.metadata.version(name) for name in ("accelerate", "datasets", "safetensors", "numpy")}
    content = {"command": "OMP_NUM_THREADS=1 python tests/campaigns/peer.py", "machine": stamp, "updates": STEPS, "wall_s": round(time.time() - began)} | found
    (HERE / "results").mkdir(exist_ok=True)
    (HERE / "results" / "peer.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__": main()
