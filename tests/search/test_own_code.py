"""The fingerprint of a user's functions: changed by what they do, and by nothing else."""

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
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
