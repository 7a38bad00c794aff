"""Where the results of long experiments go: a dated table with the commit it ran on, under `benchmarks/`."""

import datetime
import subprocess
from typing import Any

from tests.doors import ROOT


def record(name: str, title: str, rows: list[dict[str, Any]]) -> None:
    """Write `benchmarks/<name>.md`."""
    head = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    commit = subprocess.run(head, capture_output=True, text=True, check=True).stdout.strip()
    keys = list(rows[0])
    lines = [f"# {title}", "", f"{datetime.date.today()}, commit `{commit}`, by `make soak`.", ""]
    lines += ["| " + " | ".join(keys) + " |", "|" + "---|" * len(keys)]
    lines += ["| " + " | ".join(str(row[key]) for key in keys) + " |" for row in rows]
    (ROOT / "benchmarks").mkdir(exist_ok=True)
    (ROOT / "benchmarks" / f"{name}.md").write_text("\n".join(lines) + "\n")
