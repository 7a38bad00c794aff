"""Worker processes: every task is done once, a dead worker's task is done again, an exception stops the work."""

import os
import signal
import time
from pathlib import Path

import pytest

from mutune.parametrization.finding import AuditError, Finding
from mutune.search.workers import WorkError, run_all


def square(x: int) -> int:
    return x * x


def die_once(marker: str) -> str:
    path = Path(marker)
    if not path.exists():
        path.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return "survived"


def die_always(x: int) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return x


def fail(x: int) -> int:
    raise KeyError(f"task {x} is broken")


def stopped_by_an_audit(x: int) -> int:
    raise AuditError([Finding("wte.weight", "learning rate", 0.02, 0.01, "why")])


def threads_and_sleep(x: int) -> tuple[int, int]:
    import torch

    time.sleep(0.2)
    return torch.get_num_threads(), os.getpid()


def test_every_task_is_done_exactly_once() -> None:
    assert sorted(run_all(square, list(range(7)), workers=2)) == [(x, x * x) for x in range(7)]


def test_workers_have_one_thread_each_and_share_the_tasks() -> None:
    results = [result for _, result in run_all(threads_and_sleep, list(range(6)), workers=2)]
    assert {threads for threads, _ in results} == {1}
    assert len({pid for _, pid in results}) == 2


def test_the_task_of_a_dead_worker_is_done_again(tmp_path: Path) -> None:
    task = str(tmp_path / "marker")
    assert list(run_all(die_once, [task], workers=1)) == [(task, "survived")]


def test_workers_that_keep_dying_stop_the_work() -> None:
    with pytest.raises(WorkError, match="keep dying"):
        list(run_all(die_always, [1], workers=1))


def test_an_exception_in_a_task_stops_the_work_with_its_traceback() -> None:
    with pytest.raises(WorkError, match="task 3 is broken"):
        list(run_all(fail, [3], workers=2))


def test_what_an_audit_found_stops_the_work_without_a_traceback() -> None:
    with pytest.raises(WorkError) as caught:
        list(run_all(stopped_by_an_audit, [3], workers=1))
    assert str(caught.value) == (
        "3 failed:\nthe audit found 1 mismatch with the plan:\n- wte.weight: learning rate is 0.01, expected 0.02; why."
    )


def test_no_task_needs_no_worker() -> None:
    assert list(run_all(square, [], workers=2)) == []
