"""The fingerprint of a user's functions: changed by what they do, and by nothing else."""

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from mutune.search.own_code import fingerprints
from tests.search import own


def of(function: Callable[..., Any]) -> dict[str, str]:
    return fingerprints({"f": function})


def made(source: str, **names: Any) -> dict[str, str]:
    """The fingerprint of `f` of this source, as of a notebook's cell."""
    namespace: dict[str, Any] = {"__name__": "__main__", **names}
    exec(source, namespace)
    return of(namespace["f"])


F = "def f(x):\n    return x + STEPS\n"


def test_comments_and_layout_and_where_it_stands_do_not_count() -> None:
    assert made(F, STEPS=3) == made("\n\ndef f(x):\n    # a word\n    return (x\n        + STEPS)\n", STEPS=3)


def test_an_operation_a_constant_a_default_and_a_global_value_count() -> None:
    first = made(F, STEPS=3)
    assert made(F.replace("+", "-"), STEPS=3) != first
    assert made(F, STEPS=4) != first
    assert made(F.replace("STEPS", "3")) != made(F.replace("STEPS", "4"))
    assert made(F.replace("x)", "x=1)"), STEPS=3) != made(F.replace("x)", "x=2)"), STEPS=3)


@dataclass
class Settings:
    steps: int


def test_settings_and_data_count_and_lists_that_loops_fill_do_not() -> None:
    for one, other in (
        ({"steps": 3}, {"steps": 4}),
        ((1, 2), (1, 3)),
        (Settings(3), Settings(4)),
        (torch.zeros(3), torch.ones(3)),
        (torch.zeros(2, dtype=torch.bfloat16), torch.zeros(3, dtype=torch.bfloat16)),
        (np.zeros(3), np.zeros(3, dtype=np.float32)),
    ):
        assert made(F, STEPS=one) == made(F, STEPS=copy.deepcopy(one)) != made(F, STEPS=other)
    assert made(F, STEPS=[1]) == made(F, STEPS=[1, 2])


@pytest.mark.parametrize(
    "source",
    [
        "def f(x):\n    if x not in MEMO:\n        MEMO[x] = x + 1\n    return MEMO[x]\n",
        "def f(x):\n    MEMO['sums'][x] += 1\n",
        "def f(x):\n    return MEMO.setdefault(x, 3)\n",
        "def f(x):\n    del MEMO[x]\n",
        "def f(x):\n    global MEMO\n    MEMO = MEMO or {x: 1}\n    return MEMO\n",
        "def g(x):\n    MEMO.update(x=1)\ndef f(x):\n    g(x)\n    return MEMO\n",
        "def f(x, memo=MEMO):\n    memo[x] = 1\n",
        "def f(*, memo=MEMO):\n    memo[0] = 1\n",
        "class C:\n    memo = MEMO\n    def put(self, x):\n        self.memo[x] = 1\ndef f():\n    return C()\n",
        "def f(x):\n    def inner():\n        MEMO[x] = 1\n    return inner\n",
    ],
)
def test_what_the_functions_write_to_is_state_and_does_not_count(source: str) -> None:
    assert made(source, MEMO={}) == made(source, MEMO={3: 4})
    assert made(source, MEMO={}) != made(source.replace("def f(", "def f(y, "), MEMO={})


@pytest.mark.parametrize(
    "source",
    [
        "def f(x):\n    x['lr'] = SETTINGS['lr']\n",
        "def f(x):\n    x[SETTINGS['lr']] = 1\n",
        "def f(x):\n    x.update(SETTINGS)\n",
        "def f(x):\n    return SETTINGS\ndef other():\n    SETTINGS[0] = 1\n",  # not of its functions
        "def f(x, settings=SETTINGS, memo={}):\n    memo[x] = settings\n",
    ],
)
def test_what_they_only_read_counts(source: str) -> None:
    assert made(source, SETTINGS={"lr": 1}) != made(source, SETTINGS={"lr": 2})


def test_a_memo_in_a_closure_and_a_nonlocal_counter_do_not_count() -> None:
    def make(settings: dict[str, int]) -> Callable[[int], int]:
        memo: dict[int, int] = {}
        calls = 0

        def f(x: int) -> int:
            nonlocal calls
            calls += 1
            memo[x] = calls + settings["steps"]
            return memo[x]

        return f

    f = make({"steps": 3})
    before = of(f)
    f(3)
    assert of(f) == before == of(make({"steps": 3})) != of(make({"steps": 4}))


def test_what_holds_itself_counts_once() -> None:
    def knot(steps: int) -> dict[str, Any]:
        held: dict[str, Any] = {"steps": steps}
        held["self"], held["pair"], held["list"] = held, (held, steps), [held]
        return held

    assert made(F, STEPS=knot(3)) == made(F, STEPS=knot(3)) != made(F, STEPS=knot(4))


def test_a_dict_that_is_keyed_by_functions_is_the_same_in_every_process() -> None:
    def keyed(value: int) -> dict[Any, int]:
        return {type("Key", (), {}): value, lambda: 3: value}

    assert made(F, STEPS=keyed(3)) == made(F, STEPS=keyed(3)) != made(F, STEPS=keyed(4))


def test_an_object_that_answers_to_every_name_is_no_wrapper() -> None:
    class Any_:
        def __getattr__(self, name: str) -> "Any_":
            return self

        def __call__(self) -> int:
            return 3

    assert set(of(Any_())) == {"f.__getattr__", "f.__call__"}


def test_a_global_that_is_not_read_does_not_count() -> None:
    source = "def f(x):\n    return x.item()\n"
    assert made(source, item=1) == made(source, item=2)


def test_what_it_calls_counts_by_name() -> None:
    source = "def g(x):\n    return {}\ndef f(x):\n    return [g(y) for y in x]\n"
    one, two = made(source.format("x")), made(source.format("-x"))
    assert set(one) == {"f", "g"}
    assert one["f"] == two["f"]
    assert one["g"] != two["g"]


def test_the_methods_of_a_class_and_of_its_bases_count_and_a_librarys_do_not() -> None:
    class Child(own.Net):
        steps = 3

        @property
        def size(self) -> int:
            return 3

    assert set(of(lambda width: Child(width))) == {"f", "Child", "Child.size", "Net.__init__", "Net.forward"}
    assert set(of(lambda width: nn.Linear(width, width))) == {"f"}


def test_closures_partials_objects_and_wrappers_are_looked_into() -> None:
    def closed(steps: int) -> Callable[[], int]:
        return lambda: steps

    assert of(closed(3)) == of(closed(3)) != of(closed(4))
    assert of(functools.partial(own.train, steps=3)).keys() == of(own.train).keys()

    class Loop:
        def __call__(self) -> int:
            return 3

    assert set(of(Loop())) == {"f.__call__"}


def test_two_functions_of_one_name_both_count() -> None:
    def other(number: int) -> Callable[[], int]:
        def helper() -> int:
            return 1

        first = helper

        def helper() -> int:  # type: ignore[no-redef]
            return 2 if number else 3

        return lambda: first() + helper()

    assert "helper" in of(other(1))
    assert of(other(1)) == of(other(1)) != of(other(0))


def test_a_set_of_constants_prints_the_same_in_every_process() -> None:
    import subprocess
    import sys

    from tests import doors

    code = (
        "from mutune.search.own_code import fingerprints\n"
        "def f(x):\n    return x in {'a', 'b', 'c', 'd', 'e'}\n"
        "print(fingerprints({'f': f}))"
    )
    run = functools.partial(subprocess.run, [sys.executable, "-c", code], capture_output=True, text=True, check=True)
    outputs = {run(cwd=doors.ROOT, env={"PYTHONHASHSEED": str(seed)}).stdout for seed in (1, 2)}
    assert len(outputs) == 1
