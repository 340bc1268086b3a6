"""Four exact ways to score a group's completions and learn from them: operations and CPU time of the log-probabilities and their backward pass.

    python benchmarks/forms.py                        # three sizes, even and uneven completions; about a quarter of an hour
    python benchmarks/forms.py --sizes 148,8,64 --repeats 11

*repeated*: one row a completion, each with its own prompt and picture. *dense mask*: one packed row, and a 4-D mask through transformers' own attention, which computes siblings before it hides them.
*cache*: the prompt once, with gradient, its keys and values repeated for rows of completions, which are padded among themselves. *parts*: one packed row whose attention is computed in two parts,
the prompts' and the completions'; this is the library's. The forms take turns after one round to warm up; ratios are taken within a round. Uneven completions have R / 4 to R tokens.
Beside them stands the formula at Qwen2.5-VL-3B's shape: where layers are wide, what a mask computes in vain weighs less.
"""
import argparse
import sys
import time
import warnings
from collections.abc import Callable

import torch
from transformers import PreTrainedModel, Qwen2_5_VLConfig

from contenders import Case, Meter, examples_of, forced_ids, policy_of, processor_of, write
from flops import SIDES, forward_cost, update_cost
from gpu_step import QWEN_3B
from step import spread

from emo_r3.cost import Shape
from emo_r3.groups import encode_pictures, group_logps, pack_groups, predicting_slots
from emo_r3.policy import Prompts, completion_logps, encode_prompts, logits_to_logps
from emo_r3.prompts import set_messages

warnings.filterwarnings("ignore")


# -- the forms: each takes a model, K prompts, G completions of each (K * G, T) and their mask, and returns log-probabilities, 0 outside the mask ---------------
def repeated(model: PreTrainedModel, prompts: Prompts, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return completion_logps(model, prompts.take(owners(prompts, ids)).padded(), ids, mask) * mask


def dense_mask(model: PreTrainedModel, prompts: Prompts, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    batch, text = pack_groups(model, prompts, owners(prompts, ids), ids, mask), model.model.language_model
    group, member = torch.empty_like(batch.input_ids), torch.full_like(batch.input_ids, -1)  # whose each token is; -1: the prompt's
    for k, slots in enumerate(batch.prompt_slots): group[slots[slots >= 0]] = k
    for i, slots in enumerate(batch.completion_slots): group[slots[slots >= 0]], member[slots[slots >= 0]] = batch.prompt_of[i], i
    before = torch.ones(len(group), len(group), dtype=torch.bool).tril()
    seen = (group[:, None] == group) & ((member == -1) | (member[:, None] == member)) & before  # (S, S)
    embeds = text.get_input_embeddings()(batch.input_ids)
    embeds = embeds.masked_scatter((batch.input_ids == prompts.image_token_id)[:, None], torch.cat(encode_pictures(model, prompts.pictures)))
    text.config._attn_implementation = "sdpa"
    hidden = text(inputs_embeds=embeds[None], position_ids=batch.position_ids[:, None], attention_mask={"full_attention": seen[None, None]}, use_cache=False).last_hidden_state[0]
    real = batch.completion_slots >= 0
    logits = model.lm_head(hidden[predicting_slots(batch)[real]])
    return torch.zeros(ids.shape).masked_scatter(mask.bool(), logits_to_logps(model, logits[None], batch.input_ids[batch.completion_slots[real]][None])[0])


def cache(model: PreTrainedModel, prompts: Prompts, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    G, rows = len(ids) // len(prompts), prompts.padded()
    model.model.rope_deltas = None
    prefix = model(**rows, logits_to_keep=1, use_cache=True)
    prefix.past_key_values.batch_repeat_interleave(G)
    seen = rows["attention_mask"].repeat_interleave(G, 0)
    start = (rows["attention_mask"].sum(1, keepdim=True) + prefix.rope_deltas).repeat_interleave(G, 0)
    positions = (start + torch.arange(ids.shape[1])).expand(3, -1, -1)
    rest = model(input_ids=ids, attention_mask=torch.cat([seen, mask], 1), position_ids=positions, past_key_values=prefix.past_key_values, use_cache=True)
    return logits_to_logps(model, torch.cat([prefix.logits.repeat_interleave(G, 0), rest.logits[:, :-1]], 1), ids) * mask


def parts(model: PreTrainedModel, prompts: Prompts, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return group_logps(model, prompts, owners(prompts, ids), ids, mask)


def owners(prompts: Prompts, ids: torch.Tensor) -> torch.Tensor: return torch.arange(len(prompts)).repeat_interleave(len(ids) // len(prompts))


FORMS: dict[str, Callable] = {"repeated": repeated, "dense mask": dense_mask, "cache": cache, "parts": parts}


# -- measuring ----------------------------------------------------------------------------------------------------------------------------------------
def gradient(model: PreTrainedModel) -> torch.Tensor: return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def measure(case: Case, uneven: bool, repeats: int) -> dict:
    "Returns each form's operations, CPU seconds, ratios to `parts` round by round, and how far its numbers lie from the repeated form's."
    model, processor = policy_of(case), processor_of(case)
    prompts = encode_prompts(processor, [set_messages(x.question, x.load_image()) for x in examples_of(case, processor, case.prompts)])
    ids = forced_ids(case, model, case.prompts * case.num_generations)
    lengths = torch.linspace(case.completion_tokens / 4 if uneven else case.completion_tokens, case.completion_tokens, case.num_generations).round().long().repeat(case.prompts)
    mask = (torch.arange(case.completion_tokens) < lengths[:, None]).long()

    def run(form) -> torch.Tensor:
        model.zero_grad(set_to_none=True)
        logps = FORMS[form](model, prompts, ids, mask)
        (logps * mask).sum().backward()
        return logps.detach()

    out, truth, taught = {}, run("repeated"), gradient(model)
    for form in FORMS:
        with Meter() as meter: logps = run(form)
        out[form] = {"flop": meter.counter.get_total_flops(), **meter.kinds, "logps_differ": (logps - truth).abs().max().item(), "gradient_differs": ((gradient(model) - taught).norm() / taught.norm()).item()}
    took = {form: [] for form in FORMS}
    for _ in range(repeats + 1):
        for form in FORMS:
            start = time.process_time()
            run(form)
            took[form].append(time.process_time() - start)
    for form, row in out.items(): row |= {"cpu_s": spread(took[form][1:]), "cpu_s / parts": spread([a / b for a, b in zip(took[form][1:], took["parts"][1:])])}
    return out


def at_3b(case: Case) -> dict:
    "Returns the formula's operations at Qwen2.5-VL-3B's shape by form, for even lengths; `needed` and `as counted` as flops.py has them (a dense mask's square is computed in full: as counted)."
    shape, P = Shape.of(Qwen2_5_VLConfig(**QWEN_3B)), case.prompt_tokens
    forms = {"repeated": "repeated", "dense mask": "packed", "parts": "shared"}  # completions of one length need no padding, so the cache form computes what `parts` does
    costs = {"forward, needed": (forward_cost, False), "update, needed": (update_cost, False), "update, as counted": (update_cost, True)}
    return {name: {what: cost(shape, case, P, form, counted).total for what, (cost, counted) in costs.items()} for name, form in forms.items()}


def main() -> None:
    "Measures, writes results/forms.json."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["148,8,64", "355,8,96", "1000,8,300"], help="P,G,R: prompt tokens, completions, their tokens")
    parser.add_argument("--repeats", type=int, default=7, help="rounds, after one to warm up")
    parser.add_argument("--output", default="forms", help="name of the file in benchmarks/results")
    args = parser.parse_args()
    rows = []
    for P, G, R in (map(int, s.split(",")) for s in args.sizes):
        case = Case(prompts=1, num_generations=G, prompt_tokens=P, completion_tokens=R, side=SIDES.get(P, 4))
        for uneven in (False, True):
            rows.append({"P": P, "G": G, "R": R, "uneven": uneven, "image_tokens": case.side**2, "forms": measure(case, uneven, args.repeats), "at_3b": at_3b(case)})
            print(f"P {P} G {G} R {R}{' uneven' if uneven else ''}: " + "  ".join(f"{n} {f['flop'] / 1e9:.2f} GFLOP, CPU {f['cpu_s / parts']['median']:.2f}" for n, f in rows[-1]["forms"].items()), flush=True)
    print(write(args.output, " ".join(["python", "benchmarks/forms.py", *sys.argv[1:]]), rows=rows))


if __name__ == "__main__": main()
