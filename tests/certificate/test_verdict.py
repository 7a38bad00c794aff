"""The verdict: what each difference and each drift leads to."""

from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest

from mutune.certificate.assessment import assess
from mutune.certificate.certificate import certificate, markdown
from mutune.certificate.config import VERDICTS
from mutune.certificate.differences import difference_table
from mutune.certificate.drift import MAX_DOUBLINGS
from mutune.certificate.laws import law_slopes
from mutune.certificate.rungs import place
from mutune.certificate.verdict import (
    CARE_RISK,
    FAR_OCTAVES,
    GO_OCTAVES,
    GO_RISK,
    NO_GO_CHANCE,
    NO_GO_OCTAVES,
    NOT_CERTIFIED,
    Case,
    Verdict,
    judge,
)
from mutune.config import SweepConfig
from mutune.scaling.horizon import HorizonConfig
from mutune.training.config import RunSpec, StageConfig
from mutune.training.schedule import ScheduleConfig
from tests import doors

PROXY = SweepConfig().spec()
RATE = PROXY.hyperparameters.learning_rate
OFFSETS = (-2.0, -1.0, 0.0, 1.0, 2.0)
VERDICT_ROWS = ("NO-GO", "GO", "GO WITH CARE")
FLAT = {32: 0.0, 64: 0.0, 128: 0.0}


def ladder(bottoms: dict[int, float], offsets: tuple[float, ...] = OFFSETS, seeds: int = 2) -> pd.DataFrame:
    """Parabolas around the transferred rate with the bottoms of `bottoms`, width → octaves, and 0.002 nats of noise."""
    rng, rows = np.random.default_rng(0), []
    for width, bottom in bottoms.items():
        run = replace(PROXY, model=PROXY.model.at_width(width))
        for seed in range(seeds):
            for offset in offsets:
                loss = 4.0 + 0.1 * (offset - bottom) ** 2 + 0.002 * rng.normal()
                rows.append({**place(run), "learning_rate": RATE * 2.0**offset, "seed": seed, "loss": loss})
    return pd.DataFrame(rows).assign(diverged=False)


def verdict(target: RunSpec, bottoms: dict[int, float] | None = None, proxy: RunSpec = PROXY, **kwargs: Any) -> Verdict:
    """Of a ladder over widths 32, 64 and 128 whose optima are `bottoms`."""
    assessment = assess(ladder(bottoms or FLAT, **kwargs), place(PROXY), place(target), RATE)
    table = difference_table(proxy, target, 1024, 1024, assessment.nearest_values())
    return judge(Case(table, assessment, "mup"))


def moving(octaves_per_doubling: float) -> dict[int, float]:
    """A ladder whose optimum moves steadily from the transferred rate."""
    return {32: 0.0, 64: octaves_per_doubling, 128: 2 * octaves_per_doubling}


def wide(width: int = 128, **changes: Any) -> RunSpec:
    return replace(PROXY, model=PROXY.model.at_width(width), **changes)


def test_a_flat_ladder_to_a_target_that_differs_in_width_alone_is_go() -> None:
    result = verdict(wide(256))
    assert result.verdict == "GO"
    assert "at width 256 it is expected" in result.reasons[0]
    assert "with 90 %: within 1 octave with 100 %" in result.reasons[0]


@pytest.mark.parametrize(
    ("drift", "expected"),
    [(0.1, "GO"), (0.28, "GO WITH CARE"), (-0.28, "GO WITH CARE"), (-0.6, "NO-GO"), (0.6, "NO-GO")],
)
def test_the_distance_at_the_target_decides(drift: float, expected: str) -> None:
    assert verdict(wide(128), moving(drift)).verdict == expected


def test_no_go_comes_before_not_certified() -> None:
    result = verdict(wide(2560), moving(-0.8))
    assert result.verdict == "NO-GO"
    assert any("is 4.3 doublings from the ladder's 128" in reason for reason in result.reasons)  # still said


@pytest.mark.parametrize(("octaves", "expected"), [(0.3, "GO"), (1.4, "NO-GO"), (-1.4, "NO-GO")])
def test_an_optimum_that_does_not_move_but_lies_off_the_transferred_rate_is_judged_by_that(
    octaves: float, expected: str
) -> None:
    assert verdict(wide(256), dict.fromkeys(FLAT, octaves)).verdict == expected


def test_drift_away_from_a_wrong_rate_may_bring_the_optimum_nearer() -> None:
    falling = {32: 1.4, 64: 1.0, 128: 0.6}
    assert verdict(wide(128), falling).verdict in ("GO", "GO WITH CARE")
    assert verdict(wide(32), falling).verdict == "NO-GO"


def test_a_ladder_that_jumps_up_and_down_is_not_certified() -> None:
    result = verdict(wide(512), {32: 0.0, 64: -0.8, 128: 0.6})
    assert result.verdict == "NOT CERTIFIED"
    assert any("may be more than 1 octave away" in reason for reason in result.reasons)
    assert verdict(wide(256), {32: 0.0, 64: -0.1, 128: 0.05}).verdict == "GO"


def test_the_rung_that_decides_is_named() -> None:
    reasons = verdict(wide(256), {32: 0.0, 64: 0.0, 128: 0.8}).reasons
    assert any(reason.startswith("the rung that decides most is width 128") for reason in reasons)


LAWS = law_slopes(HorizonConfig(), ["width"])


def by_laws(target: RunSpec, bottoms: dict[int, float]) -> Verdict:
    """Of a ladder over width alone, where published laws speak of tokens and batch."""
    return judge(Case([], assess(ladder(bottoms), place(PROXY), place(target), RATE, LAWS), "mup"))


def test_laws_alone_never_make_a_no_go_and_measured_drift_does() -> None:
    far = wide(stages=(StageConfig(128, 4 * 2**12, 240),))  # 12 doublings of the batch
    steady = by_laws(far, FLAT)
    assert steady.verdict == "NOT CERTIFIED"
    assert any("for its batch, which no rung varies, +" in reason for reason in steady.reasons)
    moved = by_laws(far, moving(-0.8))
    assert moved.verdict == "NO-GO"
    assert "more than 0.5 octave with" in moved.reasons[0]


def test_a_bend_carried_far_past_the_ladder_makes_no_no_go_and_one_on_it_does() -> None:
    bent = {32: 0.0, 64: 0.0, 128: 0.25}
    assert verdict(wide(128 * 2**8), bent).verdict == "NOT CERTIFIED"
    assert verdict(wide(128 * 2**8), {32: 0.0, 64: 0.5, 128: 1.2}).verdict == "NO-GO"


def test_a_target_too_far_from_the_ladder_has_no_regret() -> None:
    for width, known in ((512, True), (1024, False)):
        assessment = assess(ladder(FLAT), place(PROXY), place(wide(width)), RATE)
        data = certificate({"name": "x"}, RATE, "mup", judge(Case([], assessment)), [], assessment)
        assert (data["regret"] is not None) == known
        assert ("too far from the ladder" in markdown(data)) != known


def test_an_axis_that_only_laws_speak_of_is_named_with_the_ladder_that_would_measure_it() -> None:
    result = by_laws(wide(stages=(StageConfig(128, 16, 60),)), FLAT)  # 2 doublings of the batch
    assert result.verdict == "NOT CERTIFIED"
    assert result.settle == ["a ladder that varies the batch too: 'ladder=[width,batch]'"]


def test_two_widths_are_not_enough() -> None:
    result = verdict(wide(256), {32: 0.0, 64: 0.0})
    assert result.verdict == "NOT CERTIFIED"
    assert "2 widths have an optimum inside the tried rates, of 3 needed" in result.reasons


def test_one_width_is_not_certified_and_a_single_rung_has_no_drift() -> None:
    result = verdict(wide(256), {32: 0.0})
    assert result.verdict == "NOT CERTIFIED"
    assert "1 width has an optimum inside the tried rates, of 3 needed" in result.reasons


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        (wide(1024), "width: the target's 1,024 is 3.0 doublings from the ladder's 128"),
        (
            replace(wide(), model=replace(wide().model, depth=8)),
            "depth: 4 → 8, and table mup transfers over width only",
        ),
        (
            replace(wide(), stages=(StageConfig(num_steps=2400),)),
            "tokens: the target's 1,228,800 is 3.3 doublings from the proxy's 122,880, unmeasured",
        ),
        (replace(wide(), stages=(StageConfig(1024, 4, 30),)), "context: 128 → 1,024"),
        (replace(wide(), model=replace(wide().model, head_size=32)), "head size: 16 → 32"),
        (
            replace(wide(), model=replace(wide().model, ffn_width=512)),
            "feed-forward width over width: 2.656 → 4.0; ladders keep this ratio",
        ),
        (replace(wide(), model=replace(wide().model, activation="gelu")), "activation: swiglu → gelu"),
        (replace(wide(), schedule=replace(PROXY.schedule, kind="cosine")), "schedule: linear → cosine"),
    ],
)
def test_what_was_not_measured_is_not_certified(target: RunSpec, reason: str) -> None:
    result = verdict(target)
    assert result.verdict == "NOT CERTIFIED"
    with pytest.raises(AssertionError, match=reason):  # the reason is among the sentences
        raise AssertionError("\n".join(result.reasons))


def test_an_optimum_at_the_edge_is_not_certified() -> None:
    result = verdict(wide(), {32: 0.0, 64: 0.0, 128: 1.3}, offsets=(-0.8, 0.0, 0.8))
    assert result.verdict == "NOT CERTIFIED"
    assert any("edge of the tried rates, or beyond it, at width 128 (high)" in reason for reason in result.reasons)
    assert result.settle == ["learning rates above 0.0272 at width 128"]


def test_an_optimum_far_away_is_no_go_though_a_rung_has_it_at_the_edge() -> None:
    result = verdict(wide(), {32: 0.0, 64: -1.5, 128: -3.0})
    assert result.verdict == "NO-GO"
    assert any("edge of the tried rates" in reason for reason in result.reasons)


@pytest.mark.parametrize(("share", "expected"), [(0.2, "GO"), (0.9, "NOT CERTIFIED")])
def test_another_decay_share_of_the_same_schedule_is_a_difference(share: float, expected: str) -> None:
    proxy = replace(PROXY, schedule=ScheduleConfig("wsd", decay_fraction=0.1))
    target = replace(wide(), schedule=ScheduleConfig("wsd", decay_fraction=share))
    rows = difference_table(proxy, target, 1024, 1024, {"width": 128})
    assert ("decay share", 0.1, share) in [(row.axis, row.proxy, row.target) for row in rows]
    result = verdict(target, proxy=proxy)
    assert result.verdict == expected
    assert expected == "GO" or "schedule.decay_fraction" in result.reasons[0]


def test_a_feed_forward_width_of_the_same_family_is_no_difference() -> None:
    proxy = replace(PROXY, model=replace(PROXY.model, ffn_width=128))
    for ffn, differs in ((512, False), (511, False), (None, True)):
        target = replace(wide(), model=replace(wide().model, ffn_width=ffn))
        axes = {row.axis for row in difference_table(proxy, target, 1024, 1024, {"width": 128})}
        assert ("feed-forward width over width" in axes) == differs


def test_every_difference_is_listed_once_and_equal_axes_are_not() -> None:
    rows = {d.axis: d for d in difference_table(PROXY, wide(128), 1024, 1024, {"width": 128})}
    assert set(rows) == {"width", "heads (and so the ALiBi spectrum)", "tokens per parameter"}
    assert (rows["width"].proxy, rows["width"].target, rows["width"].ratio, rows["width"].measured_to) == (
        32,
        128,
        4,
        128,
    )


@pytest.mark.parametrize("rule", NOT_CERTIFIED, ids=lambda rule: rule.name)
def test_no_reason_is_given_where_nothing_differs(rule: Any) -> None:
    assessment = assess(ladder(FLAT), place(PROXY), place(wide(128)), RATE)
    assert rule.reason(Case([], assessment, "mup")) == ""


def test_the_page_about_the_certificate_has_the_thresholds_of_the_rules() -> None:
    page = (doors.ROOT / "docs/certificate.md").read_text()
    no_go, go, care = (next(line for line in page.splitlines() if line.startswith(f"| {v} |")) for v in VERDICT_ROWS)
    assert f"more than {NO_GO_OCTAVES:g} octaves" in no_go
    assert f"with {NO_GO_CHANCE:.0%}".replace("%", " %") in no_go
    assert f"at most {GO_RISK:.0%}".replace("%", " %") in go
    assert f"at most {CARE_RISK:.0%}".replace("%", " %") in care
    assert (GO_OCTAVES, FAR_OCTAVES, MAX_DOUBLINGS) == (0.5, 1.0, 2.0)  # its half an octave, an octave, two doublings


def test_the_verdicts_are_the_four_of_the_contract() -> None:
    assert VERDICTS == ("GO", "GO WITH CARE", "NO-GO", "NOT CERTIFIED")
