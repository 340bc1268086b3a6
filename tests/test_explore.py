"""Groups, widgets and the report: what a page must never do, checked on made-up runs and in a real browser."""
import json
import math
import os
import random
import re
import shutil
import subprocess
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given, strategies as st
from matplotlib.figure import Figure
from PIL import Image

from emo_r3 import explore
from emo_r3.advantages import group_advantages
from emo_r3.data import EMOSET8
from emo_r3.evaluate import Comparison, EvalReport, Graded
from emo_r3.explore import (Html, Line, RunReport, browse_groups, clip_explorer, direction, escape, group_html, join, line_chart, marked_objects, picture_uri, plot_clip, read_metrics,
                            reprice, reward_sliders, show_group, smooth, tag, token_loss)
from emo_r3.parsing import parse_set
from emo_r3.rewards import RewardWeights, coherence_reward, consistency_reward, reward_completion
from emo_r3.scenes import BOOK_COMPLETIONS, book_example, is_grounded, make_scenes, scene_objects
from emo_r3.train import TrainConfig, make_config

HOSTILE = "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\"></style></title>'\"&amp; \u202e \x00\x07 \ud800 ]]> ${x}"
FEELS = dict(fear="shiver and want to hide", amusement="laugh at the joke", awe="stare in wonder", contentment="relax and breathe out", excitement="jump up with energy",
             anger="clench their fists", disgust="turn away in revulsion", sadness="sigh with a heavy heart")


# ---- made-up groups and runs ----------------------------------------------------------------------------------------------

def make_group(example, texts, weights=RewardWeights(), picture="", feels=None):
    "A group's record as training writes it, judged by an oracle."
    rows = []
    for text in texts:
        c, verdict = parse_set(text), None
        if c.well_formed:
            said = "Yes" if is_grounded(c.steps[0], example.objects or ()) else "No"
            felt = next((label for label, phrase in FEELS.items() if phrase in c.steps[1]), None)
            verdict = dict(consistency=consistency_reward(said == "Yes", weights), coherence=coherence_reward(felt, example.label, weights), consistency_answer=said, coherence_answer=felt, p_yes=0.9, label_probs=None, written=None)
        else: verdict = dict(consistency=weights.unparseable, coherence=weights.unparseable, consistency_answer=None, coherence_answer=None, p_yes=None, label_probs=None, written=None)
        rewards = reward_completion(c, example.label, example.label_set, weights, consistency=verdict["consistency"], coherence=verdict["coherence"])
        rows.append(dict(text=c.text, steps=list(c.steps), answer=c.answer, well_formed=c.well_formed, why=c.why, rewards=asdict(rewards), verdict=verdict, length=len(text) // 4))
    advantages = group_advantages(torch.tensor([[r["rewards"]["overall"] for r in rows]]), weights.std, weights.eps)[0].tolist()
    return dict(id=example.id, picture=picture, label=example.label, labels=list(example.label_set.labels), question=example.question, objects=list(example.objects) if example.objects else None,
                completions=[{**r, "advantage": a} for r, a in zip(rows, advantages)])


def speak(rng, example, right, true, formed):
    "A completion that is right, true to the picture and well formed with these probabilities."
    names = list(example.objects)
    if rng.random() > true: names[-1] = rng.choice([n for n in scene_objects() if n not in names])
    label = example.label if rng.random() < right else rng.choice([l for l in EMOSET8 if l != example.label])
    sign = EMOSET8.polarity[label].capitalize()
    text = f"<step1>A {names[0]} stands out, next to a {' and a '.join(names[1:])}.</step1>\n<step2>A viewer would {FEELS[label]}.</step2>\n<step3>{sign}, high arousal.</step3>\n\\boxed{{{label}}}"
    return text if rng.random() < formed else text.replace("</step2>", "")


def predictions(rng, n, right, true, formed=0.98):
    labels = [EMOSET8.labels[i % 8] for i in range(n)]
    answers = [l if rng.random() < right else rng.choice(EMOSET8.labels) for l in labels]
    return EvalReport(tuple(Graded(str(i), l, a if rng.random() < formed else None, "", rng.random() < formed, grounded=rng.random() < true) for i, (l, a) in enumerate(zip(labels, answers))), EMOSET8, "emo_r3", "strict")


def make_metrics(rng, steps, evaluations):
    rows = [{"step": 0, **evaluations["before"]}]
    for s in range(1, steps + 1):
        p, noise = 1 - math.exp(-s / (steps / 3)), lambda size: rng.gauss(0, size)
        clamp = lambda v: min(1.0, max(0.0, v))
        accuracy, truth, rollout = clamp(0.43 + 0.45 * p + noise(0.05)), clamp(0.72 + 0.2 * p + noise(0.03)), abs(2.1 - 0.4 * p + noise(0.08))
        row = {"step": s, "rewards/accuracy/mean": accuracy, "rewards/format/mean": clamp(0.94 + 0.055 * p + noise(0.01)), "rewards/consistency/mean": clamp(truth + 0.05 * p + noise(0.02)),
               "rewards/coherence/mean": clamp(accuracy - 0.02 + noise(0.02)), "grounding": truth, "judge/consistency_accuracy": clamp(0.95 - 0.04 * p + noise(0.01)), "kl": 0.09 * p * p + abs(noise(0.004)),
               "entropy": 0.32 - 0.2 * p + noise(0.012), "reward_std": 0.3 - 0.16 * p + noise(0.02), "frac_reward_zero_std": clamp(0.05 + 0.4 * p + noise(0.06)), "grad_norm": 1.4 - 0.5 * p + abs(noise(0.2)),
               "completions/mean_length": 44 + 2 * p + noise(0.4), "completions/min_length": 36 + noise(1), "completions/max_length": 54 + abs(noise(2)), "completions/clipped_ratio": 0.004,
               "clip_ratio/low_mean": 0.0, "clip_ratio/high_mean": 0.0, "timing_s/rollout": rollout, "timing_s/reflect": 0.45, "timing_s/logps": 0.3, "timing_s/update": 0.9, "step_time": rollout + 1.75, "perf/tokens_per_s": 128 * 45 / (rollout + 1.75)}
        row["reward"] = 0.8 * accuracy + 0.05 * (row["rewards/consistency/mean"] + row["rewards/coherence/mean"]) + 0.1 * row["rewards/format/mean"]
        if steps >= 8 and s % (steps // 4) == 0 and s < steps: row |= {f"eval/{d}/{k}": v for d, a in (("in_domain", 0.57), ("style", 0.53)) for k, v in (("accuracy", a + 0.36 * p), ("grounding", 0.95), ("n", 64))}
        rows.append(row)
    return [*rows, {"step": steps + 1, **evaluations["after"]}]


def make_run(folder, steps=100, G=8, hostile=False, seed=0, finished=True, paired=True, samples=(10, 100)):
    "A made-up run's folder, of the shape that `train` and the command line write."
    folder.mkdir(parents=True)
    rng = random.Random(seed)
    plain = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(make_config(dict(policy="embedded", min_pixels=None, max_pixels=None, eval_size=128, prompts_per_step=16, prompts_per_update=16, num_generations=G,
             max_completion_tokens=64, learning_rate=1e-4, precision="fp32", epochs=1, max_steps=steps, eval_every=25))).items()}
    (folder / "config.yaml").write_text(yaml.safe_dump(plain, sort_keys=False))
    start = {"in_domain": (0.53, 0.96), "style": (0.46, 0.95), "unseen_triggers": (0.3, 0.97), "faces": (0.52, 0.99)}
    gain = {"in_domain": 0.4, "style": 0.3, "unseen_triggers": 0.12, "faces": 0.0}
    reports = {"before": {d: predictions(rng, 128, a, g, 0.96) for d, (a, g) in start.items()}, "after": {d: predictions(rng, 128, a + gain[d], g - 0.01) for d, (a, g) in start.items()}}
    figures = {when: {d: r.to_dict() for d, r in found.items()} for when, found in reports.items()}
    flat = {when: {f"eval/{d}/{k}": v for d, f in found.items() for k, v in f.items() if isinstance(v, (int, float))} for when, found in figures.items()}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in make_metrics(rng, steps, flat)))
    (folder / "samples").mkdir()
    for step in samples:
        late, groups = step > steps / 2, []
        for i, example in enumerate(make_scenes("in_domain", "train", 2, seed=step)):
            picture = f"step_{step:05d}_{i}.png"
            example.load_image().save(folder / "samples" / picture)
            texts = [speak(rng, example, 0.85 if late else 0.4, 0.95 if late else 0.7, 0.99 if late else 0.85) for _ in range(G)]
            if hostile: texts[0], texts[1] = HOSTILE, f"<step1>{HOSTILE}</step1><step2>{HOSTILE}</step2><step3>{HOSTILE}</step3>\\boxed{{{HOSTILE}}}"
            record = make_group(example, texts, picture=picture)
            groups.append(record | ({"label": HOSTILE, "objects": [HOSTILE]} if hostile else {}))
        (folder / "samples" / f"step_{step:05d}.json").write_text(json.dumps({"step": step, "groups": groups}))
    if finished:
        summary = {"recipe": "scenes_cpu", "method": "emo_r3", "seed": 1, "steps": steps, "wall_s": 512.3, **figures}
        if paired:
            right = lambda r: {g.id: g.correct for g in r.predictions}
            pairs = {d: [(right(reports["before"][d])[i], right(reports["after"][d])[i]) for i in right(reports["before"][d])] for d in start}
            summary["comparison"] = {d: Comparison(len(p), sum(a and not b for b, a in p), sum(b and not a for b, a in p)).to_dict() for d, p in pairs.items()}
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder
