"""Mixtures: exact proportions, every window of every corpus once, one tokenizer, and all texts in the identity."""

import hashlib
import shutil
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mutune.data import DataConfig, Stage, TokenizerConfig, WindowLoader, prepare
from mutune.data.config import MixedData
from mutune.data.corpora import prepare_corpora
from mutune.data.mixture import choose, counts, proportions
from mutune.data.order import keys_of
from mutune.data.segments import MAIN
from mutune.errors import Refusal
from tests.data.conftest import prose

TOKENS, OTHER = np.arange(10_000, dtype=np.uint16), np.arange(20_000, 26_000, dtype=np.uint16)
MIXTURE = ((MAIN, 70), ("other", 30))
STAGES = [Stage(16, 40, 5, MIXTURE), Stage(64, 30, 4), Stage(32, 10, 4, (("other", 1),))]
GOLDEN = "8a05f5503e08285a"


def loader(seed: int = 0) -> WindowLoader:
    return WindowLoader(TOKENS, STAGES, seed, corpora={"other": OTHER})


@pytest.mark.parametrize(
    ("weights", "parts"),
    [
        ([1.0], (1,)),
        ([0.7, 0.3], (70, 30)),
        ([70, 30], (70, 30)),
        ([1, 2], (34, 68)),
        ([0.123, 0.877], (123, 877)),
        ([1 / 3, 2 / 3], (34, 68)),
        ([1 / 7, 0.5, 0.25], (160_000, 560_000, 280_000)),
        ([1e-9, 1.0], (1, 1_000_000)),
    ],
)
def test_proportions_are_exact_where_a_million_parts_suffice(weights: list[float], parts: tuple[int, ...]) -> None:
    assert proportions(weights) == parts


@settings(deadline=None)
@given(
    parts=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    num_blocks=st.integers(1, 4),
    more=st.integers(0, 199),
    seed=st.integers(0, 99),
)
def test_a_block_has_every_corpus_in_proportion_and_no_window_twice(
    parts: list[int], num_blocks: int, more: int, seed: int
) -> None:
    keys = partial(keys_of, "mixture", seed, "0")
    size = num_blocks * sum(parts)
    corpus, number = choose(np.arange(size), parts, keys)
    for which, part in enumerate(parts):
        assert sorted(number[corpus == which]) == list(range(num_blocks * part))
    first, _ = choose(np.arange(more), parts, keys)
    assert counts(more, parts, keys) == [int((first == which).sum()) for which in range(len(parts))]


def test_the_corpora_of_a_block_come_in_random_order() -> None:
    corpus, _ = choose(np.arange(1000), [50, 50], partial(keys_of, "mixture", 0, "0"))
    changes = int((np.diff(corpus) != 0).sum())
    assert 440 < changes < 560  # half of them, within 4 standard errors
    assert not np.array_equal(corpus[:100], corpus[100:200])


def test_windows_are_drawn_in_proportion_and_lie_in_one_corpus() -> None:
    alone = WindowLoader(TOKENS, STAGES[:1], 0, corpora={"other": OTHER})
    batches = np.concatenate([alone.batch(step) for step in range(40)])  # 200 windows: two blocks
    kinds = Counter(bool(window[0] >= 20_000) for window in batches)
    assert kinds == {False: 140, True: 60}
    for window in batches:
        low, size = (20_000, 6000) if window[0] >= 20_000 else (0, 10_000)
        assert np.array_equal((window[1:] - low) % size, (window[:-1] - low + 1) % size)


def test_no_stage_repeats_a_token_of_any_corpus_within_its_epoch() -> None:
    inputs = np.concatenate([loader().batch(step)[:, :-1].ravel() for step in range(loader().total_steps)])
    assert len(np.unique(inputs)) == len(inputs) == sum(stage.num_tokens for stage in STAGES)


def test_a_corpus_that_is_asked_for_more_than_it_has_is_read_in_epochs_and_the_others_are_not() -> None:
    stage = Stage(16, 200, 10, (("", 1), ("other", 9)))  # 200 windows of the one, 1,800 of the other, which has 375
    batches = np.concatenate(
        [WindowLoader(TOKENS, [stage], 0, corpora={"other": OTHER}).batch(step) for step in range(200)]
    )
    times = Counter(batches[:, :-1].ravel().tolist())
    assert {times[token] for token in range(10_000) if times[token]} == {1}
    assert {times[token] for token in OTHER.tolist()} <= {4, 5}


@pytest.mark.parametrize("world_size", [1, 5])
def test_a_mixture_is_the_same_for_any_world_size_and_after_any_step(world_size: int) -> None:
    for step in (0, 13, 39):
        gathered = np.empty((5, 17), dtype=np.int64)
        for rank in range(world_size):
            gathered[rank::world_size] = loader().batch(step, rank, world_size)
        assert np.array_equal(gathered, loader().batch(step))


def test_seeds_mix_in_other_orders() -> None:
    assert len({loader(seed).batch(0).tobytes() for seed in range(3)}) == 3


def test_the_order_of_a_mixture_has_not_changed() -> None:
    """Golden, as that of `test_windows`."""
    found = hashlib.sha256(b"".join(loader().batch(step).astype("<i8").tobytes() for step in range(80))).hexdigest()
    assert found[:16] == GOLDEN


@pytest.fixture
def other(tmp_path: Path) -> MixedData:
    path = tmp_path / "other.txt"
    path.write_text(prose(300)[20_000:].replace("a", "o"), encoding="utf-8")
    return MixedData("text", str(path), 0.25)


BPE = TokenizerConfig("bpe", 300)


def own(text: DataConfig) -> MixedData:
    return MixedData(text.source, text.path, 0.75)


def test_a_mixture_has_the_tokens_of_the_main_corpus(text: DataConfig, other: MixedData) -> None:
    corpora = prepare_corpora(text, BPE, [None, (own(text), other)])
    mixed, alone = corpora.others["text", other.path], prepare(text, BPE)
    assert mixed.tokenizer.content_hash == alone.tokenizer.content_hash
    assert mixed.content_hash != prepare(other.corpus, BPE).content_hash  # whose merges are its own
    assert corpora.main.folder == alone.folder
    assert np.array_equal(corpora.main.heldout, alone.heldout)
    assert corpora.parts(None) == ((MAIN, 1),)
    assert corpora.parts((own(text), other)) == ((MAIN, 75), (mixed.content_hash, 25))
    assert mixed.tokenizer.decode(corpora.tokens[mixed.content_hash][:20]).strip("\n")[:4].isalpha()
    again = prepare_corpora(text, BPE, [(other,)])
    assert again.others["text", other.path].folder == mixed.folder


def test_a_tokenizer_that_is_the_same_for_every_text_shares_its_cache(text: DataConfig, other: MixedData) -> None:
    corpora = prepare_corpora(text, TokenizerConfig("bytes"), [(other,)])
    assert corpora.others["text", other.path].folder == prepare(other.corpus, TokenizerConfig("bytes")).folder


def test_every_text_of_a_mixture_is_in_the_hash(text: DataConfig, other: MixedData) -> None:
    alone, mixed = (prepare_corpora(text, BPE, [mixture]).content_hash for mixture in (None, (own(text), other)))
    assert alone == prepare(text, BPE).content_hash
    assert mixed != alone
    Path(str(other.path)).write_text(prose(301)[20_000:], encoding="utf-8")
    assert prepare_corpora(text, BPE, [(own(text), other)]).content_hash not in (alone, mixed)


def test_one_text_under_two_names_is_one_corpus(text: DataConfig, tmp_path: Path) -> None:
    copy = tmp_path / "copies" / Path(str(text.path)).name
    copy.parent.mkdir()
    shutil.copy(str(text.path), copy)
    twin = MixedData("text", str(copy), 0.5)
    corpora = prepare_corpora(text, TokenizerConfig("bytes"), [(twin,)])
    assert corpora.parts((twin,)) == ((MAIN, 1),)
    assert corpora.tokens == {}
    corpora = prepare_corpora(text, TokenizerConfig("bytes"), [(own(text), twin)])
    with pytest.raises(Refusal, match=r"stages\.data=.* has one text twice; give it once"):
        corpora.parts((own(text), twin))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"weight": 0.0}, r"data\.weight=0\.0 must be a finite number above 0; for example data\.weight=0\.25"),
        ({"weight": float("inf")}, r"data\.weight=inf must be a finite number"),
        ({"source": "text"}, r"data=text needs data\.path"),
        ({"path": "a.txt"}, r"data\.path=a\.txt is read only by data=text"),
    ],
)
def test_a_corpus_without_weight_or_text_is_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(Refusal, match=message):
        MixedData(**values)  # type: ignore[arg-type]
