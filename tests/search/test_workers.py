"""Worker processes: every task is done once, a dead worker's task is done again, an exception stops the work."""

import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from mutune.errors import Refusal
from mutune.parametrization.finding import AuditError, Finding
from mutune.search.workers import UserCodeError, WorkError, Workers, run_all


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


def test_functions_and_tasks_come_by_value(tmp_path: Path) -> None:
    class Local:
        def __init__(self, number: int) -> None:
            self.number = number

    factor = 3
    task = Local(7)
    assert [result for _, result in run_all(lambda task: factor * task.number, [task], workers=1)] == [21]


def test_workers_stay_for_more_work() -> None:
    with Workers(threads_and_sleep, 1) as pool:
        pids = {pid for _ in range(2) for _, (_, pid) in pool.run([1])}
        assert len(pids) == 1
    assert [pid for _, (_, pid) in run_all(threads_and_sleep, [1], workers=0)] == [os.getpid()]


def test_what_a_task_raises_here_comes_as_it_is_and_names_the_task() -> None:
    with pytest.raises(KeyError, match="task 3 is broken") as caught:
        list(run_all(fail, [3], workers=0))
    assert caught.value.__notes__ == ["in 3"]


def refuse(x: int) -> int:
    raise Refusal(f"x={x} is odd; for example x=2.")


def users(x: int) -> int:
    try:
        return fail(x)
    except KeyError as error:
        raise UserCodeError.of(error) from error


def test_a_refusal_and_a_users_exception_are_the_cause_of_what_is_raised() -> None:
    with pytest.raises(WorkError, match=r"^3 failed:\nx=3 is odd; for example x=2\.$") as caught:
        list(run_all(refuse, [3], workers=1))
    assert isinstance(caught.value.__cause__, Refusal)
    with pytest.raises(WorkError) as caught:
        list(run_all(users, [3], workers=1))
    assert isinstance(caught.value.__cause__, UserCodeError)
    lines = str(caught.value).splitlines()
    assert lines[1:] == [
        "Traceback (most recent call last):",
        f'  File "{__file__}", line {fail.__code__.co_firstlineno + 1}, in fail',
        '    raise KeyError(f"task {x} is broken")',
        "KeyError: 'task 3 is broken'",
    ]


def environment_of(name: str) -> tuple[str | None, int]:
    time.sleep(0.2)
    return os.environ.get(name), int(np.random.randint(2**31))


def test_workers_have_the_environment_of_their_start_and_numbers_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = set()
    for value in ("one", "two"):
        monkeypatch.setenv("MUTUNE_TEST", value)
        for _, (seen, number) in run_all(environment_of, ["MUTUNE_TEST", "MUTUNE_TEST"], workers=2):
            assert seen == value
            drawn.add(number)
    assert len(drawn) == 4


def end_of_what_forks(marker: str) -> str:
    """The first time: asks what forks workers to end, which it does not heed, and then kills it."""
    path = Path(marker)
    if path.exists():
        return "survived"
    path.touch()
    os.kill(os.getppid(), signal.SIGTERM)
    time.sleep(0.5)
    path.write_text("not heeded")
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(30)
    path.write_text("a worker outlived what forked it")
    return "outlived"


@pytest.mark.skipif(sys.platform != "linux", reason="only there workers are forked")
def test_a_worker_ends_with_what_forked_it_so_that_no_task_runs_twice_at_once(tmp_path: Path) -> None:
    task = str(tmp_path / "marker")
    assert list(run_all(end_of_what_forks, [task], workers=1)) == [(task, "survived")]
    assert Path(task).read_text() == "not heeded"
