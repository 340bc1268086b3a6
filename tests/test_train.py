"""The configuration refuses what cannot work; a step is repeatable, cut-independent and on-policy; a run writes all of its folder or says what is missing."""
import json
from dataclasses import fields, replace

import pytest
import torch
import yaml

from emo_r3.policy import completion_logps, load_policy, load_processor
from emo_r3.scenes import make_scenes
from emo_r3.train import (TrainConfig, Trainer, batches, collect, make_config, number_of_steps, reward_weights, score_rollouts, train, train_step, update)

SMALL = make_config(dict(policy="embedded", train_size=16, prompts_per_step=4, prompts_per_update=4, num_generations=4, max_completion_tokens=56, rows_per_forward=16, learning_rate=1e-4,
                         precision="fp32", min_pixels=None, max_pixels=None, eval_every=1, sample_every=1, max_steps=2, trackers=("tensorboard",)))


@pytest.fixture(scope="module")
def processor(): return load_processor()


@pytest.fixture(scope="module")
def examples(): return make_scenes("in_domain", "train", 16, seed=3)


def weights_of(trainer): return torch.cat([p.detach().flatten() for p in trainer.policy.parameters()])


@pytest.mark.parametrize("values, says", [
    (dict(num_generations=1), "num_generations = 1"), (dict(temperature=-1.0), "temperature = -1.0"), (dict(temperature=0), "temperature = 0"),
    (dict(temperature="hot"), "temperature = 'hot'"), (dict(lambda_reflective=0.6, lambda_format=0.6), "lambda"), (dict(learning_rate=float("nan")), "learning_rate = nan"),
    (dict(metod="set"), "did you mean 'method'"), (dict(method="emo-r3"), "did you mean 'emo_r3'"), (dict(delta=0.9), "delta = 0.9"), (dict(prompts_per_update=100), "prompts_per_update = 100"),
    (dict(train_size=100), "train_size = 100"), (dict(templates={"sett": "x"}), "did you mean 'set'"), (dict(epochs=1.5), "epochs = 1.5"), (dict(beta=-1), "beta = -1"), (dict(max_steps=0), "max_steps = 0"),
    (dict(num_generations=True), "num_generations = True"), (dict(rows_per_forward=4), "rows_per_forward = 4"), (dict(seed=2**32), "seed = 4294967296"), (dict(adam_betas=["a"]), "adam_betas"),
    (dict(trackers=["tensorbord"]), "did you mean 'tensorboard'"), (dict(method="set", lambda_reflective=0.1), "lambda_reflective = 0.1"), (dict(freeze_vision="yes"), "freeze_vision = 'yes'"), (dict(min_pixels=100, max_pixels=10), "min_pixels = 100"),
])
def test_configurations_that_cannot_work(values, says):
    with pytest.raises(ValueError, match=says) as caught: make_config(values)
    assert "\n" not in str(caught.value)


def test_every_field_explains_itself_and_defaults_are_the_paper_s():
    for f in fields(TrainConfig): assert f.metadata["help"] and f.metadata["source"], f.name
    c = TrainConfig()
    assert (c.learning_rate, c.num_generations, c.beta, c.epsilon_low, c.epsilon_high, c.delta, c.prompts_per_step, c.prompts_per_update) == (2e-6, 8, 1e-2, 0.2, 0.3, 3.0, 512, 256)
    assert reward_weights(c).lambda_reflective == reward_weights(c).lambda_format == 0.1
    assert reward_weights(replace(c, method="grpo")).lambda_reflective == 0
    assert reward_weights(replace(c, lambda_reflective=0.3)).lambda_accuracy == pytest.approx(0.6)


def test_batches_deal_every_picture_once_an_epoch():
    dealt = list(batches(22, 5, 3, seed=1))
    assert len(dealt) == 12 and all(len(b) == 5 for b in dealt)
    epochs = [sum(dealt[i: i + 4], []) for i in (0, 4, 8)]
    assert all(len(set(e)) == 20 for e in epochs) and len({tuple(e) for e in epochs}) == 3
    assert dealt == list(batches(22, 5, 3, seed=1)) != list(batches(22, 5, 3, seed=2))
    assert number_of_steps(SMALL, 16) == 2 and number_of_steps(replace(SMALL, max_steps=None, epochs=2), 16) == 8


def test_a_step_is_repeatable_and_on_policy(processor, examples):
    def step(config=SMALL):
        trainer = Trainer(config, load_policy(), processor)
        _, metrics = train_step(trainer, examples[:4], seed=5)
        return weights_of(trainer), metrics
    (a, m), (b, n) = step(), step()
    assert torch.equal(a, b) and not torch.equal(a, weights_of(Trainer(SMALL, load_policy(), processor)))
    assert m["reward"] == n["reward"] and m["kl"] == 0 and m["sampling/sampling_logp_difference/max"] < 1e-5
    assert m["clip_ratio/region_mean"] == 0 and m["grad_norm"] > 0
    assert (a - step(replace(SMALL, rows_per_forward=3, shared_prefix=False))[0]).abs().mean() < 1e-6  # Adam makes a step of 1e-4 of any gradient, rounding included
    assert not torch.equal(a, step(replace(SMALL, method="set"))[0])


def test_gradient_does_not_depend_on_how_an_update_is_cut(processor, examples):
    "In double precision, gradients of all rows at once, in ragged pieces, with a shared prompt and without agree."
    def gradient(rows_per_forward, shared_prefix=True):
        trainer = Trainer(replace(SMALL, rows_per_forward=rows_per_forward, shared_prefix=shared_prefix, beta=0.0, method="set"), load_policy(dtype="float64"), processor)
        experience = collect(trainer, examples[:4], 5, {})
        trainer.optimizer.step = lambda: None
        trainer.config = replace(trainer.config, max_grad_norm=1e9)
        update(trainer, experience, torch.arange(4), None, None)
        return torch.cat([p.grad.flatten() for p in trainer.policy.parameters() if p.grad is not None])
    whole = gradient(16)
    for rows, shared in ((4, True), (1, False), (5, False), (16, False)):
        assert (gradient(rows, shared) - whole).norm() < 1e-6 * whole.norm(), (rows, shared)  # transformers' norms round to single precision


def test_several_updates_reuse_the_rollouts_of_one_policy(processor, examples):
    config = replace(SMALL, prompts_per_update=2, epochs_per_step=2, learning_rate=1e-3)
    trainer = Trainer(config, load_policy(), processor)
    steps, real = [], trainer.optimizer.step
    trainer.optimizer.step = lambda: (steps.append(1), real())
    _, metrics = train_step(trainer, examples[:4], seed=5)
    assert len(steps) == 4 and metrics["kl"] > 0  # the later updates have left the reference
    assert metrics["sampling/sampling_logp_difference/max"] < 1e-5  # the old policy is the one that sampled


def test_reference_never_moves_and_judges_where_asked(processor, examples):
    trainer = Trainer(replace(SMALL, judge="reference", learning_rate=1e-3), load_policy(), processor)
    start = torch.cat([p.flatten() for p in trainer.reference.parameters()]).clone()
    assert trainer.judge.model is trainer.reference
    for seed in range(2): train_step(trainer, examples[:4], seed=seed)
    assert torch.equal(start, torch.cat([p.flatten() for p in trainer.reference.parameters()])) and not torch.equal(start, weights_of(trainer))
    assert Trainer(SMALL, load_policy(), processor).judge.model is not trainer.reference
    assert Trainer(replace(SMALL, method="set", beta=0.0), load_policy(), processor).reference is None


def test_methods_ask_differently(processor, examples):
    found = {}
    for method in ("grpo", "set", "emo_r3"):
        experience = collect(Trainer(replace(SMALL, method=method), load_policy(), processor), examples[:4], 5, {})
        found[method] = (experience.completions[0].text[:8], experience.verdicts is not None)
    assert found["grpo"][0].startswith("<think>") and found["set"][0].startswith("<step1>")
    assert [v for _, v in found.values()] == [False, False, True]


def test_a_frozen_vision_tower_stays_as_it_is(processor, examples):
    trainer = Trainer(replace(SMALL, freeze_vision=True, learning_rate=1e-3), load_policy(), processor)
    vision, text = (lambda: torch.cat([p.detach().flatten() for p in trainer.policy.model.visual.parameters()])), weights_of
    before = vision().clone(), text(trainer).clone()
    train_step(trainer, examples[:4], seed=5)
    assert torch.equal(before[0], vision()) and not torch.equal(before[1], text(trainer))
    train_step(moving := Trainer(replace(SMALL, learning_rate=1e-3), load_policy(), processor), examples[:4], seed=5)
    assert not torch.equal(before[0], torch.cat([p.detach().flatten() for p in moving.policy.model.visual.parameters()]))


def test_pictures_and_prompts_stay_together(processor, examples):
    "Permuting the pictures permutes log-probabilities group by group: no picture reaches another's completions."
    trainer = Trainer(SMALL, load_policy(), processor)
    rollouts = collect(trainer, examples[:4], 5, {}).rollouts
    logps = score_rollouts(trainer.policy, rollouts, SMALL)
    order = torch.tensor([2, 0, 3, 1])
    rows = (order[:, None] * 4 + torch.arange(4)).flatten()
    with torch.no_grad(): permuted = completion_logps(trainer.policy, *rollouts.rows(rows), 1.0)
    mask = rollouts.completion_mask[rows][:, :permuted.shape[1]].bool()
    torch.testing.assert_close(permuted[mask], logps[rows][:, :permuted.shape[1]][mask], atol=1e-5, rtol=0)


def test_an_update_that_is_not_finite_is_not_made(processor, examples):
    trainer = Trainer(replace(SMALL, beta=0.0), load_policy(), processor)
    experience = collect(trainer, examples[:4], 5, {})
    before = weights_of(trainer)
    with pytest.raises(FloatingPointError, match="grad_norm = nan"):
        update(trainer, replace(experience, advantages=experience.advantages * float("nan")), torch.arange(4), None, None)
    assert torch.equal(before, weights_of(trainer))


def test_a_run_writes_its_folder(processor, examples, tmp_path):
    seen = []
    def evaluate(model, when):
        seen.append(when)
        return {"in_domain": {"accuracy": 0.5, "n": 4, "ci95": [0.1, 0.9]}}
    summary = train(SMALL, load_policy(), processor, examples, tmp_path / "run", evaluate=evaluate, recipe="small")
    run = tmp_path / "run"
    assert seen == ["before", "during", "after"] and summary == json.loads((run / "summary.json").read_text())
    assert summary.keys() >= {"recipe", "seed", "steps", "wall_s", "before", "after"} and summary["steps"] == 2
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == [0, 1, 2, 3] and rows[0]["eval/in_domain/accuracy"] == 0.5
    for name in ("reward", "reward_std", "frac_reward_zero_std", "rewards/accuracy/mean", "rewards/format/std", "rewards/reflective/mean", "rewards/consistency/mean", "rewards/coherence/std", "kl", "entropy",
                 "clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean", "completions/mean_length", "completions/min_length", "completions/max_length", "completions/clipped_ratio",
                 "sampling/sampling_logp_difference/mean", "sampling/sampling_logp_difference/max", "grad_norm", "learning_rate", "step_time", "timing_s/rollout", "timing_s/reflect", "timing_s/logps",
                 "timing_s/update", "perf/tokens_per_s", "perf/rollouts_per_s", "grounding", "judge/consistency_accuracy"):
        assert name in rows[1], name
    assert make_config(yaml.safe_load((run / "config.yaml").read_text())) == SMALL
    sample = json.loads((run / "samples" / "step_00001.json").read_text())
    group = sample["groups"][0]
    assert len(group["completions"]) == 4 and (run / "samples" / group["picture"]).exists() and abs(sum(c["advantage"] for c in group["completions"])) < 1e-4
    assert list((run / "tracking").rglob("events.out.tfevents*")) and not list(run.rglob("*.partial*"))
    assert load_policy(run / "policy").num_parameters() > 0
    with pytest.raises(ValueError, match="is not empty"): train(SMALL, load_policy(), processor, examples, run)


def test_too_few_pictures_or_a_bad_folder_end_before_any_work(processor, examples, tmp_path):
    with pytest.raises(ValueError, match="'wandb' is not installed"): train(replace(SMALL, trackers=("wandb",)), load_policy(), processor, examples, tmp_path / "a")
    with pytest.raises(ValueError, match="3 pictures were found"): train(SMALL, None, processor, examples[:3], tmp_path / "a")
    (tmp_path / "file").touch()
    with pytest.raises((OSError, ValueError)): train(SMALL, load_policy(), processor, examples, tmp_path / "file" / "run")
    assert not (tmp_path / "a").exists()
