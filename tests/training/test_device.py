"""How much memory a process may still take: also in a container, or in a Slurm job with `--mem`."""

import math
from pathlib import Path

import pytest

from mutune.training.device import V1, V2, left_to_group


def group(folder: Path, names: tuple[str, str, str], limit: str, used: int, cached: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\n{names[2]} {cached}\n")


@pytest.mark.parametrize(
    ("line", "below", "names"), [("0::/job/step", "", V2), ("4:cpu,memory:/job/step", "memory", V1)]
)
def test_the_tightest_limit_of_the_groups_above_a_process_counts(
    line: str, below: str, names: tuple[str, str, str], tmp_path: Path
) -> None:
    own, root = tmp_path / "own", tmp_path / "groups"
    own.write_text(f"9:pids:/elsewhere\n{line}\n")
    assert left_to_group(root, own) == math.inf
    group(root / below / "job/step", names, "max" if names is V2 else str(2**63 - 4096), 700, 0)
    assert left_to_group(root, own) > 2**62
    group(root / below / "job", names, "1000", 700, 100)
    assert left_to_group(root, own) == 400
    group(root / below, names, "300", 1000, 0)
    assert left_to_group(root, own) == 0


def test_where_there_are_no_groups_there_is_no_limit(tmp_path: Path) -> None:
    assert left_to_group(tmp_path, tmp_path / "none") == math.inf
