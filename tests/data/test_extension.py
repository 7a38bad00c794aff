"""Runs that go on from others: what was read stays, and what is added is new as long as there is anything new."""

import hashlib
import tracemalloc
from collections.abc import Iterable

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mutune.data import Stage, WindowLoader, readings
from mutune.data import segments as segments_module
from mutune.data.readings import Unread
from mutune.data.segments import MAIN, segments
from mutune.data.windows import Skip, shared_steps
from mutune.errors import Refusal

TOKENS = np.arange(10_000, dtype=np.uint16)  # a token's value is its place
SHORT, LONG = Stage(32, 20, 4), Stage(128, 10, 2)  # each 2,560 tokens
GOLDEN_STARTS = [2700, 7452]
GOLDEN_DIGEST = "92624fd244e3cfadeb5481a8b250b2690ae17b5e939688e4b77b6bcafe7061ec"


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
    gaps = [isinstance(part, Unread) for segment in new.segments for part in segment.readings.values()]
    assume(any(gaps))
    added = sum(segment.stage.num_steps for segment, gap in zip(new.segments, gaps, strict=True) if gap)
    before_it, read = (inputs(new, steps) for steps in np.split(np.arange(new.total_steps), [new.total_steps - added]))
    assert len(set(read)) == len(read)
    assert not set(read) & set(before_it)


def test_new_stages_never_share_the_last_tokens_that_are_left() -> None:
    """46 tokens, of which 19 were inputs and one lies beyond a window: 26 are left, and 27 would be needed."""
    kept, added = [Stage(3, 1, 1), Stage(2, 2, 4)], [Stage(1, 1, 1), Stage(2, 6, 2)]
    new = WindowLoader(TOKENS[:46], [*kept, *added], 0, extends=[[Stage(3, 1, 1), Stage(2, 4, 4)]])
    assert [segment.again for segment in new.segments] == [(), (), (MAIN,), (MAIN,)]
    read = inputs(new, range(3, 10))
    assert len(set(read)) == len(read)


def test_a_new_stage_of_another_context_reads_what_the_run_has_not() -> None:
    extended = WindowLoader(TOKENS, [SHORT, LONG], 0, extends=[[SHORT]])
    read = inputs(extended, range(30))
    assert len(set(read)) == len(read) == 5120
    assert not any(segment.again for segment in extended.segments)
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
    assert [segment.again for segment in extended.segments] == [(), (MAIN,)]
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


def test_what_is_added_has_not_changed() -> None:
    """Golden: a change here changes every run that goes on from another."""
    third = [SHORT, LONG, Stage(16, 20, 4), Stage(48, 7, 3)]
    loader = WindowLoader(TOKENS, third, 0, extends=[[SHORT], [SHORT, LONG]])
    assert loader.batch(20)[:, 0].tolist() == GOLDEN_STARTS
    batches = b"".join(loader.batch(step).astype("<i8").tobytes() for step in range(20, 57))
    assert hashlib.sha256(batches).hexdigest() == GOLDEN_DIGEST


# -------------------------------------------------------------------------------------------------------- large corpora
@settings(deadline=None, max_examples=25)
@given(runs(), st.integers(0, 99), st.integers(1, 6), st.integers(1, 200))
def test_it_is_the_same_however_much_is_worked_out_at_once(
    run: tuple[int, list[Stage], list[Stage]], seed: int, windows: int, bucket: int
) -> None:
    num_tokens, before, stages = run
    longer = [*stages, Stage(5, 3, 2)]

    def made() -> WindowLoader:
        return WindowLoader(TOKENS[:num_tokens], longer, seed, extends=[before, stages])

    whole = made()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readings, "AT_ONCE", windows)
        patch.setattr(segments_module, "AT_ONCE", windows)
        patch.setattr(readings, "BUCKET", bucket)
        pieces = made()
        assert same(pieces, whole, whole.total_steps)
        assert pieces.token_ranges == whole.token_ranges


@pytest.mark.parametrize(("context", "read", "added"), [(2048, 0.7, 0.3), (8192, 0.2, 0.13)])
def test_what_is_unread_of_many_windows_takes_a_few_bytes_of_each(context: int, read: float, added: float) -> None:
    """Of 10 million windows. A list of the bounds of those that were read would have 16 bytes for each."""
    num_windows, asked = 10**7, Stage(context, 1000, 480)
    kept = Stage(2048, round(read * 10_000), 1000)
    tracemalloc.start()
    try:
        found = segments({MAIN: 2048 * num_windows}, [kept, asked], 0, [[kept]])
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    unread = found[-1].readings[MAIN]
    assert isinstance(unread, Unread)
    assert len(unread.places) == pytest.approx(added * num_windows, rel=0.1)
    assert peak < 5 * num_windows
    assert held < 2.1 * added * num_windows + 8 * 2048 * num_windows / readings.BUCKET + 10**5


def test_what_takes_a_while_is_told() -> None:
    said: list[tuple[str, str, int, int]] = []
    extended = segments({MAIN: 10_000}, [SHORT, LONG], 0, [[SHORT]], tell=lambda *so_far: said.append(so_far))
    assert len(extended) == 2
    assert said == [
        ("found", "windows that were read", 80, 80),
        ("looked for gaps in", "tokens", 10_000, 10_000),
    ]


# ------------------------------------------------------------------------------------------------------ after rollbacks
WHOLE = 78  # steps of SHORT's kind that read all of the text's windows


def test_batches_that_were_left_out_are_not_read_by_what_is_added() -> None:
    bad = set(inputs(WindowLoader(TOKENS, [Stage(32, WHOLE, 4)], 0), range(10, 15)))
    rest = Stage(16, 53 * 2, 4)  # all that the first stage leaves
    extended = WindowLoader(TOKENS, [SHORT, rest], 0, extends=[[SHORT]], left_out=[[Skip(10, 5)]], skips=[Skip(10, 5)])
    assert isinstance(extended.segments[1].readings[MAIN], Unread)
    read = inputs(extended, range(extended.total_steps))
    assert len(set(read)) == len(read) == 20 * 128 + 53 * 128
    assert not set(read) & bad
    longer = WindowLoader(TOKENS, [SHORT, Stage(16, 55 * 2, 4)], 0, extends=[[SHORT]], left_out=[[Skip(10, 5)]])
    assert not isinstance(longer.segments[1].readings[MAIN], Unread)


def test_a_longer_stage_has_room_for_what_was_left_out_of_it() -> None:
    for steps, goes_on in ((WHOLE - 5, True), (WHOLE - 4, False)):
        skips = [Skip(10, 2), Skip(12, 3), Skip(WHOLE, 7)]  # of which the last is after its end
        stages = [Stage(32, steps, 4)]
        extended = WindowLoader(TOKENS, stages, 0, extends=[[SHORT]], left_out=[skips], skips=skips)
        assert len(extended.segments) == (1 if goes_on else 2)
        read = inputs(extended, range(steps if goes_on else 20))
        assert len(set(read)) == len(read)


def test_each_run_of_a_history_has_what_was_left_out_of_it_when_the_next_one_left() -> None:
    """The second run is rolled back in the stage that it has of the first, after it had found what was unread."""
    second = [Stage(32, 30, 4), Stage(32, 10, 2)]
    third = [*second, Stage(16, 30, 4)]
    early, late = [Skip(10, 5)], [Skip(10, 5), Skip(25, 4)]
    one = WindowLoader(TOKENS, second, 0, extends=[[SHORT]], left_out=[early], skips=late)
    two = WindowLoader(TOKENS, third, 0, extends=[[SHORT], second], left_out=[early, late], skips=late)
    assert same(two, one, 40)
    assert [segment.num_skipped for segment in two.segments] == [9, 0, 0]
    assert all(isinstance(segment.readings[MAIN], Unread) for segment in two.segments[1:])
    read, added = inputs(two, range(40)), inputs(two, range(40, two.total_steps))
    bad = inputs(WindowLoader(TOKENS, [Stage(32, WHOLE, 4)], 0), [*range(10, 15), *range(30, 34)])
    assert len(set(added)) == len(added)
    assert not set(added) & {*read, *bad}
