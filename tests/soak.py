"""Where the results of long experiments go: a dated table with the commit it ran on, under `benchmarks/`."""

import datetime
import subprocess
from typing import Any

from tests.doors import ROOT


def record(name: str, title: str, rows: list[dict[str, Any]], by: str = "`make soak`") -> None:
    """Write `benchmarks/<name>.md`; what stands there below the table was written by hand, and stays."""
    commit = _git("describe", "--always", "--abbrev=12", "--exclude=*")
    if _git("status", "--porcelain", "--", ".", ":!benchmarks", ":!docs"):  # other tables of the same soak do not count
        commit += "-dirty"
    keys = list(rows[0])
    lines = [f"# {title}", "", f"{datetime.date.today()}, commit `{commit}`, by {by}.", ""]
    lines += ["| " + " | ".join(keys) + " |", "|" + "---|" * len(keys)]
    lines += ["| " + " | ".join(str(row[key]) for key in keys) + " |" for row in rows]
    path = ROOT / "benchmarks" / f"{name}.md"
    path.parent.mkdir(exist_ok=True)
    before = path.read_text().splitlines() if path.exists() else []
    lines += before[max((i + 1 for i, line in enumerate(before) if line.startswith("|")), default=len(before)) :]
    path.write_text("\n".join(lines) + "\n")


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()
