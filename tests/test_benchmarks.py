"""The benchmarks' formulas say what runs, the gate closes on waste, and the GPU script runs on a tiny shape; no test asserts a time."""
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
trl = pytest.importorskip("trl")

import contenders  # noqa: E402
import flops  # noqa: E402
import forms  # noqa: E402
import gpu_step  # noqa: E402
import step  # noqa: E402
from contenders import Case, Meter, Ours, Trl  # noqa: E402
from emo_r3.cost import Shape  # noqa: E402

SMALL = Case(prompts=1, num_generations=3, prompt_tokens=130, completion_tokens=9, beta=0.0)


def real_shape():
    from transformers import Qwen2_5_VLConfig
    return Shape.of(Qwen2_5_VLConfig(**gpu_step.QWEN_3B))


def test_the_formula_at_3b_gives_the_published_numbers():
    shape = real_shape()
    assert shape.N_b == pytest.approx(2.775e9, rel=1e-3) and shape.V * shape.h == pytest.approx(0.311e9, rel=1e-3)
    p, picture = 4 * 784, shape.picture(28, 28)
    assert picture.linear == pytest.approx(2 * p * (630.0e6 + 1.5e6) + p / 2 * 36.7e6, rel=1e-3)
    assert picture.attention == 4 * 1280 * (4 * p**2 + 28 * 64 * p)
    group = Case(prompts=1, num_generations=8, completion_tokens=300, side=28)
    waste = flops.forward_cost(shape, group, 1000, "repeated").total / flops.forward_cost(shape, group, 1000, "shared").total
    assert waste == pytest.approx(3.74, abs=0.03)


def test_windows_at_a_picture_s_edge_are_counted_by_their_size():
    shape = real_shape()  # windows of 4 x 4 image tokens, of 4 patches each
    windows = shape.picture(5, 4).attention / (4 * 1280) - 4 * 80**2
    assert windows == 28 * (64**2 + 16**2)


def test_the_cpu_s_attention_is_counted_forward_and_backward():
    q, k = torch.randn(2, 3, 5, 8, requires_grad=True), torch.randn(2, 3, 7, 8, requires_grad=True)
    with Meter() as meter:
        out = torch.nn.functional.scaled_dot_product_attention(q, k, k)
        forward = meter.counter.get_total_flops()
        out.sum().backward()
    assert forward == 4 * 2 * 3 * 5 * 7 * 8 and meter.counter.get_total_flops() == 3.5 * forward and meter.kinds["linear"] == 0


def test_phases_are_exclusive():
    class Work:
        def outer(self, a, b):
            a @ b
            self.inner(a, b)
        def inner(self, a, b): [a @ b for _ in range(3)]
    work, a = Work(), torch.ones(2, 2)
    with Meter() as meter:
        meter.watch(work, "outer", "outer")
        meter.watch(work, "inner", "inner")
        a @ a
        work.outer(a, a)
    assert meter.phases == {"other": 16, "outer": 16, "inner": 48}
    assert "watched" not in work.outer.__qualname__


@pytest.mark.parametrize("freeze_vision", [False, True])
@pytest.mark.parametrize("contender, form", [("fast", "shared"), ("plain", "repeated")])
def test_an_update_is_counted_as_the_formula_says(contender, form, freeze_vision):
    case = replace(SMALL, freeze_vision=freeze_vision)
    expected, counted = flops.update_cost(flops.shape_of(case), case, 130, form, counted=True), flops.count_update(case, contender)
    assert counted["attention"] == pytest.approx(expected.attention, rel=2e-3)
    assert counted["linear"] == pytest.approx(expected.linear, rel=5e-3)  # the plain form scores a position more


def test_a_whole_step_is_counted_as_the_formula_says():
    case = replace(SMALL, beta=0.01)
    counted = flops.count_step(case, "fast", forced=True)
    assert counted["mean_length"] == 9 and counted["asked"] == 0
    assert counted["total"] == pytest.approx(flops.step_cost(flops.shape_of(case), case, 130, "shared", counted=True).total, rel=2e-3)
    assert counted["phases"]["reference"] > 0 and sum(counted["phases"].values()) == counted["total"]


def test_trl_repeats_the_prompts():
    case = SMALL
    expected = flops.update_cost(flops.shape_of(case), case, 130, "repeated", counted=True)
    shape, counted = flops.shape_of(case), flops.count_update(case, "trl")
    position = 2 * shape.V * shape.h
    head = 4 * 3 * 138 * position - 3 * 3 * 9 * position  # computed again in the backward pass; and off a Triton device over the prompt's positions too
    assert counted["linear"] == pytest.approx(expected.linear + head, rel=1e-3) and counted["attention"] == pytest.approx(expected.attention, rel=2e-3)


def test_the_gate_is_open_for_shared_prompts_and_closed_for_repeated_ones(monkeypatch, capsys):
    honest, cases = flops.count_update, (SMALL,)
    assert flops.check(cases)
    monkeypatch.setattr(flops, "count_update", lambda case, contender: honest(case, "plain"))
    assert not flops.check(cases) and "BEYOND" in capsys.readouterr().out
    def masked(case, contender):
        packed = flops.update_cost(flops.shape_of(case), case, case.prompt_tokens, "packed", counted=True)
        return {"total": packed.total, "linear": packed.linear, "attention": packed.attention}
    monkeypatch.setattr(flops, "count_update", masked)
    assert flops.check() and "the mask over siblings" in capsys.readouterr().out


def test_prompts_reach_their_length_and_too_short_ones_are_refused():
    processor = contenders.processor_of(replace(SMALL, side=6))
    found = contenders.prompts_of(processor, contenders.examples_of(replace(SMALL, side=6, prompt_tokens=200), processor, 2))
    assert found["attention_mask"].sum(1).tolist() == [200, 200] and (found["mm_token_type_ids"].sum(1) == 36).all()
    with pytest.raises(ValueError, match="prompt_tokens = 100; allowed with pictures of 36 tokens: 144 or more"): contenders.examples_of(replace(SMALL, side=6, prompt_tokens=100), processor, 1)


def test_both_see_the_same_prompts():
    mine, peer = Ours(SMALL, True, reflect=False), Trl(SMALL, reflect=False)
    row = peer.trainer.train_dataset[0]
    text = peer.processor.apply_chat_template([{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": row["prompt"][0]["content"]}]}], tokenize=False, add_generation_prompt=True)
    theirs = peer.processor(images=[row["image"]], text=[text])
    ours = contenders.prompts_of(mine.processor, mine.examples[:1])
    assert torch.equal(theirs["input_ids"], ours["input_ids"]) and torch.equal(theirs["pixel_values"], ours["pixel_values"])


def test_ratios_are_taken_within_a_round():
    steps = {"fast": [{"wall_s": w, "cpu_s": w, "completions/mean_length": 1.0} for w in (1.0, 2.0, 4.0)], "trl": [{"wall_s": w, "cpu_s": w, "completions/mean_length": 1.0} for w in (3.0, 4.0, 12.0)]}
    assert step.summary(steps)["trl"]["wall_s / fast"] == {"median": 3.0, "low_quartile": 2.0, "high_quartile": 3.0, "least": 2.0, "most": 3.0}


@pytest.mark.parametrize("policy, contender", [("full_fp32", "fast"), ("full", "plain"), ("lora", "fast"), ("four_bit", "fast"), ("full", "trl")])
def test_the_gpu_script_runs_on_a_tiny_shape(tmp_path_factory, policy, contender):
    folder = gpu_step.model_folder(gpu_step.TINY, tmp_path_factory.getbasetemp() / "random_tiny", "cpu")
    case = replace(Case(1, 3, 150, 5, 4, policy=str(folder)), **gpu_step.POLICIES[policy] | {"weights": "float32"})
    optimizer = gpu_step.OPTIMIZERS.get(policy, "adamw")
    found = gpu_step.measure(case, contender, steps=1, optimizer=optimizer, steady=2)
    assert {"sampling", "reference", "update"} <= set(found["seconds"]) and found["step_s"] > 0
    if contender != "trl": assert found["steady"]["finite"] and found["steady"]["steps"] == len(found["steady"]["loss"]) == 2 and found["steady"]["skipped_updates"] == 0
    if policy == "full_fp32":
        said = gpu_step.planned(found | {"peak_bytes": {"update": 10**8}}, case, optimizer, gpu_step.TINY, "NVIDIA H100 80GB HBM3")
        assert said["bytes"].keys() == said["floor_s"].keys() == {"sampling", "reference", "update"} and said["over_measured"] == {"update": said["bytes"]["update"] / 10**8}
        assert said["over_floor"]["update"] == found["seconds"]["update"] / said["floor_s"]["update"] > 1  # a CPU does not beat an H100's limit
    shown = gpu_step.figures(found, case, peak=1e12)
    assert set(shown["mfu"]) == {"sampling", "reference", "update"} and shown["needed_flop"]["update"] > shown["needed_flop"]["reference"]


@pytest.mark.parametrize("uneven", [False, True])
def test_the_three_exact_forms_agree_with_the_repeated_one(uneven):
    found = forms.measure(SMALL, uneven, repeats=1)
    assert set(found) == {"repeated", "dense mask", "cache", "parts"}
    for form, row in found.items(): assert row["logps_differ"] < 2e-5 and row["gradient_differs"] < 1e-5, form
    assert found["dense mask"]["attention"] > found["parts"]["attention"] and found["repeated"]["linear"] > 1.5 * found["parts"]["linear"]
    if not uneven: assert found["parts"]["flop"] == pytest.approx(flops.update_cost(flops.shape_of(SMALL), SMALL, 130, "shared", True).total, rel=0.01)
