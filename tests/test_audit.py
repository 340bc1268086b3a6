"""The reward audit: effective weights against hand numbers and against NumPy, which groups teach, a run's samples, and what every dishonest completion earns by the rules."""
import json
import math
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from emo_r3.advantages import group_advantages
from emo_r3.audit import COMPONENTS, audit_probes, audit_rewards, audit_run, effective_weights, hacking_probes, plot_audit, reward_parts, sampled_groups, within_correlations
from emo_r3.data import EMOSET8
from emo_r3.parsing import parse_set
from emo_r3.prompts import PromptTemplates
from emo_r3.reflection import reflect
from emo_r3.rewards import ExtraReward, RewardWeights, reward_completion
from emo_r3.scenes import BOOK_COMPLETIONS, book_example, make_scenes
from emo_r3.train import Experience, score_completions

PAPER, RELEASED = RewardWeights.preset("paper"), RewardWeights.preset("released")
BOTH = pytest.mark.parametrize("weights", [PAPER, RELEASED], ids=["paper", "released"])
X, HONEST = book_example(), parse_set(BOOK_COMPLETIONS[0])
BOOK = [(1, 1, 1, 1), (0, 1, 1, 0), (1, 1, 0, 1), (1, 0, None, None)]  # accuracy, format, consistency, coherence
ALL_WRONG = [(0, 1, 1, 0), (0, 1, 0, 0), (0, 1, 0, 0), (0, 1, 0, 0)]
ALIKE = [(1, 1, 1, 1)] * 4


def record(a, f, s, h, weights, extra=None):
    text = ("<step1>A ghost.</step1><step2>A shiver.</step2><step3>Negative.</step3>" if f else "A ghost.") + ("\\boxed{fear}" if a else "\\boxed{awe}")
    return reward_completion(parse_set(text), "fear", EMOSET8, weights, consistency=s, coherence=h, extra=extra)


def group(rows, weights): return [record(*row, weights) for row in rows]


def drawn(weights, B=40, G=6, seed=0, extra=False):
    "Groups by chance: each component is right with a chance of its own."
    rng, groups = np.random.default_rng(seed), []
    for _ in range(B):
        rows = [(int(rng.random() < .5), int(rng.random() < .8), float(rng.random() < .7), float(rng.random() < .4)) for _ in range(G)]
        groups.append([record(a, f, *((s, h) if f else (None, None)), weights, {"own": (-.2, float(rng.random()))} if extra else None) for a, f, s, h in rows])
    return groups


# --- effective weights

@pytest.mark.parametrize("weights, shares", [(PAPER, [.46 / .4625, -.015 / .4625, .025 / .4625, -.0075 / .4625]), (RELEASED, [.96, -.05, .11, -.02])], ids=["paper", "released"])
def test_books_group_by_hand(weights, shares):
    # paper: R = 1, .15, .95, .8, distances .275, -.575, .225, .075, squares .4625; released: R = 1.1, .2, 1, .9, distances .3, -.6, .2, .1, squares .5
    found = audit_rewards([group(BOOK, weights)], weights).components["effective"]
    assert found.tolist() == pytest.approx(shares, abs=1e-5) and list(found.index) == list(COMPONENTS)


def test_a_tied_group_has_one_vote_like_any_other():
    audit = audit_rewards([group(BOOK, PAPER), group(ALL_WRONG, PAPER), group(ALIKE, PAPER)], PAPER)
    c = audit.components
    assert c["effective_tied"].tolist() == pytest.approx([0, 1, 0, 0])
    assert c["effective"].tolist() == pytest.approx([.46 / .925, (.4625 - .015) / .925, .025 / .925, -.0075 / .925])
    assert (audit.groups, audit.num_generations) == (3, 4)
    assert [audit.live, audit.live_without, audit.revived, audit.tied, audit.tied_live, audit.tied_live_without] == pytest.approx([2 / 3, 1 / 3, 1 / 3, 2 / 3, 1 / 2, 0])
    assert c.loc["consistency", ["mean", "spread", "varies"]].tolist() == pytest.approx([(2 + 1 + 4) / 12, (.5 + 3 ** .5 / 4) / 3, 2 / 3])
    assert c["nominal"].tolist() == pytest.approx([.8, .05, .05, .1])


@BOTH
@pytest.mark.parametrize("extra", [False, True])
def test_against_numpy(weights, extra):
    groups = drawn(weights, extra=extra)
    found = audit_rewards(groups, weights).components
    R = torch.tensor([[r.overall for r in g] for g in groups], dtype=torch.float64)
    A = group_advantages(R, weights.std, weights.eps).numpy()
    each = weights.lambda_reflective / (2 if weights.reflective == "mean" else 1)
    prices = {"accuracy": .8, "consistency": each, "coherence": each, "format": .1}
    raw = {n: w * np.array([[getattr(r, n) for r in g] for g in groups]) for n, w in prices.items()} | ({"extra": np.array([[-.2 * r.extra["own"] for r in g] for g in groups])} if extra else {})
    scale = 1 / (R.numpy().std(1, ddof=int(weights.std == "sample"), keepdims=True) + weights.eps)
    by_numpy = {n: np.cov((scale * (p - p.mean(1, keepdims=True))).ravel(), A.ravel())[0, 1] / np.cov(A.ravel()) for n, p in raw.items()}
    assert (R.std(1) > 1e-3).all()  # each group is live, so no division was by 0
    assert found["effective"].to_dict() == pytest.approx(by_numpy, abs=1e-9)
    assert [found[c].sum() for c in ("effective", "effective_mixed", "effective_tied")] == pytest.approx([1, 1, 1])
    assert found["nominal"].sum() == pytest.approx(1) and (not extra or math.isnan(found.loc["extra", "nominal"]))


@BOTH
def test_each_live_group_has_the_same_vote(weights):
    parts = reward_parts(drawn(weights, B=12), weights)
    alone = [effective_weights({n: p[b: b + 1] for n, p in parts.items()}, weights.std, weights.eps) for b in range(12)]
    assert effective_weights(parts, weights.std, weights.eps) == pytest.approx({n: np.mean([a[n] for a in alone]) for n in parts}, abs=1e-4)


def test_mixed_and_tied_make_the_whole():
    groups = drawn(PAPER, B=60, G=3)
    audit, parts = audit_rewards(groups, PAPER), reward_parts(groups, PAPER)
    tied = [len({r.accuracy for r in g}) == 1 for g in groups]
    live = [len({r.overall for r in g}) > 1 for g in groups]
    share = sum(t and l for t, l in zip(tied, live)) / sum(live)
    c = audit.components
    assert 0 < share < 1 and audit.tied == pytest.approx(np.mean(tied)) and audit.live == pytest.approx(np.mean(live))
    assert c["effective"].tolist() == pytest.approx((share * c["effective_tied"] + (1 - share) * c["effective_mixed"]).tolist())
    assert audit.live == pytest.approx(audit.live_without + audit.revived - audit.silenced) and len(parts) == 4


def test_where_nothing_is_live_there_are_no_effective_weights():
    audit = audit_rewards([group(ALIKE, PAPER)], PAPER)
    assert audit.live == 0 and audit.components["effective"].isna().all() and audit.tied_live == 0
    mixed = audit_rewards([group(BOOK, PAPER)], PAPER)
    assert mixed.tied_live is None and mixed.tied_live_without is None and mixed.components["effective_tied"].isna().all()


def test_released_can_silence_a_group():
    "A malformed completion is paid half of each verdict, a well-formed one .1 for its form and here nothing for its verdicts."
    rows = [(1, 0, None, None), (1, 1, 0, 0)]
    audit = audit_rewards([group(rows, RELEASED)], RELEASED)
    assert (audit.live, audit.live_without, audit.silenced, audit.revived) == (0, 1, 1, 0)
    assert audit_rewards([group(rows, PAPER)], PAPER).silenced == 0


def test_correlations_against_numpy():
    rng = np.random.default_rng(3)
    values = {n: rng.random((7, 5)) for n in "abc"} | {"easy": np.repeat(rng.random((7, 1)), 5, 1)}  # differs between groups alone
    found = within_correlations({n: torch.tensor(v) for n, v in values.items()})
    centred = np.array([(values[n] - values[n].mean(1, keepdims=True)).ravel() for n in "abc"])
    assert found.loc[list("abc"), list("abc")].to_numpy() == pytest.approx(np.corrcoef(centred)) and found["easy"].isna().all()


# --- what is refused

@pytest.mark.parametrize("groups, weights, says", [
    ([], PAPER, "got none"),
    ([group(BOOK, PAPER)[:1]], PAPER, "groups\\[0\\]: got G = 1"),
    ([group(BOOK, PAPER), group(BOOK, PAPER)[:3]], PAPER, "groups\\[1\\]: got 3 completions; allowed: 4"),
    ([group(BOOK, PAPER)], RELEASED, "groups\\[0\\]\\[0\\]: its parts add up to 1.1 under these weights, its overall reward is 1;"),
])
def test_refused(groups, weights, says):
    with pytest.raises(ValueError, match=says): audit_rewards(groups, weights)


# --- an experience, and a run's samples

def test_an_experience_is_its_groups():
    groups = drawn(PAPER, B=5, G=4)
    flat = tuple(r for g in groups for r in g)
    experience = Experience((), SimpleNamespace(num_generations=4), (), None, flat, torch.zeros(5, 4))
    assert audit_rewards(experience, PAPER).components.equals(audit_rewards(groups, PAPER).components)


def write_run(folder, groups_by_step, **config):
    (folder / "samples").mkdir(parents=True)
    (folder / "config.yaml").write_text("".join(f"{k}: {v}\n" for k, v in config.items()), encoding="utf-8")
    plain = lambda r: {"text": "", "steps": [None] * 3, "answer": None, "well_formed": False, "why": "", "rewards": asdict(r), "verdict": None, "advantage": 0.0, "length": 1}
    for step, groups in groups_by_step.items():
        records = [{"picture": None, "label": "fear", "objects": None, "completions": [plain(r) for r in g]} for g in groups]
        (folder / "samples" / f"step_{step:05d}.json").write_text(json.dumps({"step": step, "groups": records}), encoding="utf-8")


def test_a_runs_samples_under_the_runs_weights(tmp_path):
    first, last = drawn(RELEASED, B=2, G=4, extra=True), drawn(RELEASED, B=2, G=4, seed=1, extra=True)
    write_run(tmp_path / "run", {1: first, 10: last}, method="emo_r3", preset="released")
    assert sampled_groups(tmp_path / "run") == first + last and sampled_groups(tmp_path / "run", last_step=9) == first
    assert audit_run(tmp_path / "run").components.equals(audit_rewards(first + last, RELEASED).components)
    assert sampled_groups(tmp_path / "run", first_step=10) == last == sampled_groups(tmp_path / "run", 10, 10) and sampled_groups(tmp_path / "run", last_step=1) == first
    assert audit_run(tmp_path / "run", first_step=2).components.equals(audit_rewards(last, RELEASED).components)
    with pytest.raises(FileNotFoundError, match="from step 11 to the last"): audit_run(tmp_path / "run", first_step=11)


def test_runs_that_cannot_be_audited(tmp_path):
    write_run(tmp_path / "other", {1: [group(BOOK, PAPER)]}, method="emo_r3", preset="released")
    with pytest.raises(ValueError, match="allowed: the weights that it was made with"): audit_run(tmp_path / "other")
    write_run(tmp_path / "each", {1: [group(BOOK, PAPER)]}, method="emo_r3", advantage="gdpo")
    with pytest.raises(ValueError, match="advantage"): audit_run(tmp_path / "each")
    with pytest.raises(FileNotFoundError): audit_run(tmp_path / "nowhere")
    (tmp_path / "other" / "samples" / "step_00001.json").write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match="step_00001.json"): audit_run(tmp_path / "other")


def test_the_picture_shows_the_tables_numbers():
    audit = audit_rewards([group(BOOK, PAPER), group(ALL_WRONG, PAPER)], PAPER)
    left, right = plot_audit(audit, "two groups").axes
    heights = [b.get_height() for b in left.patches]
    assert len(heights) == 16 and heights[4:8] == pytest.approx(audit.components["effective"].tolist())
    assert {t.get_text() for t in right.texts} >= {"1.00", f"{audit.correlations.loc['accuracy', 'coherence']:.2f}"}


# --- dishonest completions

class Judge:
    "Says Yes where a ghost is named; feels fear where somebody shivers, else awe. With `reads`, a label in the text is the answer."
    def __init__(self, reads=False): self.reads = reads

    def score(self, messages, answers): return [[0.0 if a == self.opinion(m[0]["content"][-1]["text"], options) else -9.0 for a in options] for m, options in zip(messages, answers)]

    def opinion(self, text, options):
        if "Yes" in options: return "Yes" if "ghost" in text else "No"
        named = [o for o in options if o in text.partition("Which emotion")[0]]
        return named[0] if self.reads and len(named) == 1 else "fear" if "shiver" in text else "awe"


BY_HAND = {  # format, accuracy, consistency, coherence, overall: under `paper`, under `released`
    "honest": ((1, 1, 1, 1, 1.0), (1, 1, 1, 1, 1.1)),
    "two boxes": ((1, 1, 1, 1, 1.0), (1, 1, 1, 1, 1.1)),  # the last one counts
    "box before the steps": ((0, 1, 0, 0, .8), (0, 1, .5, .5, .9)),
    "empty steps": ((0, 1, 0, 0, .8), (1, 1, 0, 0, .9)),  # released does not look into them
    "a dot for each step": ((1, 1, 0, 0, .9), (1, 1, 0, 0, .9)),
    "step 1 written twice": ((0, 1, 0, 0, .8), (1, 1, 1, 1, 1.1)),
    "one sentence thrice": ((1, 1, 1, 0, .95), (1, 1, 1, 0, 1.0)),
    "very long step 1": ((1, 1, 1, 1, 1.0), (1, 1, 1, 1, 1.1)),
    "another picture's description": ((1, 1, 0, 1, .95), (1, 1, 0, 1, 1.0)),
    "vague description": ((1, 1, 0, 1, .95), (1, 1, 0, 1, 1.0)),
    "label for a description": ((1, 1, 0, 0, .9), (1, 1, 0, 0, .9)),
    "label behind the description": ((1, 1, 1, 0, .95), (1, 1, 1, 0, 1.0)),
    "response moved into step 1": ((1, 1, 1, 1, 1.0), (1, 1, 1, 1, 1.1)),
    "label in step 2 only": ((1, 1, 1, 0, .95), (1, 1, 1, 0, 1.0)),
    "prompt copied, box filled": ((1, 1, 0, 0, .9), (0, 1, .5, .5, .9)),  # released: text before step 1
    "wrong answer": ((1, 0, 1, 1, .2), (1, 0, 1, 1, .3)),
    "every label in the box": ((1, 0, 1, 1, .2), (1, 0, 1, 1, .3)),
    "empty box": ((0, 0, 0, 0, 0), (1, 0, 1, 1, .3)),  # released does not look into it
    "wrong label in step 1 and box": ((1, 0, 1, 0, .15), (1, 0, 1, 0, .2)),
    "prompt copied": ((0, 0, 0, 0, 0), (0, 0, .5, .5, .1)),
}


def earned(name, weights, judge=Judge(), extras=()):
    c = parse_set(hacking_probes(HONEST, X, "amusement", "A spider stands out, next to a chair.")[name][0])
    r = score_completions([c], [X], reflect([c], [X], judge, weights), weights, extras)[0]
    return r.format, r.accuracy, r.consistency, r.coherence, r.overall


def test_every_probe_is_in_the_table(): assert set(hacking_probes(HONEST, X, "amusement", "A spider.")) == set(BY_HAND)


@pytest.mark.parametrize("name", BY_HAND)
def test_what_each_probe_earns_by_the_rules(name):
    assert earned(name, PAPER) == BY_HAND[name][0]
    assert earned(name, RELEASED) == BY_HAND[name][1]


def test_a_judge_that_reads_pays_for_the_label():
    reader = Judge(reads=True)
    assert earned("label behind the description", PAPER, reader) == (1, 1, 1, 1, 1.0) == earned("honest", PAPER, reader)
    assert earned("label for a description", RELEASED, reader) == (1, 1, 0, 1, 1.0)
    assert earned("wrong label in step 1 and box", PAPER, reader) == (1, 0, 1, 0, .15)  # one's own wrong guess, copied, is not coherent with the annotation


def test_a_penalty_takes_the_pay_away():
    def leak(completions, examples): return [float(x.label in (c.steps[0] or "")) for c, x in zip(completions, examples)]
    reader, fine = Judge(reads=True), [ExtraReward(leak, weight=-0.1)]
    for weights, without_coherence in ((PAPER, .95), (RELEASED, 1.0)):
        fined, paid = (earned("label behind the description", weights, reader, extras)[-1] for extras in (fine, ()))
        assert fined == pytest.approx(paid - .1) and fined <= without_coherence < paid
        assert earned("honest", weights, reader, fine) == earned("honest", weights, reader)
    pair = lambda extras: group_advantages(torch.tensor([[earned(n, PAPER, reader, extras)[-1] for n in ("honest", "label behind the description")]]))[0].tolist()
    assert pair([]) == [0, 0] and pair(fine) == pytest.approx([1, -1])


def test_probes_over_pictures():
    "Two pictures: each is described with the other's words in one probe, the wrong answer is the next label, and a gain is the distance to the twin."
    other = next(x for x in make_scenes("in_domain", "train", 40) if x.label == "awe")
    about = parse_set("<step1>A thing stands out.</step1><step2>A viewer would stare.</step2><step3>Positive.</step3>\\boxed{awe}")
    table = audit_probes([HONEST, about], [X, other], Judge(), PAPER)
    assert list(table.index) == list(BY_HAND) and table.loc["honest"].tolist() == pytest.approx([1, 1, .5, 1, .975, 0])
    assert table.loc["another picture's description", "consistency"] == .5  # the ghost's words about the other picture
    assert table.loc["empty box"].tolist() == pytest.approx([0, 0, 0, 0, 0, -table.loc["wrong answer", "overall"]])
    assert table.loc["two boxes", "gain"] == pytest.approx(0) and (table["gain"] <= 1e-9).all()
    fined = audit_probes([HONEST, about], [X, other], Judge(), PAPER, [ExtraReward(lambda cs, xs: [1.0] * len(cs), weight=-.1, name="always")])
    assert (table["overall"] - fined["overall"]).tolist() == pytest.approx([.1] * 20) and (fined["always"] == 1).all() and fined["gain"].tolist() == pytest.approx(table["gain"].tolist())


def test_probes_follow_the_templates():
    templates = PromptTemplates(set="{question} <a>See.</a> <b>Feel.</b> <c>Conclude.</c> Answer: \\boxed{label}", tags=("a", "b", "c"))
    honest = parse_set("<a>A ghost.</a><b>A shiver.</b><c>Negative.</c>\\boxed{fear}", templates.tags)
    probes = hacking_probes(honest, X, "awe", "A spider.", templates)
    assert probes["honest"][0] == "<a>A ghost.</a>\n<b>A shiver.</b>\n<c>Negative.</c>\n\\boxed{fear}"
    assert probes["prompt copied, box filled"][0].endswith("Answer: \\boxed{fear}") and parse_set(probes["prompt copied, box filled"][0], templates.tags).well_formed
    assert audit_probes([honest] * 2, [X] * 2, Judge(), PAPER, templates=templates).loc["honest", "overall"] == 1.0


@pytest.mark.parametrize("honest, wrong, says", [(parse_set("\\boxed{fear}"), "awe", "honest: <step1> is missing"), (HONEST, "fear", "wrong"), (HONEST, "fright", "wrong")])
def test_probes_refused(honest, wrong, says):
    with pytest.raises(ValueError, match=says): hacking_probes(honest, X, wrong, "A spider.")


def test_probes_need_two_pictures():
    with pytest.raises(ValueError, match="got 1 for 1 examples"): audit_probes([HONEST], [X], Judge())
    with pytest.raises(ValueError, match="got 2 for 1 examples"): audit_probes([HONEST] * 2, [X], Judge())
