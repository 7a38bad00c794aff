"""The progress line of a sweep."""

from pathlib import Path

import pytest

from mutune.search.display import SweepProgress
from mutune.search.study import Progress
from mutune.search.trial import last_record


def test_the_line_says_how_far_each_worker_s_trial_has_come_and_who_else_is_at_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "7").mkdir()
    lines = [f'{{"step": {step}, "loss": 5.0, "padding": "{"x" * 100}"}}' for step in range(1, 1201)]
    (tmp_path / "7/metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 12')  # torn
    SweepProgress(2, tmp_path).update(Progress("proxy", 3, 48, [7, 8], None, 60.0, 1, ("hostb.12",)))
    said = "".join(capsys.readouterr())
    assert "proxy 3/48 trials (1 pruned) · best — · running 7 (step 1,200), 8 · with hostb.12 · 0:00 elapsed" in said
    assert "about 0:30 left" in said


def test_what_holds_no_whole_record_has_no_last_one(tmp_path: Path) -> None:
    assert last_record(tmp_path / "none") is None
    (tmp_path / "torn").write_text('{"step": 1, "lo')
    assert last_record(tmp_path / "torn") is None
