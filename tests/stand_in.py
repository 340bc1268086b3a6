"""An engine behind the sampler's protocol that is no vLLM: a copy of the policy, which has new weights only when they are handed over. What vLLM itself does, tests/engine shows."""
import copy

import torch

from emo_r3.policy import Prompts, unwrapped
from emo_r3.sampling import PolicySampler, mask_after_end, next_token_logps
from emo_r3.vllm_sampler import Drawn, full_weights


class StandIn:
    dtype, longest = "float32", None

    def __init__(self, policy, processor):
        self.sampler, self.events, self.spoil = PolicySampler(copy.deepcopy(unwrapped(policy)), processor), [], lambda read, drawn: (read, drawn)

    def wake(self): self.events.append("wake")
    def sleep(self): self.events.append("sleep")
    def close(self): self.events.append("close")

    def take(self, policy):
        self.events.append("take")
        self.sampler.model.load_state_dict(dict(full_weights(policy)), strict=False)

    def ask(self, asks):
        self.events.append("ask")
        return [self.spoil(list(a.becomes), self.answers(a)) for a in asks]

    def answers(self, a):
        p, model = a.params, self.sampler.model
        prompts = Prompts((torch.tensor(a.becomes),), (a.picture,) if a.picture else (), (0 if a.picture else None,), model.config.image_token_id, 0)
        if "logprob_token_ids" in p:
            values = (next_token_logps(model, prompts)[0] / (p["temperature"] or 1)).log_softmax(0)
            return [Drawn((int(values.argmax()),), (values.max().item(),), {t: values[t].item() for t in p["logprob_token_ids"]})]
        ids, logps = self.sampler.draw(prompts, p["n"], p["max_tokens"], p["temperature"], p["seed"])
        lengths = mask_after_end(ids, p["stop_token_ids"]).sum(1)
        return [Drawn(tuple(i[:n].tolist()), tuple(l[:n].tolist()), {}) for i, l, n in zip(ids, logps, lengths)]
