"""What test_ranks.py starts in each process: `train FOLDER`, or `gradient FOLDER`. TEST_STOP = how:rank:function:call ends, stops or freezes one rank before that call."""
import hashlib
import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import torch
from policies import double_throughout, processor

import emo_r3.train as loop
from emo_r3.policy import load_policy
from emo_r3.ranks import Ranks
from emo_r3.scenes import make_scenes
from test_resume import BASE, Evaluating

CONFIG = replace(BASE, sharding=os.environ.get("TEST_SHARDING", "none"), prompts_per_update=2, rank_timeout_s=float(os.environ.get("TEST_TIMEOUT", 120)))


def stop_where_told(folder: Path) -> None:
    if not (told := os.environ.get("TEST_STOP")): return
    how, rank, name, n = told.split(":")
    if int(rank) != int(os.environ.get("RANK", 0)): return
    real, calls = getattr(loop, name), []
    def counted(*args, **options):
        calls.append(1)
        if len(calls) == int(n):
            if how == "freeze": (folder.parent / "frozen").touch()
            os.kill(os.getpid(), {"kill": signal.SIGKILL, "term": signal.SIGTERM, "freeze": signal.SIGSTOP}[how])
        return real(*args, **options)
    setattr(loop, name, counted)


def train(folder: Path) -> None:
    stop_where_told(folder)
    ranks, policy, seen = Ranks(CONFIG.rank_timeout_s), load_policy(), {"ids": [], "texts": [], "seeds": []}
    real = loop.begin_step
    def noted(trainer, examples, seed):
        begun = real(trainer, examples, seed)
        seen["ids"] += [x.id for x in examples]
        seen["texts"] += begun.experience.rollouts.texts
        seen["seeds"].append(seed)
        return begun
    loop.begin_step = noted
    loop.train(CONFIG, policy, processor(), make_scenes("in_domain", "train", 8, seed=3), folder, evaluate=Evaluating(), ranks=ranks)
    seen["weights"] = hashlib.sha256(torch.cat([p.detach().flatten() for p in policy.parameters()]).numpy().tobytes()).hexdigest()
    (folder / f"seen_{ranks.rank}.json").write_text(json.dumps(seen))


def gradient(folder: Path) -> None:
    "The same eight pictures' completions, all here or a half on each rank."
    ranks, examples = Ranks(120.0), make_scenes("in_domain", "train", 8, seed=3)
    config = replace(CONFIG, prompts_per_step=8, prompts_per_update=8, method="set", max_grad_norm=1e9, lr_schedule="constant", beta=0.0)
    alone = Ranks.__new__(Ranks)
    alone.rank, alone.world, alone.timeout_s, alone.group = 0, 1, 120.0, None
    parts = [loop.collect(loop.Trainer(config, load_policy(), processor(), ranks=alone), examples[at: at + 4], 5 + at, {}) for at in (0, 4)]  # each half by itself, on any rank
    trainer = loop.Trainer(config, load_policy(dtype="float64"), processor(), ranks=ranks)
    trainer.optimizer.step = lambda: None
    def taught(experience):
        with double_throughout():
            metrics = loop.update(trainer, experience, torch.arange(len(experience.examples)), None, None)
        return torch.cat([p.grad.flatten() for p in trainer.learns.values()]), metrics
    mine = parts[ranks.rank] if ranks.world > 1 else loop.join(parts)
    grad, metrics = taught(mine)
    if ranks.first: torch.save(grad, folder / f"gradient_{ranks.world}.pt")
    if ranks.world > 1:  # the mistake: every rank divides by its own tokens
        real, ranks.total = ranks.total, lambda values, where: list(values)
        averaged, _ = taught(mine)
        ranks.total = real
        if ranks.first: torch.save(averaged / ranks.world, folder / "averaged_2.pt")
    figures = [f for one in ranks.every(loop.completion_figures(mine), "figures") for f in one]
    if ranks.first: print(json.dumps({"metrics": metrics | loop.experience_metrics(figures, config.num_generations), "lengths": [f["length"] for f in figures]}), flush=True)


if __name__ == "__main__": {"train": train, "gradient": gradient}[sys.argv[1]](Path(sys.argv[2]))
