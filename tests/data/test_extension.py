"""Runs that go on from others: what was read stays, and what is added is new as long as there is anything new."""

from collections.abc import Iterable

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mutune.data import Stage, WindowLoader
from mutune.data.readings import Gaps
from mutune.data.windows import shared_steps
from mutune.errors import Refusal

TOKENS = np.arange(10_000, dtype=np.uint16)  # a token's value is its place
SHORT, LONG = Stage(32, 20, 4), Stage(128, 10, 2)  # each 2,560 tokens


def inputs(loader: WindowLoader, steps: Iterable[int]) -> list[int]:
    return [int(token) for step in steps for token in loader.batch(int(step))[:, :-1].flat]


def same(one: WindowLoader, other: WindowLoader, steps: int) -> bool:
    return all(np.array_equal(one.batch(step), other.batch(step)) for step in range(steps))


def sizes(smallest: int) -> st.SearchStrategy[list[Stage]]:
    each = st.builds(Stage, st.integers(1, 12), st.integers(1, 9), st.integers(1, 4))
    return st.lists(each, min_size=smallest, max_size=3)


@st.composite
def runs(draw: st.DrawFn) -> tuple[int, list[Stage], list[Stage]]:
    """Tokens; a run's stages; and those of a run that leaves it at some step, with more."""
    before, more = draw(sizes(1)), draw(sizes(0))
    number = draw(st.integers(0, len(before) - 1))
    stage = before[number]
    begun = Stage(stage.context_length, draw(st.integers(1, 2 * stage.num_steps)), stage.batch_sequences)
    return draw(st.integers(13, 3000)), before, [*before[:number], begun, *more]


@settings(deadline=None, max_examples=60)
@given(runs(), st.integers(0, 99))
def test_steps_that_were_done_read_what_they_read(run: tuple[int, list[Stage], list[Stage]], seed: int) -> None:
    num_tokens, before, stages = run
    tokens = TOKENS[:num_tokens]
    old, new = WindowLoader(tokens, before, seed), WindowLoader(tokens, stages, seed, extends=[before])
    assert 0 < shared_steps(before, stages) <= min(old.total_steps, new.total_steps)
    assert new.total_steps == sum(stage.num_steps for stage in stages)
    assert same(new, old, shared_steps(before, stages))
    last = new.batch(new.total_steps - 1)
    assert last.shape == (stages[-1].batch_sequences, stages[-1].context_length + 1)


@settings(deadline=None, max_examples=60)
@given(runs(), st.integers(0, 99))
def test_what_is_added_reads_no_token_again_where_it_is_given_gaps(
    run: tuple[int, list[Stage], list[Stage]], seed: int
) -> None:
    num_tokens, before, stages = run
    new = WindowLoader(TOKENS[:num_tokens], stages, seed, extends=[before])
    gaps = [isinstance(part, Gaps) for segment in new.segments for part in segment.readings.values()]
    assume(any(gaps))
    added = sum(segment.stage.num_steps for segment, gap in zip(new.segments, gaps, strict=True) if gap)
    before_it, read = (inputs(new, steps) for steps in np.split(np.arange(new.total_steps), [new.total_steps - added]))
    assert len(set(read)) == len(read)
    assert not set(read) & set(before_it)


def test_a_new_stage_of_another_context_reads_what_the_run_has_not() -> None:
    extended = WindowLoader(TOKENS, [SHORT, LONG], 0, extends=[[SHORT]])
    read = inputs(extended, range(30))
    assert len(set(read)) == len(read) == 5120
    assert not same(extended, WindowLoader(TOKENS, [SHORT, LONG], 0), 20)  # which divides the text between both


def test_stages_that_were_never_reached_leave_their_tokens_to_the_new_ones() -> None:
    trunk = [Stage(32, 60, 4), Stage(64, 9, 4)]  # nearly all of the text
    branch = WindowLoader(TOKENS, [Stage(32, 60, 4), Stage(128, 5, 3)], 0, extends=[trunk])
    assert same(branch, WindowLoader(TOKENS, trunk, 0), 60)
    assert branch.token_ranges[1][0] >= WindowLoader(TOKENS, trunk, 0).token_ranges[0][1] - 200
    read = inputs(branch, range(65))
    assert len(set(read)) == len(read)


def test_a_longer_stage_goes_on_in_its_own_order() -> None:
    longer = [SHORT, Stage(128, 15, 2)]
    extended = WindowLoader(TOKENS, longer, 0, extends=[[SHORT, LONG]])
    assert extended.token_ranges == WindowLoader(TOKENS, [SHORT, LONG], 0).token_ranges
    read = inputs(extended, range(35))
    assert len(set(read)) == len(read)
    alone = WindowLoader(TOKENS, [Stage(32, 78, 4)], 0, extends=[[SHORT]])
    assert same(alone, WindowLoader(TOKENS, [Stage(32, 78, 4)], 0), 78)


def test_a_stage_that_outgrows_its_range_reads_what_is_left_elsewhere() -> None:
    """The second stage's range is half of the text, and holds 39 windows; the first left the others unread."""
    extended = WindowLoader(TOKENS, [SHORT, Stage(128, 21, 2)], 0, extends=[[SHORT, LONG]])
    assert [segment.stage.num_steps for segment in extended.segments] == [20, 10, 11]
    read = inputs(extended, range(41))
    assert len(set(read)) == len(read)
    assert extended.stage_at(40) == Stage(128, 21, 2)


def test_with_nothing_left_a_new_stage_reads_everything_afresh() -> None:
    whole = Stage(100, 50, 2)  # every token once
    extended = WindowLoader(TOKENS, [whole, Stage(50, 100, 2)], 0, extends=[[whole]])
    assert extended.token_ranges == ((0, 10_000), (0, 10_000))
    assert sorted(inputs(extended, range(50, 150))) == list(range(10_000))
    half = WindowLoader(TOKENS, [whole, Stage(50, 20, 2), Stage(25, 30, 2)], 0, extends=[[whole]])
    again = inputs(half, range(50, 100))
    assert len(set(again)) == len(again)  # the new stages share nothing with one another


def test_a_run_that_extends_an_extension_keeps_both() -> None:
    first, second = [SHORT], [SHORT, LONG]
    third = [SHORT, LONG, Stage(16, 20, 4)]
    one = WindowLoader(TOKENS, second, 0, extends=[first])
    two = WindowLoader(TOKENS, third, 0, extends=[first, second])
    assert same(two, one, 30)
    read = inputs(two, range(50))
    assert len(set(read)) == len(read)
    assert not same(WindowLoader(TOKENS, third, 0, extends=[second]), two, 30)  # the history is part of what a run is


def test_going_on_without_a_change_changes_nothing() -> None:
    plain = WindowLoader(TOKENS, [SHORT, LONG], 3)
    assert same(WindowLoader(TOKENS, [SHORT, LONG], 3, extends=[[SHORT, LONG]]), plain, 30)


def test_branches_from_one_step_read_the_same() -> None:
    trunk = [Stage(32, 60, 4)]
    long, short = (WindowLoader(TOKENS, [Stage(32, steps, 4)], 0, extends=[trunk]) for steps in (50, 40))
    assert same(long, short, 40)


def test_a_corpus_that_joins_is_read_from_its_own_beginning() -> None:
    other = np.arange(20_000, 23_000, dtype=np.uint16)
    mixed = Stage(32, 25, 4, (("", 50), ("other", 50)))
    extended = WindowLoader(TOKENS, [SHORT, mixed, LONG], 0, corpora={"other": other}, extends=[[SHORT]])
    assert same(extended, WindowLoader(TOKENS, [SHORT], 0), 20)
    read = inputs(extended, range(55))
    assert len(set(read)) == len(read)
    assert sum(token >= 20_000 for token in read) == 50 * 32


@pytest.mark.parametrize("world_size", [1, 2])
def test_what_is_added_is_the_same_for_any_world_size(world_size: int) -> None:
    extended = WindowLoader(TOKENS, [SHORT, LONG], 0, extends=[[SHORT]])
    gathered = np.empty((2, 129), dtype=np.int64)
    for rank in range(world_size):
        gathered[rank::world_size] = extended.batch(25, rank, world_size)
    assert np.array_equal(gathered, extended.batch(25))


def test_runs_share_their_steps_up_to_the_first_that_differs() -> None:
    assert shared_steps([SHORT, LONG], [SHORT, LONG]) == 30
    assert shared_steps([SHORT, LONG], [SHORT]) == 20
    assert shared_steps([SHORT], [Stage(32, 50, 4), LONG]) == 20
    assert shared_steps([SHORT, LONG], [Stage(32, 19, 4), LONG]) == 19
    assert shared_steps([SHORT, LONG], [SHORT, Stage(128, 10, 4)]) == 20
    assert shared_steps([SHORT], [Stage(32, 20, 4, (("", 1), ("other", 1)))]) == 0


def test_a_run_that_shares_no_step_with_the_one_it_extends_is_refused() -> None:
    for before in ([LONG], [Stage(32, 20, 8)]):
        with pytest.raises(Refusal, match="extends has a run whose first stage is of another context_length"):
            WindowLoader(TOKENS, [SHORT], 0, extends=[before])
