"""What test_sharding.py starts in each process: `FOLDER SHARDING [FIELD=VALUE ...]` trains in double precision on completions that do not depend on how many processes draw them. TEST_STOP as in two_ranks.py."""
import json
import os
import sys
import zlib
from dataclasses import replace
from pathlib import Path

import torch
from policies import double_throughout, processor

from emo_r3.checkpoint import gathered
from emo_r3.policy import join_prompts, load_policy
from emo_r3.ranks import Ranks
from emo_r3.sampling import PolicySampler
from emo_r3.scenes import make_scenes
from emo_r3.config import make_config, plain_config
from emo_r3.train import Rollouts, Trainer, begin_step, score_rollouts, train, update, widened
from test_resume import BASE
from two_ranks import stop_where_told

CONFIG = replace(BASE, prompts_per_step=8, prompts_per_update=4, train_size=16, max_steps=5, epochs=3, beta=0.02, max_completion_tokens=72, freeze_vision=False, eval_every=0, save_every=1, keep_last=9, sample_every=0, rank_timeout_s=120.0)


class ByPicture:
    "Draws each picture's completions by themselves, from a seed that is the picture's and the draw's: whichever rank does it, they are the same. Those of every third picture are cut short, so that ranks are uneven."
    def __init__(self, policy): self.sampler, self.calls = PolicySampler(policy, processor()), 0

    def sample(self, messages, num_generations, max_new_tokens, temperature=1.0, seed=None):
        self.calls += 1
        drawn = []
        for m in messages:
            key = zlib.crc32(next(c["image"] for turn in m if not isinstance(turn["content"], str) for c in turn["content"] if c["type"] == "image").tobytes())
            drawn.append(self.sampler.sample([m], num_generations, 9 if key % 3 == 0 else max_new_tokens, temperature, key + self.calls))
        wide, pad = max(d.completion_ids.shape[1] for d in drawn), drawn[0].prompts.pad_token_id
        rows = lambda name, fill: torch.cat([widened(getattr(d, name), wide, fill) for d in drawn])
        return Rollouts(join_prompts([d.prompts for d in drawn]), rows("completion_ids", pad), rows("completion_mask", 0), rows("logps", 0.0).double(), torch.cat([d.ended for d in drawn]), tuple(t for d in drawn for t in d.texts), num_generations)

    def kept_state(self): return self.calls
    def set_kept_state(self, calls): self.calls = calls


def bf16(sharding, *words):
    "Before the first update policy and reference are one, to the last bit, whether or not the tower learns; and with them the KL estimate is 0."
    ranks, examples = Ranks(120.0), make_scenes("in_domain", "train", 4, seed=3)
    for freeze in (True, False):
        config = replace(CONFIG, sharding=sharding, precision="bf16", freeze_vision=freeze, method="grpo", lr_schedule="constant", prompts_per_step=4, prompts_per_update=4, num_generations=2, max_completion_tokens=24)
        trainer = Trainer(config, load_policy(), processor(), ranks=ranks)
        begun = begin_step(trainer, ranks.share(examples), 5 + ranks.rank)
        with trainer.whole(), trainer.autocast(): own = score_rollouts(trainer.policy, begun.experience.rollouts, config, trainer.pictures)
        kinds = {name: b.dtype for name, b in trainer.policy.named_buffers()}
        assert torch.equal(own, begun.ref_logps) and kinds == {name: b.dtype for name, b in trainer.reference.named_buffers()}
        assert {p.dtype for p in trainer.policy.parameters()} == {torch.float32} and {p.dtype for n, p in trainer.reference.named_parameters()} == {torch.bfloat16}  # what learns, between steps; what never does
        kl = update(trainer, begun.experience, torch.arange(2), None, begun.ref_logps)["kl"]
        assert kl == 0 and not torch.equal(score_again(trainer, begun, config), own)


def score_again(trainer, begun, config):
    with trainer.whole(), trainer.autocast(): return score_rollouts(trainer.policy, begun.experience.rollouts, config, trainer.pictures)


def dead(sharding, *words):
    "An update in which no rank has a group that teaches is one all the same: AdamW's decay moves the weights, whatever the sharding."
    ranks, examples = Ranks(120.0), make_scenes("in_domain", "train", 4, seed=3)
    config = replace(CONFIG, sharding=sharding, beta=0.0, method="grpo", freeze_vision=True, lr_schedule="constant", weight_decay=0.1, learning_rate=1e-2, prompts_per_step=4, prompts_per_update=4, num_generations=2, max_completion_tokens=6)
    trainer = Trainer(config, load_policy(), processor(), ranks=ranks)
    begun = begin_step(trainer, ranks.share(examples), 5 + ranks.rank)
    none = replace(begun.experience, advantages=torch.zeros_like(begun.experience.advantages))
    before = gathered(trainer.policy.named_parameters(), True)
    before = {name: w.clone() for name, w in before.items()}
    update(trainer, none, torch.arange(2), None, None)
    for name, weight in gathered(trainer.policy.named_parameters(), True).items():
        if name in trainer.learns: torch.testing.assert_close(weight, before[name] * (1 - 1e-3), rtol=1e-6, atol=1e-9)


if __name__ == "__main__" and sys.argv[1] in ("bf16", "dead"):
    globals()[sys.argv[1]](*sys.argv[2:])
    print("finished", os.environ.get("RANK", 0), flush=True)
elif __name__ == "__main__":
    folder, sharding, *words = sys.argv[1:]
    stop_where_told(Path(folder))
    values = {name: json.loads(value) for name, _, value in (w.partition("=") for w in words)}
    config = make_config({**plain_config(CONFIG), "sharding": sharding, **values})
    with double_throughout():
        policy, ranks = load_policy(dtype="float64"), Ranks(config.rank_timeout_s)
        train(config, policy, processor(), make_scenes("in_domain", "train", 16, seed=3), folder, sampler=ByPicture(policy), ranks=ranks)
    print("finished", os.environ.get("RANK", 0), flush=True)
