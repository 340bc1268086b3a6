"""What several test files need: the embedded policy as every kind of policy, ragged groups with pictures of several sizes, arithmetic that is double throughout, and a score worked out by hand."""
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import torch
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as qwen

from emo_r3.data import EMOTION6
from emo_r3.policy import Prompts, add_lora, completion_logps, encode_prompts, load_policy, load_processor, unwrapped
from emo_r3.prompts import coherence_messages, consistency_messages, set_messages
from emo_r3.scenes import make_scenes

KINDS = ("full", "lora", "four_bit")


@cache
def processor(): return load_processor()


def policy(kind="full", dtype="float32"):
    "A fresh policy; an adapter's B is not zero, as if it had been trained."
    if kind == "full": return load_policy(dtype=dtype)
    model = add_lora(load_policy(four_bit=kind == "four_bit", dtype=dtype), rank=4, alpha=8.0)
    gen = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name: p.copy_(0.1 * torch.randn(p.shape, generator=gen))
    return model


def answers(*texts):
    "Ids and mask of texts, padded on the right."
    out = processor().tokenizer(list(texts), padding=True, padding_side="right", return_tensors="pt", add_special_tokens=False)
    return out["input_ids"], out["attention_mask"]


@dataclass
class Groups:
    "Prompts and the completions that follow them."
    prompts: Prompts
    prompt_of: torch.Tensor
    ids: torch.Tensor
    mask: torch.Tensor

    @property
    def shared(self): return self.prompts, self.prompt_of, self.ids, self.mask

    @property
    def repeated(self): return self.prompts.take(self.prompt_of).padded(), self.ids, self.mask


END = "<|im_end|>"
TEXTS = ("A ghost stands out." + END, "fear", "Positive, high arousal. \\boxed{awe}" + END, "Yes" + END, "No, not at all" + END, "A key.", "a", "awe and fear" + END, "a b c d e f g")


@cache
def groups():
    "Five prompts with 3, 1, 2, 1 and 2 completions of 1 to 20 tokens: three sizes of pictures, one prompt without any, and one that shows another's picture again."
    a, b, c = (x.image.resize(s) for x, s in zip(make_scenes("in_domain", "train", 3), [(96, 96), (160, 96), (60, 150)]))
    ask = make_scenes("in_domain", "train", 1)[0].question
    asked = [set_messages(ask, a), coherence_messages("A ghost stands out.", "A viewer would shiver.", EMOTION6), set_messages(ask, b), set_messages(ask + " Think.", c), consistency_messages(a, "A ghost.")]
    prompts, (ids, mask) = encode_prompts(processor(), asked), answers(*TEXTS)
    assert len(set(prompts.lengths.tolist())) > 3 and len({p.grid for p in prompts.pictures}) == 3 and prompts.picture_of == (0, None, 1, 2, 0)
    assert len(set(mask.sum(1).tolist())) > 4 and (mask.sum(1) == 1).any()
    return Groups(prompts, torch.tensor([0, 0, 0, 1, 2, 2, 3, 4, 4]), ids, mask)


def weights(mask):
    "A different weight for every completion token, so that no two can be exchanged unnoticed."
    return torch.linspace(-1, 1, mask.numel(), dtype=torch.float64).view(mask.shape).mul(mask)


def gradient(model, logps, mask):
    "What a weighted sum of log-probabilities teaches, one vector; 0 where nothing came."
    model.zero_grad(set_to_none=True)
    (logps * weights(mask).to(logps)).sum().backward()
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in model.parameters() if p.requires_grad])


def far(a, b):
    "The relative difference of two gradients."
    return ((a - b).norm() / b.norm()).item()


def plain_logps(model, g, temperature=1.0): return completion_logps(model, *g.repeated, temperature) * g.mask


@contextmanager
def double_throughout():
    "transformers' norms, and its vision tower's rotary embedding, round to single precision inside; here they do not, for whichever form runs."
    norm, rotary = qwen.Qwen2_5_VLRMSNorm.forward, qwen.apply_rotary_pos_emb_vision
    def exact_norm(self, x): return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))
    def exact_rotary(q, k, cos, sin): return tuple(x * cos.unsqueeze(-2) + qwen.rotate_half(x) * sin.unsqueeze(-2) for x in (q, k))
    qwen.Qwen2_5_VLRMSNorm.forward, qwen.apply_rotary_pos_emb_vision = exact_norm, exact_rotary
    try: yield
    finally: qwen.Qwen2_5_VLRMSNorm.forward, qwen.apply_rotary_pos_emb_vision = norm, rotary


def positions_by_hand(ids, image_token, rows, columns):
    "Time, row and column of each token of a prompt with one picture of rows x columns tokens (0 x 0: none), counted on one's fingers."
    table, at, k = [], 0, 0
    for token in ids.tolist():
        if token == image_token:
            table.append((at, at + k // columns, at + k % columns))
            k += 1
            if k == rows * columns: at += max(rows, columns)
        else:
            table.append((at, at, at))
            at += 1
    return table, at


def logps_by_hand(model, g, temperature=1.0):
    "Every completion alone, unpadded, behind its own prompt, with positions by hand and no help from transformers' rope index; (N, T)."
    base, out = unwrapped(model), torch.zeros(g.ids.shape, dtype=model.dtype)
    for i, k in enumerate(g.prompt_of.tolist()):
        n, prompt, shown = int(g.mask[i].sum()), g.prompts.ids[k], g.prompts.picture_of[k]
        grid = (0, 0) if shown is None else tuple(s // 2 for s in g.prompts.pictures[shown].grid[1:])
        table, at = positions_by_hand(prompt, g.prompts.image_token_id, *grid)
        positions = torch.tensor(table + [(at + t,) * 3 for t in range(n)]).T[:, None]  # (3, 1, P + n)
        row = torch.cat([prompt, g.ids[i, :n]])
        embeds = base.get_input_embeddings()(row)
        if shown is not None:
            picture = g.prompts.pictures[shown]
            seen = base.model.get_image_features(picture.pixel_values, torch.tensor([picture.grid]), return_dict=True).pooler_output[0]
            embeds = embeds.masked_scatter((row == g.prompts.image_token_id)[:, None], seen.to(embeds))
        logits = base.lm_head(base.model.language_model(inputs_embeds=embeds[None], position_ids=positions, use_cache=False).last_hidden_state[0])
        banned = [base.config.image_token_id, base.config.video_token_id, base.config.vision_start_token_id, base.config.vision_end_token_id]
        logits = logits.index_fill(-1, torch.tensor(banned), float("-inf"))[len(prompt) - 1: -1] / temperature
        out[i, :n] = logits.log_softmax(-1).gather(1, row[len(prompt):, None])[:, 0]
    return out


@contextmanager
def pictures_read(model):
    "Counts the pictures that go through the vision tower."
    seen = []
    hook = unwrapped(model).model.visual.register_forward_pre_hook(lambda m, args, kwargs: seen.extend(kwargs.get("grid_thw", args[1] if len(args) > 1 else None).tolist()), with_kwargs=True)
    try: yield seen
    finally: hook.remove()
