"""vLLM's own server as the judge of page 17, holding the embedded policy: what comes over the wire is what the policy says in this process."""
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("vllm")
sys.path.insert(0, str(Path(__file__).parents[1]))
from served import vllm_server  # noqa: E402
from test_interop import ours, shares  # noqa: E402

import emo_r3.interop as interop  # noqa: E402
from emo_r3.data import EMOSET8  # noqa: E402
from emo_r3.interop import HttpJudge, compute_score  # noqa: E402
from emo_r3.policy import load_policy, load_processor  # noqa: E402
from emo_r3.prompts import coherence_messages, consistency_messages, set_messages  # noqa: E402
from emo_r3.sampling import PolicyJudge, PolicySampler  # noqa: E402
from emo_r3.scenes import make_scenes  # noqa: E402

pytestmark = pytest.mark.vllm


def test_a_real_engine_s_server_judges_as_the_policy_does(tmp_path):
    "Pictures of several sizes, labels of several tokens, both ways of scoring, written answers, and the rewards of real completions."
    policy, processor = load_policy(), load_processor()
    here, scenes = PolicyJudge(policy, processor), make_scenes("in_domain", "train", 3)
    questions = [consistency_messages(x.load_image().resize(s), f"A ghost and a {w}.") for x, s, w in zip(scenes, [(96, 96), (160, 96), (60, 150)], ("key", "clock", "tree"))] + [coherence_messages("A ghost.<|im_end|>", "A viewer would laugh.", EMOSET8)]
    options = [("Yes", "No")] * 3 + [EMOSET8.labels]
    with vllm_server("--served-model-name", "embedded", "--max-model-len", "1024") as address:
        url = f"{address}/v1"
        want, judge = shares(here.score(questions, options)), HttpJudge(url, scores="prompt", timeout_s=120)
        assert judge.server.model == "embedded"
        for a, b in zip(shares(judge.score(questions, options)), want): assert (a - b).abs().max() < 1e-5
        for a, b in zip(shares(HttpJudge(url, timeout_s=120).score(questions, options))[:3], want): assert (a - b).abs().max() < 1e-5
        several = [("fear of heights", "fear of spiders", "awe and fear")]
        assert torch.allclose(torch.tensor(judge.score(questions[:1], several)).log_softmax(1), torch.tensor(here.score(questions[:1], several)).log_softmax(1), atol=1e-3)
        assert judge.generate(questions) == here.generate(questions)
        asked = make_scenes("in_domain", "train", 2, seed=9)
        rollouts = PolicySampler(policy, processor).sample([set_messages(x.question, x.load_image()) for x in asked], 4, 64, seed=4)
        expected, rows = ours(rollouts.texts, [x for x in asked for _ in range(4)], "released", judge=here), interop.verl_rows(asked, tmp_path / "pictures")
        got = compute_score(data_sources=["s"] * 8, solution_strs=list(rollouts.texts), ground_truths=[rows[i // 4]["reward_model"]["ground_truth"] for i in range(8)], extra_infos=None, preset="released", judge_url=url)
        assert [s["score"] for s in got] == [r.overall for r in expected]
