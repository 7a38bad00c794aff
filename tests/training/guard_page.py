"""The tables of docs/guard.md, made from the code: `python -m tests.training.guard_page` writes them anew."""

import dataclasses
import re

from mutune.help import meanings
from mutune.training.alarms import KINDS, GuardConfig
from tests.doors import ROOT

PAGE = ROOT / "docs" / "guard.md"


def alarms() -> str:
    lines = ["| alarm | policy | what it usually means | advice |", "|---|---|---|---|"]
    lines += [f"| `{name}` | {kind.calls_for} | {kind.means} | {kind.advice} |" for name, kind in KINDS.items()]
    return "\n".join(lines)


def settings() -> str:
    told, lines = meanings(GuardConfig), ["| key | default | meaning |", "|---|---|---|"]
    for field in dataclasses.fields(GuardConfig):
        lines.append(f"| `guard.{field.name}` | {field.default} | {told[field.name]} |")
    return "\n".join(lines)


def filled(page: str) -> str:
    """The page with its tables as the code has them."""
    for name, table in (("alarms", alarms()), ("settings", settings())):
        page = re.sub(rf"<!-- {name} -->\n\n?(\|[^\n]*\n)*", f"<!-- {name} -->\n\n{table}\n", page, count=1)
    return page


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text()))
