"""The configuration refuses what cannot work; a step is repeatable, cut-independent and on-policy; a run writes all of its folder or says what is missing."""
import json
import math
import sys
from contextlib import nullcontext
from dataclasses import fields, replace

import bitsandbytes
import pytest
import torch
import yaml
from accelerate.utils import LoggerType
from policies import double_throughout, pictures_read

import emo_r3.groups
import emo_r3.train
from emo_r3.groups import group_logps
from emo_r3.cli import run
from emo_r3.policy import add_lora, completion_logps, load_policy, load_processor, save_policy, unwrapped
from emo_r3.prompts import set_messages
from emo_r3.reflection import reflect
from emo_r3.sampling import PolicySampler
from emo_r3.scenes import make_scenes
from emo_r3.config import TRACKERS, TrainConfig, make_config, number_of_steps, reward_weights
from emo_r3.cost import Shape
from emo_r3.train import Trainer, collect, epoch_order, make_optimizer, pieces, place_of_step, score_rollouts, train, train_step, update

SMALL = make_config(dict(policy="embedded", train_size=16, prompts_per_step=4, prompts_per_update=4, num_generations=4, max_completion_tokens=56, learning_rate=1e-4,
                         precision="fp32", min_pixels=None, max_pixels=None, eval_every=1, sample_every=1, max_steps=2, trackers=("tensorboard",)))


@pytest.fixture(scope="module")
def processor(): return load_processor()


@pytest.fixture(scope="module")
def examples(): return make_scenes("in_domain", "train", 16, seed=3)


def weights_of(trainer): return torch.cat([p.detach().flatten() for p in trainer.policy.parameters()])


@pytest.mark.parametrize("values, says", [
    (dict(num_generations=1), "num_generations = 1"), (dict(temperature=-1.0), "temperature = -1.0"), (dict(temperature=0), "temperature = 0"),
    (dict(temperature="hot"), "temperature = 'hot'"), (dict(lambda_reflective=0.6, lambda_format=0.6), "lambda"), (dict(learning_rate=float("nan")), "learning_rate = nan"),
    (dict(metod="set"), "did you mean 'method'"), (dict(top_p=0.9), "top_p = 0.9; allowed: no such field, for completions"), (dict(method="emo-r3"), "did you mean 'emo_r3'"), (dict(delta=0.9), "delta = 0.9"), (dict(prompts_per_update=100), "prompts_per_update = 100"),
    (dict(train_size=100), "train_size = 100"), (dict(templates={"sett": "x"}), "did you mean 'set'"), (dict(epochs=1.5), "epochs = 1.5"), (dict(beta=-1), "beta = -1"), (dict(max_steps=0), "max_steps = 0"),
    (dict(num_generations=True), "num_generations = True"), (dict(tokens_per_forward=0), "tokens_per_forward = 0"), (dict(four_bit=True), "four_bit = True"), (dict(lora_rank=-1), "lora_rank = -1"), (dict(seed=2**32), "seed = 4294967296"), (dict(adam_betas=["a"]), "adam_betas"),
    (dict(trackers=["tensorbord"]), "did you mean 'tensorboard'"), (dict(lr_schedule="liner"), "lr_schedule: got 'liner'; allowed: constant, linear, cosine; did you mean 'linear'"),
    (dict(label_map=["joy"]), "label_map = "), (dict(method="set", lambda_reflective=0.1), "lambda_reflective = 0.1"), (dict(freeze_vision="yes"), "freeze_vision = 'yes'"), (dict(min_pixels=100, max_pixels=10), "min_pixels = 100"),
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


def test_every_picture_is_dealt_once_an_epoch():
    config = replace(SMALL, prompts_per_step=5, prompts_per_update=5)
    places = [place_of_step(config, 22, step) for step in range(1, 13)]
    assert [e for e, _ in places] == [0] * 4 + [1] * 4 + [2] * 4
    orders = [epoch_order(22, 1, epoch) for epoch in range(3)]
    dealt = [[orders[e][p] for e, p in places if e == epoch] for epoch in range(3)]
    assert all(len(set(sum(d, []))) == len(sum(d, [])) == 20 for d in dealt) and all(sorted(o) == list(range(22)) for o in orders)
    assert len({tuple(o) for o in orders}) == 3 and orders[0] == epoch_order(22, 1, 0) != epoch_order(22, 2, 0)
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
    assert (a - step(replace(SMALL, tokens_per_forward=500, shared_prefix=False))[0]).abs().mean() < 1e-6  # Adam makes a step of 1e-4 of any gradient, rounding included
    assert not torch.equal(a, step(replace(SMALL, method="set"))[0])


def gradient_of(experience, processor, pictures=4, **changes):
    "What an update would teach, in double precision, without moving the weights."
    trainer = Trainer(replace(SMALL, max_grad_norm=1e9, method="set", **changes), load_policy(dtype="float64"), processor)
    trainer.optimizer.step = lambda: None
    with double_throughout(): metrics = update(trainer, experience, torch.arange(pictures), None, None)
    return torch.cat([p.grad.flatten() for p in trainer.policy.parameters() if p.requires_grad]), metrics


def test_gradient_does_not_depend_on_how_an_update_is_cut(processor, examples):
    "All rows at once, whole groups, groups split in ragged parts, single rows; with a shared prompt and without."
    experience = collect(Trainer(replace(SMALL, method="set"), load_policy(), processor), examples[:4], 5, {})
    whole, _ = gradient_of(experience, processor, beta=0.0)
    lengths, prompts = experience.rollouts.lengths, experience.rollouts.prompts.lengths
    assert len(set(lengths.tolist())) > 1
    for tokens, shared in ((400, True), (int(prompts[0] + lengths[:2].sum()), True), (1, True), (16_384, False), (350, False), (1, False)):
        passes = list(pieces(experience.rollouts, torch.arange(4), replace(SMALL, tokens_per_forward=tokens, shared_prefix=shared)))
        assert torch.cat(passes).tolist() == list(range(16)) and (len(passes) == 1) == (tokens > 9000)
        cut, _ = gradient_of(experience, processor, beta=0.0, tokens_per_forward=tokens, shared_prefix=shared)
        assert (cut - whole).norm() < 1e-10 * whole.norm(), (tokens, shared)
    recomputed, _ = gradient_of(experience, processor, beta=0.0, gradient_checkpointing=True)
    assert (recomputed - whole).norm() < 1e-10 * whole.norm()


def with_dead_groups(experience, dead):
    advantages = experience.advantages.clone()
    advantages[dead] = 0.0
    return replace(experience, advantages=advantages)


def test_dead_groups_are_skipped_where_that_changes_nothing(processor, examples, monkeypatch):
    "The tokens of dead groups still count in the division; with a KL penalty they teach, and are not skipped."
    base = collect(Trainer(replace(SMALL, method="set"), load_policy(), processor), examples[:4], 5, {})
    experience = with_dead_groups(replace(base, advantages=torch.linspace(-1, 1, 16).view(4, 4)), [0, 2])
    rows = []
    real = emo_r3.train.row_logps
    monkeypatch.setattr(emo_r3.train, "row_logps", lambda model, rollouts, index, *a, **k: rows.extend(index.tolist()) or real(model, rollouts, index, *a, **k))
    skipped, _ = gradient_of(experience, processor, beta=0.0)
    assert rows == [*range(4, 8), *range(12, 16)]
    barely_alive = replace(experience, advantages=torch.where(experience.advantages == 0, 1e-30, experience.advantages))
    all_rows, _ = gradient_of(barely_alive, processor, beta=0.0)
    assert rows[8:] == list(range(16)) and (skipped - all_rows).norm() < 1e-10 * all_rows.norm() and all_rows.norm() > 0
    mask = base.rollouts.completion_mask.view(4, 4, -1)
    narrow = skipped * mask.sum() / mask[[1, 3]].sum()  # what a division by the living tokens alone would give
    assert (narrow - all_rows).norm() > 0.1 * all_rows.norm()
    trainer = Trainer(replace(SMALL, method="set"), load_policy(), processor)
    rows.clear()
    update(trainer, experience, torch.arange(4), None, base.rollouts.logps)
    assert rows == list(range(16))


def test_an_update_of_dead_groups_alone_is_still_one_to_adamw(processor, examples):
    "Momentum and weight decay go on, as if a gradient of zeros had been computed."
    trainer = Trainer(replace(SMALL, beta=0.0, method="set", learning_rate=1e-3), load_policy(), processor)
    experience = collect(trainer, examples[:4], 5, {})
    update(trainer, experience, torch.arange(4), None, None)
    weight = trainer.policy.model.language_model.layers[0].mlp.up_proj.weight
    before, state = weight.detach().clone(), trainer.optimizer.state[weight]["exp_avg"].clone()
    metrics = update(trainer, with_dead_groups(experience, [0, 1, 2, 3]), torch.arange(4), None, None)
    assert metrics["grad_norm"] == 0 and metrics["loss"] == 0 and "entropy" not in metrics
    assert torch.allclose(trainer.optimizer.state[weight]["exp_avg"], state * 0.9) and not torch.equal(before, weight)


@pytest.mark.parametrize("four_bit", [False, True])
def test_an_adapter_learns_and_is_its_own_reference(processor, examples, four_bit):
    policy = add_lora(load_policy(four_bit=four_bit), rank=4, alpha=8)
    base = {n: p.detach().clone() for n, p in policy.named_parameters() if "lora_" not in n}
    trainer = Trainer(replace(SMALL, lora_rank=4, four_bit=four_bit, learning_rate=1e-2, judge="reference"), policy, processor)
    assert trainer.reference is policy
    first, m = train_step(trainer, examples[:4], seed=5)
    assert m["kl"] == 0 and m["grad_norm"] > 0 and m["sampling/sampling_logp_difference/max"] < 2e-5
    second, m = train_step(trainer, examples[:4], seed=6)
    assert m["kl"] > 0 and all(torch.equal(base[n], p) for n, p in policy.named_parameters() if n in base)
    start = Trainer(replace(SMALL, judge="reference"), load_policy(four_bit=four_bit), processor)  # a copy of the base would judge alike
    repeated = [x for x in second.examples for _ in range(4)]
    assert [v.p_yes for v in second.verdicts] == pytest.approx([v.p_yes for v in reflect(second.completions, repeated, start.judge, start.weights)], abs=1e-5)


def test_four_bit_weights_pass_their_gradient_on(processor, examples):
    "The gradient of an adapter below four-bit layers is that of the same weights written out; some CPUs' inference kernels would cut it off."
    packed = add_lora(load_policy(four_bit=True), rank=4, alpha=8)
    with torch.no_grad(): PolicySampler(packed, processor).sample([set_messages("Which?", examples[0].image)], 1, 2)  # an inference comes first
    whole = load_policy()
    quantised = {n: m.base_layer for n, m in unwrapped(packed).model.language_model.named_modules() if hasattr(m, "base_layer")}
    for name, layer in quantised.items():
        whole.model.language_model.get_submodule(name).weight.data = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).to(torch.float32)
    whole = add_lora(whole, rank=4, alpha=8)
    experience = collect(Trainer(replace(SMALL, method="set"), load_policy(), processor), examples[:2], 5, {})
    grads = []
    for model in (packed, whole):
        with torch.no_grad():
            for n, p in model.named_parameters():
                if "lora_B" in n: p.fill_(0.01)
        (group_logps(model, *experience.rollouts.packed(torch.arange(8))) * torch.linspace(-1, 1, 8)[:, None]).sum().backward()
        grads.append(torch.cat([p.grad.flatten() for n, p in model.named_parameters() if "lora_" in n]))
    assert (grads[0] - grads[1]).norm() < 1e-3 * grads[1].norm()


@pytest.mark.parametrize("kind", ["full", "lora", "four_bit"])
def test_half_precision_samples_scores_and_learns(processor, examples, kind):
    "The default of a full-scale run, on this device: sampler and scorer stay close, and what they disagree by is reported."
    policy = load_policy(four_bit=kind == "four_bit", dtype="float32" if kind == "full" else "bfloat16")
    policy = policy if kind == "full" else add_lora(policy, rank=4, alpha=8)
    trainer = Trainer(replace(SMALL, precision="bf16", lora_rank=0 if kind == "full" else 4), policy, processor)
    before = [p.detach().clone() for p in policy.parameters() if p.requires_grad]
    assert all(p.dtype == torch.float32 for p in before)
    _, m = train_step(trainer, examples[:4], seed=5)
    assert 0 < m["sampling/sampling_logp_difference/mean"] < 0.02 and m["kl"] < 0.02 and math.isfinite(m["grad_norm"])
    assert any(not torch.equal(a, p) for a, p in zip(before, (p for p in policy.parameters() if p.requires_grad)))


def test_eight_bits_make_the_updates_that_whole_averages_make():
    "One update by hand, then several beside torch's AdamW on the same gradients: apart by the rounding of a byte, not more; a gradient of exactly 0, as an adapter's A has it first, decays the weight and does nothing else."
    torch.manual_seed(0)
    start, grads = torch.randn(64, 128), torch.randn(8, 64, 128)
    weights = {kind: torch.nn.Parameter(start.clone()) for kind in ("adamw", "adamw_8bit", "paged_adamw_8bit")}
    config = replace(SMALL, learning_rate=1e-2, weight_decay=0.1)
    optimizers = {kind: make_optimizer(replace(config, optimizer=kind), [w]) for kind, w in weights.items()}
    for kind, w in weights.items():
        w.grad = torch.zeros_like(w)
        optimizers[kind].step()
        torch.testing.assert_close(w.detach(), start * (1 - 1e-2 * 0.1))
        w.data.copy_(start)
    for g in grads:
        for kind, w in weights.items():
            w.grad = g.clone()
            optimizers[kind].step()
    went = (weights["adamw"] - start).abs().mean()
    assert 0 < (weights["adamw_8bit"] - weights["adamw"]).abs().mean() < 0.03 * went and torch.equal(weights["adamw_8bit"], weights["paged_adamw_8bit"])
    assert {kind: optimizers[kind].state[w].get("state1", torch.zeros(1)).dtype for kind, w in weights.items()} == {"adamw": torch.float32, "adamw_8bit": torch.uint8, "paged_adamw_8bit": torch.uint8}


def test_an_optimizer_that_cannot_run_here_is_refused_by_name(monkeypatch, capsys):
    weight, config = torch.nn.Parameter(torch.ones(4)), replace(SMALL, optimizer="adamw_8bit")
    with pytest.raises(ValueError, match="optimizer.*'adam'.*adamw, adamw_8bit, paged_adamw_8bit"): replace(SMALL, optimizer="adam")
    def broken(optimizer): raise RuntimeError("libbitsandbytes_cuda130.so: cannot open shared object file")
    with monkeypatch.context() as patch, pytest.raises(ValueError, match=r"optimizer = 'adamw_8bit': bitsandbytes' AdamW8bit does not run on cpu \(RuntimeError: libbitsandbytes.*allowed here: 'adamw'"):
        patch.setattr(bitsandbytes.optim.AdamW8bit, "step", broken)
        make_optimizer(config, [weight])
    make_optimizer(replace(SMALL, optimizer="paged_adamw_8bit"), [weight], say=False)
    assert capsys.readouterr().err == ""
    make_optimizer(replace(SMALL, optimizer="paged_adamw_8bit"), [weight])
    assert "nothing to page to from the CPU, so it is adamw_8bit" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(ValueError, match="optimizer = 'adamw_8bit': bitsandbytes cannot be imported .*allowed here: 'adamw', or pip install bitsandbytes"): make_optimizer(config, [weight])
    make_optimizer(SMALL, [weight])  # asks for nothing


def test_a_trained_adapter_is_not_taken_for_a_fresh_one(processor, examples, tmp_path):
    "With the adapter off, such a policy is not where it starts: the trainer says so; the command line merges it first, and the first step's KL is 0."
    adapted = add_lora(load_policy(), rank=4, alpha=8)
    with torch.no_grad():
        for n, p in adapted.named_parameters():
            if "lora_B" in n: p.fill_(0.02)
    with pytest.raises(ValueError, match="its adapter has been trained already"): Trainer(SMALL, adapted, processor)
    Trainer(replace(SMALL, beta=0.0, method="set"), adapted, processor)  # no reference is needed
    folder = save_policy(adapted, processor, tmp_path / "adapter")
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == "embedded" and json.loads((folder / "base.json").read_text()) == {"four_bit": False}
    with pytest.raises(ValueError, match="lora_rank = 4: .* is an adapter itself, and a second one would be saved without it"): run(replace(SMALL, policy=str(folder), lora_rank=4, max_steps=1, eval_size=4, trackers=()), tmp_path / "second")
    run(replace(SMALL, policy=str(folder), max_steps=1, eval_size=4, eval_during=4, data="scenes", trackers=()), tmp_path / "run")
    row, = (json.loads(l) for l in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines() if '"kl"' in l)
    assert row["kl"] == 0


def test_a_four_bit_adapter_says_what_is_under_it(processor, tmp_path):
    adapted = add_lora(load_policy(four_bit=True), rank=4, alpha=8)
    again = load_policy(save_policy(adapted, processor, tmp_path / "adapter"))
    assert unwrapped(again).is_loaded_in_4bit


def test_utilisation_counts_needed_work_only(processor, examples, monkeypatch):
    "MFU is the shared count over time and peak: the plain path does more work for the same figure, and a CPU's peak must be told."
    def measured(**changes):
        trainer = Trainer(replace(SMALL, method="set", **changes), load_policy(), processor)
        return trainer, *train_step(trainer, examples[:4], seed=5)
    trainer, experience, m = measured(peak_tflops=0.05)
    needed = emo_r3.train.update_flops(trainer, experience)
    assert m["perf/mfu"] == pytest.approx(needed / (m["timing_s/update"] * 0.05e12))
    lengths, prompt = experience.rollouts.lengths.tolist(), experience.rollouts.prompts.lengths.tolist()
    text = shape = Shape.of(trainer.policy.config)
    by_hand = sum(2 * shape.N_b * n for n in (*prompt, *lengths)) + 2 * shape.V * shape.h * sum(lengths)
    attention = 4 * text.L * text.n_h * text.d * sum(P**2 / 2 + sum(r * P + r**2 / 2 for r in lengths[4 * k: 4 * k + 4]) for k, P in enumerate(prompt))
    assert needed == pytest.approx(3 * (by_hand + attention) + 3 * 4 * text.picture(4, 4).total)
    assert "perf/mfu" not in measured()[2]
    plain = measured(peak_tflops=0.05, shared_prefix=False)
    assert emo_r3.train.update_flops(*plain[:2]) == pytest.approx(needed)
    gpu = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    assert emo_r3.train.peak_tflops(replace(SMALL, precision="bf16"), gpu) == 989 and emo_r3.train.peak_tflops(SMALL, gpu) is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H20")
    assert emo_r3.train.peak_tflops(replace(SMALL, precision="bf16"), gpu) == 148
    for name, peak in (("NVIDIA L40", 181), ("NVIDIA L20", None), ("NVIDIA L4", 121), ("NVIDIA H100 PCIe", 756), ("NVIDIA H100 80GB HBM3", 989)):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
        assert emo_r3.train.peak_tflops(replace(SMALL, precision="bf16"), gpu) == peak


def test_each_picture_is_encoded_once_a_step_where_the_tower_is_frozen(processor, examples):
    for freeze, expected in ((True, 4), (False, 12)):  # else once to look at, once to learn from, once by the reference
        trainer = Trainer(replace(SMALL, freeze_vision=freeze), load_policy(), processor)
        with pictures_read(trainer.policy) as seen, pictures_read(trainer.reference) as by_reference:
            train_step(trainer, examples[:4], seed=5)
            assert len(seen) + len(by_reference) == expected, freeze
            if freeze:
                train_step(trainer, examples[:4], seed=6)
                assert len(seen) == 4  # nor again in a later epoch
    assert not trainer.pictures.kept  # what a tower saw before it learned is forgotten


def test_several_updates_reuse_the_rollouts_of_one_policy(processor, examples):
    config = replace(SMALL, prompts_per_update=2, epochs_per_step=2, learning_rate=1e-3)
    trainer = Trainer(config, load_policy(), processor)
    steps = []
    trainer.optimizer.register_step_post_hook(lambda *_: steps.append(1))
    _, metrics = train_step(trainer, examples[:4], seed=5)
    assert len(steps) == 4 and metrics["kl"] > 0  # the later updates have left the reference
    assert metrics["sampling/sampling_logp_difference/max"] < 1e-5  # the old policy is the one that sampled


def test_the_rate_follows_its_schedule_update_by_update(processor, examples):
    "What is reported is what the step's last update used; the weights move accordingly."
    config = replace(SMALL, prompts_per_update=2, epochs_per_step=2, learning_rate=1e-3, method="set", beta=0.0)
    with pytest.raises(ValueError, match="updates = None; allowed with lr_schedule = 'cosine'"): Trainer(replace(config, lr_schedule="cosine"), load_policy(), processor)
    expected = {"constant": [1e-3] * 8, "linear": [1e-3 * (1 - u / 8) for u in range(8)], "cosine": [5e-4 * (1 + math.cos(math.pi * u / 8)) for u in range(8)]}
    for schedule, rates in expected.items():
        trainer, used = Trainer(replace(config, lr_schedule=schedule), load_policy(), processor, updates=8), []
        trainer.optimizer.register_step_pre_hook(lambda optimizer, *_: used.append(optimizer.param_groups[0]["lr"]))
        reported = [train_step(trainer, examples[:4], seed=s)[1]["learning_rate"] for s in range(2)]
        assert used == pytest.approx(rates) and reported == pytest.approx([rates[3], rates[7]]), schedule


def test_a_run_counts_its_updates(processor, examples, tmp_path):
    config = replace(SMALL, prompts_per_update=2, epochs_per_step=2, learning_rate=1e-4, lr_schedule="linear", max_steps=3, method="grpo", trackers=(), sample_every=0)
    summary = train(config, load_policy(), processor, examples, tmp_path / "run", conclude=lambda: {"comparison": {"n": 4}})
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [r["learning_rate"] for r in rows] == pytest.approx([1e-4 * (1 - u / 12) for u in (3, 7, 11)])
    assert summary["comparison"] == {"n": 4} and summary == json.loads((tmp_path / "run" / "summary.json").read_text())


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


class Engine(PolicySampler):
    "One that holds something until it is closed."
    closed = 0

    def close(self): self.closed += 1


@pytest.mark.parametrize("fails", [False, True])
def test_a_sampler_is_closed_by_whoever_made_it(monkeypatch, tmp_path, processor, examples, fails):
    made, config, policy = [], replace(SMALL, max_steps=1), load_policy()
    monkeypatch.setattr(emo_r3.train, "run_sampler", lambda config, policy, processor, *rest: made.append(Engine(policy, processor)) or made[0])
    if fails: monkeypatch.setattr(emo_r3.train, "begin_step", lambda *given, **named: 1 / 0)
    with pytest.raises(ZeroDivisionError) if fails else nullcontext(): train(config, policy, processor, examples, tmp_path / "own")
    assert [one.closed for one in made] == [1]
    if fails: return
    given = Engine(policy := load_policy(), processor)
    train(config, policy, processor, examples, tmp_path / "given", sampler=given)
    assert given.closed == 0 and len(made) == 1


def test_trackers_are_accelerate_s(): assert set(TRACKERS) == {t.value for t in LoggerType} - {"all"}


def test_a_run_says_how_far_it_was_corrected(monkeypatch, tmp_path, processor, examples):
    monkeypatch.setattr(emo_r3.train, "run_sampler", lambda config, policy, processor, *rest: PolicySampler(load_policy(), processor))  # another copy, as an engine has
    summary = train(replace(SMALL, max_steps=1), load_policy(), processor, examples, tmp_path / "run")
    assert summary["corrected_up_to"] == 2.0 and json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])["sampling/importance_sampling_ratio/mean"] == pytest.approx(1, abs=1e-4)
