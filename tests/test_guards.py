"""Code from outside, reward functions and judges: whatever it does wrong is an error with a name, within bounded time, and never a reward of 0."""
import _thread
import contextvars
import gc
import math
import re
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from emo_r3.parsing import parse_set
from emo_r3.reflection import reflect
from emo_r3.rewards import ExtraReward, RewardWeights, UserCodeError, as_number, call_guarded, extra_rewards, is_row, reward_completion
from emo_r3.scenes import BOOK_COMPLETIONS, book_example, make_scenes

BOOK = [parse_set(t) for t in BOOK_COMPLETIONS]
X = book_example()
OTHERS = make_scenes("in_domain", "test", 3)
GROUP = [X, *OTHERS]  # an example with its own id for each completion
LIMITS = pytest.mark.parametrize("timeout_s", [None, 5.0], ids=["direct", "thread"])
context = contextvars.ContextVar("context", default="nobody")


def extra(answer, weight=0.1, name="mine", timeout_s=5.0):
    return ExtraReward(answer if callable(answer) else lambda completions, examples: answer, weight, name, timeout_s)


def guarded(function, *arguments, timeout_s):
    return call_guarded(function, *arguments, who="reward function mine", about="completion 0", timeout_s=timeout_s)


class Says:
    "A judge with one answer to everything, or a function that makes it."
    def __init__(self, answer): self.answer = answer
    def score(self, messages, answers): return self.answer(messages) if callable(self.answer) else self.answer
    def generate(self, messages): return self.answer(messages) if callable(self.answer) else self.answer


def raises(error):
    def function(*arguments): raise error
    return function


def hangs(*arguments): threading.Event().wait(3600)


def within(seconds, function):
    "What the function raises, which must come soon."
    start = time.monotonic()
    with pytest.raises(UserCodeError) as e: function()
    assert time.monotonic() - start < seconds
    return str(e.value)


# --- the guard itself

@LIMITS
def test_what_comes_back_comes_back(timeout_s):
    thing = object()
    assert guarded(lambda a, b: (b, a), thing, 2, timeout_s=timeout_s) == (2, thing)
    assert guarded(lambda: None, timeout_s=timeout_s) is None
    assert guarded(lambda: ValueError("returned"), timeout_s=timeout_s).args == ("returned",)  # an error that is returned is a value


@LIMITS
@pytest.mark.parametrize("error, text", [
    (KeyError("price"), "KeyError: 'price'"), (RuntimeError("two\n lines"), "RuntimeError: two lines"), (ZeroDivisionError(), "ZeroDivisionError"), (StopIteration(3), "StopIteration: 3"),
    (ValueError("no"), "ValueError: no"), (OSError(28, "No space left on device"), "OSError: [Errno 28] No space left on device"), (AssertionError(), "AssertionError"), (TimeoutError("server"), "TimeoutError: server"),
])
def test_an_exception_is_named_and_chained(error, text, timeout_s):
    with pytest.raises(UserCodeError) as e: guarded(raises(error), timeout_s=timeout_s)
    assert str(e.value) == f"reward function mine failed, asked about completion 0: {text}"
    assert e.value.__cause__ is error and isinstance(e.value, ValueError)
    assert "raises.<locals>.function" in [f.f_code.co_qualname for f in frames(error.__traceback__)]  # the line that failed can be found


def frames(traceback):
    while traceback:
        yield traceback.tb_frame
        traceback = traceback.tb_next


@LIMITS
def test_an_error_whose_text_cannot_be_had(timeout_s):
    class Mute(Exception):
        def __str__(self): raise RuntimeError("no text")
    with pytest.raises(UserCodeError, match="mine failed, asked about completion 0: Mute$"): guarded(raises(Mute()), timeout_s=timeout_s)


def test_a_long_error_makes_a_short_message():
    with pytest.raises(UserCodeError) as e: guarded(raises(ValueError("x" * 10**6)), timeout_s=None)
    assert len(str(e.value)) < 500


@LIMITS
@pytest.mark.parametrize("kind, text", [(KeyboardInterrupt, "stop"), (SystemExit, 3), (MemoryError, ""), (MemoryError, "numpy"), (RuntimeError, "CUDA out of memory. Tried to allocate 2 GiB")])
def test_wishes_of_the_user_and_lack_of_memory_pass(kind, text, timeout_s):
    error = kind(text)
    with pytest.raises(type(error)) as e: guarded(raises(error), timeout_s=timeout_s)
    assert e.value is error and error.__cause__ is None
    lacks_memory = isinstance(error, Exception)
    assert getattr(error, "__notes__", []) == ["reward function mine was at work, asked about completion 0"] * lacks_memory


def test_torchs_own_out_of_memory_passes():
    import torch
    with pytest.raises(torch.OutOfMemoryError) as e: guarded(raises(torch.OutOfMemoryError("CUDA out of memory.")), timeout_s=None)
    assert type(e.value) is torch.OutOfMemoryError


@LIMITS
def test_a_guard_in_a_guard_is_named_once(timeout_s):
    def outer(): call_guarded(raises(KeyError("k")), who="judge Inner.score", about="a question", timeout_s=None)
    with pytest.raises(UserCodeError, match="^judge Inner.score failed, asked about a question: KeyError: 'k'$"): guarded(outer, timeout_s=timeout_s)


def test_a_hang_ends_and_is_named():
    said = within(1.5, lambda: guarded(hangs, timeout_s=0.3))
    assert said == "reward function mine has not come back after 0.3 s, asked about completion 0; timeout_s = 0.3 is how long it may take"


def test_the_limit_is_waited_for_and_no_longer():
    start = time.monotonic()
    assert guarded(lambda: time.sleep(0.25) or "done", timeout_s=5.0) == "done"
    assert time.monotonic() - start < 4
    start = time.monotonic()
    within(1.5, lambda: guarded(hangs, timeout_s=0.3))
    assert time.monotonic() - start >= 0.3


@pytest.mark.parametrize("timeout_s", [0, -1, 0.0, math.nan, math.inf, True, "5", [1]], ids=repr)
def test_limits_that_cannot_be_meant(timeout_s):
    for make in (lambda: guarded(int, timeout_s=timeout_s), lambda: extra([1.0], timeout_s=timeout_s), lambda: reflect([BOOK[3]], [X], Says([]), timeout_s=timeout_s)):
        with pytest.raises(ValueError, match="timeout_s: got .*allowed: a number of seconds above 0, or None"): make()


def test_no_limit_means_no_thread():
    here = threading.get_ident()
    assert guarded(threading.get_ident, timeout_s=None) == here != guarded(threading.get_ident, timeout_s=5.0)
    asked = []
    judge = Says(lambda messages: asked.append(threading.get_ident()) or ["Yes"] * len(messages))
    reflect(BOOK, [X] * 4, judge, mode="generate")
    assert asked == [here, here]
    reflect(BOOK, [X] * 4, judge, mode="generate", timeout_s=5.0)
    assert here not in asked[2:]


@LIMITS
def test_context_variables_are_seen_and_kept(timeout_s):
    token = context.set("caller")
    try:
        assert guarded(context.get, timeout_s=timeout_s) == "caller"
        guarded(context.set, "function", timeout_s=5.0)
        assert context.get() == "caller"  # the thread has a copy
    finally: context.reset(token)


@LIMITS
def test_what_a_failed_call_held_is_let_go(timeout_s):
    "Else the memory of a batch that did not fit would still be taken when the next one is tried."
    class Big: pass
    gone = []
    def function():
        big = Big()
        gone.append(weakref.ref(big))
        raise MemoryError
    gc.disable()
    try:
        try: guarded(function, timeout_s=timeout_s)
        except MemoryError: assert gone[0]() is not None
        for _ in range(100):  # the thread may need a moment to end
            if gone[0]() is None: break
            time.sleep(0.01)
        assert gone[0]() is None
    finally: gc.enable()


# --- Ctrl-C while waiting

def interrupted_after(arm, seconds=0.2):
    "How long a wait for a hanging function goes on once interrupted, seconds."
    start = time.monotonic()
    arm(seconds)
    with pytest.raises(KeyboardInterrupt): guarded(hangs, timeout_s=30.0)
    return time.monotonic() - start - seconds


def test_ctrl_c_gets_through_while_waiting():
    timers = []
    def arm(seconds):
        timers.append(threading.Timer(seconds, lambda: signal.raise_signal(signal.SIGINT)))
        timers[0].start()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try: assert interrupted_after(arm) < 1
    finally:
        signal.signal(signal.SIGINT, before)
        timers[0].join()


def test_interrupt_main_gets_through_while_waiting():
    "It sets a flag only, and wakes nobody: this one needs the slices."
    timers = []
    def arm(seconds):
        timers.append(threading.Timer(seconds, _thread.interrupt_main))
        timers[0].start()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try: assert interrupted_after(arm) < 1
    finally:
        signal.signal(signal.SIGINT, before)
        timers[0].join()


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="this system has no timers that send signals")
@pytest.mark.parametrize("stop", [SystemExit(143), KeyboardInterrupt("SIGTERM"), TimeoutError("a handler's own")], ids=repr)
def test_what_a_signal_handler_raises_gets_through_unchanged(stop):
    def handler(number, frame): raise stop
    before = signal.signal(signal.SIGALRM, handler)
    start = time.monotonic()
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with pytest.raises(type(stop)) as e: extra_rewards(BOOK, GROUP, [extra(hangs, timeout_s=30.0)])
        assert e.value is stop and time.monotonic() - start < 10
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_a_hanging_call_does_not_keep_the_process_alive():
    code = ("import threading\nfrom emo_r3.rewards import UserCodeError, call_guarded\n"
            "try: call_guarded(threading.Event().wait, who='it', about='all', timeout_s=0.2)\n"
            "except UserCodeError as error: print(error)")
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60, cwd=Path(__file__).parent.parent)
    assert done.stdout.startswith("it has not come back after 0.2 s, asked about all") and not done.stderr


# --- reward functions: what is believed

@pytest.mark.parametrize("came", [
    [1, 0, 0.5, -2], (1, 0, 0.5, -2), np.array([1, 0, 0.5, -2], dtype=np.float32), [np.float64(1), np.int64(0), Fraction(1, 2), -2], deque([True, False, 0.5, np.int8(-2)]),
], ids=lambda came: type(came).__name__)
def test_rows_of_numbers_are_believed(came):
    values = extra_rewards(BOOK, GROUP, [extra(came)])
    assert values == [{"mine": v} for v in (1.0, 0.0, 0.5, -2.0)] and all(type(v["mine"]) is float for v in values)


def test_tensors_and_bools_are_numbers():
    import torch
    for came in (torch.tensor([1.0, 0.0, 0.5, 0.0]), [torch.tensor(1), torch.tensor(False), torch.tensor(0.5, dtype=torch.bfloat16), torch.tensor([[0.0]])],
                 [True, False, 0.5, np.bool_(False)]):
        values = [v["mine"] for v in extra_rewards(BOOK, GROUP, [extra(came)])]
        assert values == [1.0, 0.0, 0.5, 0.0] and all(type(v) is float for v in values)


def test_functions_see_everything_once_and_in_order():
    seen = []
    def function(completions, examples):
        seen.append((list(completions), list(examples)))
        completions.reverse(); examples.clear()  # its own lists
        return [0.0, 1.0, 2.0, 3.0]
    completions, examples = list(BOOK), list(GROUP)
    values = extra_rewards(completions, examples, [extra(function), extra([4, 5, 6, 7], name="other")])
    assert seen == [(BOOK, GROUP)] and completions == BOOK and examples == GROUP
    assert values == [{"mine": i, "other": i + 4} for i in range(4)] and [list(v) for v in values] == [["mine", "other"]] * 4


def test_nothing_to_pay_and_nobody_who_pays():
    assert extra_rewards(BOOK, GROUP, []) == [{}] * 4 and extra_rewards([], [], [extra(raises(KeyError()))]) == []
    with pytest.raises(ValueError, match="examples: got 1 for 4 completions"): extra_rewards(BOOK, [X], [extra([1])])


# --- reward functions: what is not

FOR_ALL = rf"completions 0 to 3 \(examples '{X.id}' to '{OTHERS[-1].id}'\)"


@LIMITS
@pytest.mark.parametrize("came, says", [
    ([1, 2, 3], r"got 3 values, \[1, 2, 3\], for "), ([1] * 5, "got 5 values"), ([], r"got 0 values, \[\]"), (0.5, r"got 0\.5 for "), (1, "got 1 for"), (True, "got True"), (None, "got None for"), ("1111", "got '1111' for"),
    (b"1111", "got b'1111'"), (np.float32(1), "got "), (np.array(1.0), r"got array\(1"), ({0: 1, 1: 1, 2: 1, 3: 1}, r"got \{0: 1"), ({0.1, 0.2, 0.3, 0.4}, r"got \{0\.1"),
    ({X.id: 1.0}, r"got \{'"), (iter([1] * 4), "got <list_ite"), (range(3), "got 3 values"), (object(), "got <object obj"),
], ids=lambda came: str(came)[:16])
def test_what_is_no_row_of_n_numbers(came, says, timeout_s):
    with pytest.raises(UserCodeError, match=f"^reward function mine: {says}") as e: extra_rewards(BOOK, GROUP, [extra(came, timeout_s=timeout_s)])
    assert "expected a list of 4 numbers, one a completion" in str(e.value)
    with pytest.raises(UserCodeError, match=FOR_ALL): extra_rewards(BOOK, GROUP, [extra(came, timeout_s=timeout_s)])


def test_a_generator_is_not_run():
    ran = []
    def lazy(completions, examples):
        for c in completions:
            ran.append(c)
            yield 1.0
    with pytest.raises(UserCodeError, match="reward function lazy: got <generator ob"): extra_rewards(BOOK, GROUP, [ExtraReward(lazy, 1.0)])
    assert not ran


def test_a_coroutine_is_not_awaited():
    async def later(completions, examples): return [1.0] * 4
    made = []
    def kept(completions, examples):
        made.append(later(completions, examples))
        return made[0]
    with pytest.raises(UserCodeError, match="reward function kept: got <coroutine ob"): extra_rewards(BOOK, GROUP, [ExtraReward(kept, 1.0)])
    made[0].close()  # else Python warns that nobody awaited it


class Contrary:
    def __float__(self): raise OSError("no number today")
    def __repr__(self): return "Contrary()"


@LIMITS
@pytest.mark.parametrize("value, says", [
    (None, "got None"), (math.nan, "got nan; allowed: a finite number"), (math.inf, "got inf; allowed: a finite number"), (-math.inf, "got -inf"), (np.float32("nan"), "got nan"), ("1", "got '1'"), ("nan", "got 'nan'"), (b"1", "got b'1'"), ([1.0], r"got \[1\.0\]"),
    ({}, r"got \{\}"), (1j, "got 1j"), (10**400, "got 1000"), (Contrary(), r"got Contrary\(\)"), (1e7, "got 10000000.0, which with weight 0.1 adds 1e.06; "), (object, "got <class 'object'>"),
], ids=lambda value: str(value)[:16])
def test_what_is_no_reward_names_function_sample_and_value(value, says, timeout_s):
    with pytest.raises(UserCodeError, match=rf"^reward function mine: completion 2 \(example '{OTHERS[1].id}'\): {says}") as e:
        extra_rewards(BOOK, GROUP, [extra([1.0, 0.0, value, math.nan], timeout_s=timeout_s)])
    assert "allowed: " in str(e.value) and "\n" not in str(e.value) and len(str(e.value)) < 300


def test_torch_values_that_are_no_rewards():
    import torch
    for came, says in ((torch.tensor([0.0, math.nan, 0.0, 0.0]), "completion 1 .*got nan"), (torch.zeros(4, 2), r"completion 0 .*got tensor\(\[0"), (torch.tensor(1.0), r"got tensor\(1"), (torch.zeros(3), "got 3 values")):
        with pytest.raises(UserCodeError, match=says): extra_rewards(BOOK, GROUP, [extra(came)])


@LIMITS
def test_a_function_that_raises(timeout_s):
    def broken(completions, examples): return [1 / 0 for _ in completions]
    with pytest.raises(UserCodeError, match=f"^reward function broken failed, asked about {FOR_ALL}: ZeroDivisionError: division by zero$") as e: extra_rewards(BOOK, GROUP, [ExtraReward(broken, 1.0, timeout_s=timeout_s)])
    assert type(e.value.__cause__) is ZeroDivisionError
    with pytest.raises(UserCodeError, match=rf"asked about completion 0 \(example '{X.id}'\): "): extra_rewards(BOOK[:1], [X], [ExtraReward(broken, 1.0, timeout_s=timeout_s)])


def test_a_function_with_the_wrong_arguments():
    with pytest.raises(UserCodeError, match="reward function alone failed.*TypeError: .*takes 1 positional argument but 2 were given"):
        def alone(completions): return [0.0] * 4
        extra_rewards(BOOK, GROUP, [ExtraReward(alone, 1.0)])


def test_a_function_that_hangs():
    said = within(1.5, lambda: extra_rewards(BOOK, GROUP, [extra([1] * 4, name="quick"), extra(hangs, name="slow", timeout_s=0.3)]))
    assert said == (f"reward function slow has not come back after 0.3 s, asked about completions 0 to 3 (examples '{X.id}' to '{OTHERS[-1].id}'); "
                    "timeout_s = 0.3 is how long it may take")


class Row:
    "A list that does its work when it is read."
    def __init__(self, work): self.work = work
    def __len__(self): return 4
    def __getitem__(self, i):
        if i >= 4: raise IndexError
        return self.work(i)


def test_a_row_that_works_when_it_is_read_is_guarded_too():
    assert extra_rewards(BOOK, GROUP, [extra(Row(float))])[3] == {"mine": 3.0}
    assert "has not come back after 0.3 s" in within(1.5, lambda: extra_rewards(BOOK, GROUP, [extra(Row(hangs), timeout_s=0.3)]))
    with pytest.raises(UserCodeError, match="reward function mine failed, .*ConnectionError: gone"): extra_rewards(BOOK, GROUP, [extra(Row(raises(ConnectionError("gone"))))])
    assert "judge Says.score has not come back" in within(1.5, lambda: reflect(BOOK, GROUP, Says(Row(hangs)), timeout_s=0.3))


def test_nothing_becomes_a_silent_zero():
    "A record is only made of values that came; each failure above ends before one is."
    values = extra_rewards(BOOK, GROUP, [extra([3, 2, 1, 0], weight=0.1, name="a"), extra([1, 1, 0, 0], weight=-0.5, name="b")])
    records = [reward_completion(c, x.label, x.label_set, extra={"a": (0.1, v["a"]), "b": (-0.5, v["b"])}) for c, x, v in zip(BOOK, GROUP, values)]
    plain = [reward_completion(c, x.label, x.label_set) for c, x in zip(BOOK, GROUP)]
    assert [r.overall - p.overall for r, p in zip(records, plain)] == pytest.approx([-0.2, -0.3, 0.1, 0.0])


# --- what an extra reward must be

def function(completions, examples): return [0.0] * len(completions)


class Nameless:
    def __call__(self, completions, examples): return [0.0] * len(completions)


@pytest.mark.parametrize("kwargs, words", [
    (dict(function="length"), "function: got 'length'"), (dict(function=None), "function: got None"), (dict(function=lambda c, x: []), "name: got '<lambda>'"), (dict(function=Nameless()), "name: got ''"),
    *((dict(name=name), f"name: got {name!r}, which is taken") for name in ("overall", "accuracy", "format", "consistency", "coherence", "reflective")),
    *((dict(name=name), "name: got ") for name in ("two words", "a/b", "1st", "a-b", "rewards.a", "größe", "a\n", 7)),
    *((dict(weight=weight), "weight: got ") for weight in (math.nan, math.inf, -math.inf, None, "0.1", True, 1j)),
    *((dict(timeout_s=timeout_s), "timeout_s: got ") for timeout_s in (0, -1.0, math.nan, "60", False)),
], ids=lambda v: re.sub(r" at 0x\w+", "", str(v)))  # the same in every process
def test_extra_rewards_that_cannot_be_meant(kwargs, words):
    with pytest.raises(ValueError, match="^extra reward") as e: ExtraReward(**{"function": function, "weight": 0.1, **kwargs})
    assert words in str(e.value) and "allowed: " in str(e.value)


def test_extra_rewards_that_can():
    assert ExtraReward(function, 0.1) == ExtraReward(function, 0.1, "function", 60.0)
    assert ExtraReward(Nameless(), -2, name="_own2", timeout_s=None).name == "_own2" and ExtraReward(function, 0).weight == 0


def test_two_extras_with_one_name():
    ran = []
    def counted(completions, examples): ran.append(1)
    with pytest.raises(ValueError, match="extra rewards: two are called 'counted'; allowed: every name once"): extra_rewards(BOOK, GROUP, [ExtraReward(counted, 1.0), extra([1] * 4), ExtraReward(counted, 2.0)])
    assert not ran


def test_rows_and_numbers():
    assert all(map(is_row, ([], (), deque(), range(0), np.zeros(0), np.zeros((2, 2))))) and not any(map(is_row, ("", b"", {}, set(), iter(()), 1, None, np.zeros(()), {}.values())))
    assert [as_number(v) for v in (True, np.float32(0.5), Fraction(1, 4))] == [1.0, 0.5, 0.25]
    for value in ("1", b"1", bytearray(b"1"), None, [1.0]):
        with pytest.raises(TypeError): as_number(value)


# --- judges

MODES = pytest.mark.parametrize("mode", ["score", "generate"])


@MODES
@LIMITS
def test_a_judge_that_raises(mode, timeout_s):
    with pytest.raises(UserCodeError) as e: reflect(BOOK, GROUP, Says(raises(ConnectionError("server gone"))), mode=mode, timeout_s=timeout_s)
    assert str(e.value) == (f"judge Says.{mode} failed, asked about 3 questions, consistency of completion 0 (example '{X.id}') to consistency of completion 2 (example '{OTHERS[1].id}'): "
                            "ConnectionError: server gone")
    assert type(e.value.__cause__) is ConnectionError


@MODES
def test_a_judge_that_hangs(mode):
    said = within(1.5, lambda: reflect(BOOK, GROUP, Says(hangs), mode=mode, timeout_s=0.3))
    assert said.startswith(f"judge Says.{mode} has not come back after 0.3 s, asked about 3 questions, consistency of completion 0 (example '{X.id}') to ") and "timeout_s = 0.3" in said


@MODES
@LIMITS
def test_a_judge_that_fails_at_the_second_kind_of_question(mode, timeout_s):
    def pictures_only(messages):
        if not any(part["type"] == "image" for part in messages[0][0]["content"]): raise KeyError("image")
        return [[-1.0, -2.0]] * len(messages) if mode == "score" else ["Yes"] * len(messages)
    with pytest.raises(UserCodeError, match=rf"judge Says.{mode} failed, asked about coherence of completion 1 \(example '{X.id}'\): KeyError: 'image'"):
        reflect([BOOK[3], BOOK[0]], [OTHERS[0], X], Says(pictures_only), mode=mode, timeout_s=timeout_s)


@MODES
@LIMITS
@pytest.mark.parametrize("came", [None, 0.5, "Yes", [], {}, {"Yes"}, {0: "Yes"}, [None] * 3, [math.nan] * 3, [0.0] * 3, [[-1.0]] * 3, [[-1.0] * 3] * 3, [[math.nan, -1.0]] * 3, [[math.inf, -1.0]] * 3,
                                  [["-1", "-2"]] * 3, [[None, -1.0]] * 3, [[Contrary(), -1.0]] * 3, [[10**400, 0]] * 3, ["Yes"] * 2 + [[-1.0, -2.0]], [[-1.0, -2.0]] * 2, [[-1.0, -2.0]] * 4, np.zeros(()), np.zeros((3, 2, 1, 1)) + math.nan], ids=lambda came: repr(came)[:24])
def test_a_judge_that_answers_nonsense(came, mode, timeout_s):
    with pytest.raises(ValueError, match=f"^judge Says.{mode}: .*(expected|allowed|questions)"): reflect(BOOK, GROUP, Says(came), mode=mode, timeout_s=timeout_s)


@MODES
@LIMITS
def test_a_judge_that_answers_lazily(mode, timeout_s):
    ran = []
    def lazy(messages):
        for m in messages:
            ran.append(m)
            yield [-1.0, -2.0] if mode == "score" else "Yes"
    with pytest.raises(ValueError, match=f"judge Says.{mode}: got <generator ob"): reflect(BOOK, GROUP, Says(lazy), mode=mode, timeout_s=timeout_s)
    assert not ran


@MODES
@LIMITS
def test_scalars_of_torch_are_scores_but_never_texts(mode, timeout_s):
    import torch
    judge = Says(lambda messages: [[torch.tensor(-1.0), torch.tensor(-2.0)] + [-3.0] * (6 * ("Yes or No" not in m[0]["content"][-1]["text"])) for m in messages])
    if mode == "score": assert [v.consistency_answer for v in reflect(BOOK, [X] * 4, judge, timeout_s=timeout_s)] == ["Yes"] * 3 + [None]
    else:
        with pytest.raises(ValueError, match="expected a text"): reflect(BOOK, [X] * 4, judge, mode=mode, timeout_s=timeout_s)


@MODES
@LIMITS
@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(143), MemoryError(), RuntimeError("MPS backend out of memory")], ids=repr)
def test_what_passes_a_judge_unchanged(error, mode, timeout_s):
    with pytest.raises(type(error)) as e: reflect(BOOK, GROUP, Says(raises(error)), mode=mode, timeout_s=timeout_s)
    assert e.value is error


@MODES
def test_a_limit_does_not_change_what_is_found(mode):
    answers = {True: ([-1.0, -2.0], "Yes"), False: ([-float(k) for k in range(8)], "fear")}
    judge = Says(lambda messages: [answers["Yes or No" in m[0]["content"][-1]["text"]][mode == "generate"] for m in messages])
    for weights in (RewardWeights.preset("paper"), RewardWeights.preset("released")):
        assert reflect(BOOK, [X] * 4, judge, weights, mode=mode, timeout_s=5.0) == reflect(BOOK, [X] * 4, judge, weights, mode=mode)


@MODES
def test_a_judge_sees_context_variables(mode):
    seen = []
    token = context.set("run 7")
    try:
        with pytest.raises(ValueError): reflect(BOOK, [X] * 4, Says(lambda messages: seen.append(context.get())), mode=mode, timeout_s=5.0)
    finally: context.reset(token)
    assert seen == ["run 7"]


def test_ctrl_c_gets_through_a_waiting_judge():
    timer = threading.Timer(0.2, lambda: signal.raise_signal(signal.SIGINT))
    before, start = signal.signal(signal.SIGINT, signal.default_int_handler), time.monotonic()
    try:
        timer.start()
        with pytest.raises(KeyboardInterrupt): reflect(BOOK, GROUP, Says(hangs), timeout_s=30.0)
        assert time.monotonic() - start < 10
    finally:
        signal.signal(signal.SIGINT, before)
        timer.join()
