"""The embedded pictures and policy: splits do not meet, the warm-up saw no test scene and no label of one, and the policy passes its gates."""
import hashlib
import random
from collections import Counter

import pytest
import torch

from emo_r3.data import EMOSET8
from emo_r3.embedded import warm_up
from emo_r3.policy import EMBEDDED_POLICY, load_policy, load_processor
from emo_r3.scenes import DOMAINS, VENDORS, domain_label_set, domain_triggers, make_scenes, render, scene_objects, scene_specs, split_things

HELD_OUT = {(t, thing) for t in (o.name for o in scene_objects().values() if o.kind != "thing") for s in ("validation", "test") for thing in split_things(t, s)}


def pairs(spec):
    names = spec.names
    return {(a, b) for a in names for b in names if a != b}


@pytest.mark.parametrize("domain", DOMAINS)
def test_splits_never_meet(domain):
    drawn = {split: scene_specs(domain, split, n, seed) for split, n, seed in (("train", 2000, 1), ("validation", 200, 1), ("test", 500, 1))}
    assert [len(set(s)) for s in drawn.values()] == [2000, 200, 500]
    seen = {split: {(s.trigger, t) for s in specs for t in s.things} for split, specs in drawn.items()}
    assert not seen["train"] & seen["test"] and not seen["train"] & seen["validation"] and not seen["validation"] & seen["test"]
    labels = Counter(x.label for x in make_scenes(domain, "test", 240, 3))
    assert set(labels) == set(domain_label_set(domain).labels) and max(labels.values()) - min(labels.values()) <= 6


def test_warm_up_never_sees_a_held_out_pair():
    rng = random.Random(0)
    specs = [warm_up.warm_scene(rng)[0] for _ in range(3000)] + [warm_up.crowd(rng) for _ in range(2000)]
    assert not any(pairs(s) & HELD_OUT for s in specs)
    tested = {pair for d in DOMAINS for s in scene_specs(d, "test", 500, 0) for pair in pairs(s)}
    assert tested & HELD_OUT  # the check above can fail: test scenes are full of such pairs


def test_traces_carry_the_prior_and_not_the_label():
    "For triggers whose prior favours the other reading, the trace's emotion is mostly not the data set's label, and it never depends on the scene."
    rng, quiet = random.Random(0), dict(invent=0.0, incoherent=0.0, broken=0.0)
    spec = next(s for s in scene_specs("in_domain", "train", 200, 0) if warm_up.prefers_second(s.trigger))
    said = Counter(warm_up.set_trace(rng, spec, EMOSET8, quiet).split("{")[1][:-1] for _ in range(2000))
    o = scene_objects()[spec.trigger]
    assert abs(said[o.second] / 2000 - 0.60) < 0.05 and abs(said[o.label] / 2000 - 0.28) < 0.05
    for domain, low, high in (("in_domain", 0.45, 0.60), ("style", 0.45, 0.60)):
        triggers = domain_triggers(domain)
        right = sum(max(p := warm_up.prior(t.name, EMOSET8), key=p.get) == t.label for t in triggers) / len(triggers)
        assert low <= right <= high  # what an exact arg-max of the planted prior scores


def test_priors_are_distributions_and_responses_tell_emotions_apart():
    for o in scene_objects().values():
        if o.kind != "thing": assert sum(warm_up.prior(o.name, domain_label_set("faces" if o.kind == "face" else "in_domain")).values()) == pytest.approx(1)
    phrases = [p for ps in warm_up.RESPONSES.values() for p in ps]
    assert len(phrases) == len(set(phrases)) == 30


def test_shipped_tokenizer_is_the_script_s():
    built, shipped = warm_up.build_tokenizer(), load_processor().tokenizer
    assert built.get_vocab() == shipped.get_vocab() and built.chat_template == shipped.chat_template
    names = [warm_up.first_token(shipped, n) for n in scene_objects()]
    assert len(set(names)) == 98
    odd = "ünusual 🙂 words\n\tand  spaces"
    assert shipped.decode(shipped.encode(odd)) == odd


def test_warm_up_is_repeatable():
    def three_steps():
        tokenizer, images = warm_up.build_tokenizer(), warm_up.build_image_processor()
        torch.manual_seed(5)
        model = warm_up.build_model(tokenizer)
        warm_up.learn_to_name(model, tokenizer, images, random.Random(1), steps=2, batch_size=8)
        warm_up.learn_to_speak(model, tokenizer, images, random.Random(2), steps=2, pool_size=64)
        return torch.cat([p.detach().flatten() for p in model.parameters()])
    assert torch.equal(three_steps(), three_steps())


def test_package_is_small_and_credits_its_sources():
    folder = EMBEDDED_POLICY.parent
    assert sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) < 6_000_000
    credit = (folder / "ATTRIBUTION.md").read_text()
    assert all(word in credit for word in ("Twemoji", "CC-BY 4.0", "Noto", "Apache", "Fluent", "MIT"))
    assert hashlib.sha256((EMBEDDED_POLICY / "model.safetensors").read_bytes()).hexdigest() in credit  # the weights are the ones that the text speaks of
    assert not list(folder.rglob("*openmoji*"))
    for vendor in VENDORS: assert render(scene_specs("style" if vendor == "noto" else "in_domain", "test", 1, 0)[0]).size == (96, 96)


def passes(figures):
    return {name: figures[name] for name, (low, high) in warm_up.GATES.items() if not low <= figures[name] <= high}


def test_the_shipped_policy_passes_its_gates():
    assert not passes(warm_up.measure(load_policy(), load_processor(), n=256, seed=1))


def test_gates_can_fail():
    tokenizer = warm_up.build_tokenizer()
    torch.manual_seed(0)
    assert set(passes(warm_up.measure(warm_up.build_model(tokenizer).eval(), load_processor(), n=16))) >= {"coherence", "grounding", "format", "accuracy"}
