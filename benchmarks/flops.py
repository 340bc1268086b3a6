"""Floating-point operations of an update and of a whole step, counted as they run (torch's FlopCounterMode), beside the closed formula of what the work needs.

    python benchmarks/flops.py            # one update: 27 sizes, three contenders; some minutes
    python benchmarks/flops.py --whole    # a whole step too: sampling, reference, update (forced lengths), and one with reflection (natural lengths)
    python benchmarks/flops.py --check    # the gate alone, in seconds: ours with shared prompts against the floor; exit code 1 beyond 5 %

Prompts reach their length exactly: the picture is enlarged (16, 196 or 784 image tokens for 148, 355 and 1000) and words are added to the question.
Completions have exactly R tokens: random ids for the update, and an end token that is never drawn for a whole step.

The formula comes two ways. *Needed*: a query looks at the keys before it (half of the square), and attention's backward pass costs twice its forward pass.
*As counted*: what torch counts for the same work, which ignores that half is masked, and counts the recomputation in attention's backward pass (5 products where the forward pass has 2).
Counts are compared with the second, MFU is reported with the first. torch's counter takes the CPU's attention kernel, and products in place, for nothing; contenders.py registers both.
"""
import argparse
import sys
from dataclasses import replace

from contenders import HERE, RESULTS, Case, Meter, Ours, Trl, write

from emo_r3.cost import Cost, Shape

SIDES = {148: 4, 355: 14, 1000: 28}  # a picture's edge in image tokens, for each length of prompt


# -- the formula --------------------------------------------------------------------------------------------------------------------------------------
def sizes(form: str, P: int, G: int, R: int, counted: bool) -> tuple[float, float, int]: # tokens, pairs of query and key, how often a picture is read
    "What a group costs in one form: shared (each thing once), packed (one row with a mask: siblings are computed, then hidden) or repeated (a prompt for each completion)."
    half = 1 if counted else 0.5
    if form == "shared": return P + G * R, half * P**2 + G * (R * P + half * R**2), 1
    if form == "packed": return P + G * R, half * (P + G * R) ** 2, 1
    if form == "repeated": return G * (P + R), half * G * (P + R) ** 2, G
    raise ValueError(f"form = {form!r}; allowed: shared, packed, repeated")


def forward_cost(shape: Shape, case: Case, P: int, form: str = "shared", counted: bool = False, vision: bool = True) -> Cost:
    "Returns one scoring pass without gradient over B groups; the shared form leaves out what nobody reads: all of a prompt but its last token, and each completion's last."
    G, R = case.num_generations, case.completion_tokens
    tokens, pairs, copies = sizes(form, P, G, R, counted)
    cost = shape.text(tokens, G * R, pairs, unread=P - 1 + G if form == "shared" else 0)
    return (cost + shape.picture(case.side, case.side) * copies * vision) * case.prompts


def update_cost(shape: Shape, case: Case, P: int, form: str = "shared", counted: bool = False, vision: bool = True, weight_gradients: bool = True) -> Cost:
    "Returns forward and backward pass of B groups; without weight gradients (adapters: their own few products left out) the backward pass is once the forward pass, not twice."
    back, back_attention = (2 if weight_gradients else 1), 2.5 if counted else 2
    tokens, pairs, copies = sizes(form, P, case.num_generations, case.completion_tokens, counted)
    text, tower = shape.text(tokens, case.num_generations * case.completion_tokens, pairs), shape.picture(case.side, case.side) * copies * vision
    cost = Cost((1 + back) * text.linear, (1 + back_attention) * text.attention)
    if case.freeze_vision or not weight_gradients or not vision: cost += tower
    else: cost += Cost(3 * tower.linear - copies * shape.pixels(case.side, case.side), (1 + back_attention) * tower.attention)
    return cost * case.prompts


def sampling_cost(shape: Shape, case: Case, P: int, form: str = "shared", counted: bool = False) -> Cost:
    "Returns drawing B * G completions of R tokens: the prompts once or G times, then token by token over the cache (nothing is masked there)."
    G, R, half = case.num_generations, case.completion_tokens, 1 if counted else 0.5
    times = G if form == "repeated" else 1
    decoded = G * (R - 1) * P + G * (R - 1) * R / 2
    unread = P - 1 if form == "shared" else 0  # of a prompt only the last token speaks
    return (shape.text(times * P + G * (R - 1), times + G * (R - 1), times * half * P**2 + decoded, unread) + shape.picture(case.side, case.side) * times) * case.prompts


def step_cost(shape: Shape, case: Case, P: int, form: str = "shared", counted: bool = False) -> Cost:
    "Returns sampling, reference pass (where beta > 0) and update; reflection's questions come on top, their length depends on what was written."
    again = form == "repeated" or not case.freeze_vision  # a tower that is frozen is the reference's too: what sampling saw serves all
    cost = sampling_cost(shape, case, P, form, counted) + update_cost(shape, case, P, form, counted, vision=again)
    return cost + forward_cost(shape, case, P, form, counted, vision=again) if case.beta else cost


# -- the counts ---------------------------------------------------------------------------------------------------------------------------------------
def count_update(case: Case, contender: str) -> dict:
    "Returns what one update of a contender is counted as."
    case = replace(case, beta=0.0)
    if contender == "trl":
        peer = Trl(case, reflect=False, made_up=True)
        with Meter() as meter: peer.run(1)
    else:
        mine = Ours(case, contender == "fast", reflect=False)
        experience = mine.forced_experience()
        with Meter() as meter: mine.update(experience)
    return {"total": meter.counter.get_total_flops(), **meter.kinds}


def count_step(case: Case, contender: str, forced: bool, reflection: str = "score") -> dict:
    "Returns what a whole step of a contender is counted as, by phase; forced lengths leave no readable completion, so reflection is measured at natural ones."
    if contender == "trl": runner = Trl(case, reflect=not forced, forced=forced)
    else: runner = Ours(case, contender == "fast", reflect=not forced, reflection=reflection, forced=forced)
    with Meter() as meter:
        runner.watch(meter)
        last = runner.run(1)[-1] if contender == "trl" else runner.step()
    return {"total": meter.counter.get_total_flops(), **meter.kinds, "phases": {k: v for k, v in meter.phases.items() if v}, "mean_length": last["completions/mean_length"],
            "asked": runner.counts.get("asked") if contender == "trl" else last["asked"]}


def prompt_length(case: Case) -> int:
    if case.prompt_tokens is not None: return case.prompt_tokens
    from contenders import examples_of, processor_of, prompts_of
    processor = processor_of(case)
    return prompts_of(processor, examples_of(case, processor, 1))["input_ids"].shape[1]


def shape_of(case: Case) -> Shape:
    from transformers import AutoConfig
    from emo_r3.policy import policy_path
    return Shape.of(AutoConfig.from_pretrained(policy_path(case.policy)))


def formulas(case: Case, cost=update_cost) -> dict:
    "Returns the formula's totals, in operations."
    shape, P = shape_of(case), prompt_length(case)
    return {f"{form}, {'as counted' if counted else 'needed'}": cost(shape, case, P, form, counted).total for form in ("shared", "repeated") for counted in (False, True)}


GATE = (Case(prompt_tokens=148, beta=0.0), Case(prompt_tokens=355, side=14, num_generations=4, completion_tokens=96, beta=0.0), Case(prompt_tokens=148, freeze_vision=True, beta=0.0))


def check(cases: tuple[Case, ...] = GATE, bound: float = 0.05) -> bool:
    "Returns whether one update with shared prompts stays within the bound of the floor, and prints why; what a mask wastes on siblings is named and not held against it."
    good = True
    for case in cases:
        shape, P = shape_of(case), case.prompt_tokens
        floor, repeated, counted = update_cost(shape, case, P, "shared", True), update_cost(shape, case, P, "repeated", True), count_update(case, "fast")
        whole, linear = counted["total"] / floor.total - 1, counted["linear"] / floor.linear - 1
        print(f"{case.label}{' vision frozen' if case.freeze_vision else ''}: {counted['total'] / 1e9:.3f} GFLOP counted, floor {floor.total / 1e9:.3f} ({whole:+.1%}), repeated prompts {repeated.total / 1e9:.3f} ({repeated.total / counted['total']:.2f} times ours)")
        if abs(whole) <= bound: continue
        packed = update_cost(shape, case, P, "packed", True)
        masked = counted["attention"] - floor.attention
        explained = abs(linear) <= bound and counted["attention"] <= packed.attention * (1 + bound)
        print(f"  products with weights {linear:+.1%}; attention {masked / 1e9:+.3f} GFLOP" + (f": the mask over siblings, at most {(packed.attention - floor.attention) / 1e9:.3f} in one row a group" if explained else ": beyond what a mask explains"))
        good &= explained and masked > 0
    print("within the bound" if good else f"BEYOND the bound of {bound:.0%}")
    return good


def draw(rows: list[dict], target) -> None:
    "Draws counted operations over the floor."
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    lengths = sorted({r["R"] for r in rows})
    figure, axes = plt.subplots(1, len(lengths), figsize=(3.2 * len(lengths), 3), sharey=True, squeeze=False, layout="constrained")
    for axis, R in zip(axes[0], lengths):
        for G, colour in zip(sorted({r["G"] for r in rows}), ("C0", "C1", "C2", "C3", "C4")):
            for name, style in (("fast", "-o"), ("plain", "--s"), ("trl", ":^")):
                points = sorted((r["P"], r[name]["total"] / r["update"]["shared, as counted"]) for r in rows if r["R"] == R and r["G"] == G and name in r)
                axis.plot(*zip(*points), style, color=colour, ms=4, lw=1.2, label=f"{name}, G = {G}" if axis is axes[0][0] else None)
        axis.set(title=f"completions of {R} tokens", xlabel="prompt tokens", yscale="log", xscale="log")
        axis.set_xticks(sorted({r["P"] for r in rows}), sorted({r["P"] for r in rows}))
        axis.minorticks_off()
        axis.set_yticks([1, 2, 4, 8, 16], [1, 2, 4, 8, 16])
    axes[0][0].set_ylabel("operations of an update / floor")
    figure.legend(loc="outside right", fontsize=7)
    figure.savefig(target, dpi=110)


def main() -> None:
    "Counts, writes results/flops.json and flops.webp."
    numbers = lambda text: [int(n) for n in text.split(",")]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt-tokens", type=numbers, default=[148, 355, 1000])
    parser.add_argument("--groups", type=numbers, default=[4, 8, 16], help="G")
    parser.add_argument("--completion-tokens", type=numbers, default=[64, 96, 300])
    parser.add_argument("--contenders", type=lambda t: t.split(","), default=["fast", "plain", "trl"])
    parser.add_argument("--whole", action="store_true", help="count a whole step too")
    parser.add_argument("--freeze-vision", action="store_true")
    parser.add_argument("--check", action="store_true", help="the gate alone")
    parser.add_argument("--output", default="flops", help="name of the files in benchmarks/results")
    args = parser.parse_args()
    if args.check: sys.exit(0 if check() else 1)
    rows = []
    for P in args.prompt_tokens:
        for R in args.completion_tokens:
            for G in args.groups:
                case = Case(prompts=1, num_generations=G, prompt_tokens=P, completion_tokens=R, side=SIDES.get(P, 4), freeze_vision=args.freeze_vision)
                row = {"P": P, "G": G, "R": R, "image_tokens": case.side**2, "update": formulas(case)} | {name: count_update(case, name) for name in args.contenders}
                if args.whole: row |= {"step": formulas(case, step_cost)} | {f"{name}, whole step": count_step(case, name, forced=True) for name in args.contenders}
                rows.append(row)
                floor = row["update"]["shared, as counted"]
                print(f"P {P:5d}  G {G:3d}  R {R:4d}  floor {floor / 1e9:8.2f} GFLOP (needed {row['update']['shared, needed'] / 1e9:8.2f}), repeated {row['update']['repeated, as counted'] / floor:5.2f} | "
                      + "  ".join(f"{name} {row[name]['total'] / floor:5.2f}" for name in args.contenders)
                      + ("" if not args.whole else " | step: " + "  ".join(f"{name} {row[f'{name}, whole step']['total'] / row['step']['shared, as counted']:5.2f}" for name in args.contenders)), flush=True)
    natural = {}
    if args.whole:
        case = Case(prompts=4, freeze_vision=args.freeze_vision)
        natural = {name: count_step(case, name, forced=False) for name in args.contenders}
        for name, row in natural.items(): print(f"with reflection, natural lengths, {name}: {row['total'] / 1e9:.2f} GFLOP {({k: round(v / 1e9, 2) for k, v in row['phases'].items()})}, {row['asked']} asked, mean length {row['mean_length']}")
    print(write(args.output, " ".join(["python", "benchmarks/flops.py", *sys.argv[1:]]), rows=rows, with_reflection=natural))
    draw(rows, RESULTS / f"{args.output}.webp")


if __name__ == "__main__": main()
