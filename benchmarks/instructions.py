"""How many instructions of the interpreter the contenders of a row execute, and in which functions of dbscope's.

`python -m benchmarks.instructions 'scope and SELECT, SQLite'`: figures that are the same each time, on a busy machine
too, and so tell what a change does to a path before a clock can. An instruction is not a time: a call costs more than
a load, and what SQLAlchemy's compiled parts or the driver do is not counted. Contenders that await are left out.
"""

import sys
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import dbscope
from benchmarks.frameworks import framework_rows
from benchmarks.rows import Server, rows
from benchmarks.web import web_rows

OURS = str(Path(dbscope.__file__).parent)
WARM = 300  # runs before the one that is counted: caches are full, and the interpreter has specialised its code


def counted(code: CodeType, names: dict[str, Any]) -> Counter[CodeType]:
    """How many instructions each code object executes when `code` is run once more, after it has been run often."""
    for _ in range(WARM):
        exec(code, names)
    found: Counter[CodeType] = Counter()

    def trace(frame: FrameType, happens: str, _: Any) -> Any:
        if happens == "call":
            frame.f_trace_opcodes, frame.f_trace_lines = True, False
        elif happens == "opcode":
            found[frame.f_code] += 1
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        exec(code, names)
    finally:
        sys.settrace(before)
    return found


def main(names: list[str]) -> int:
    """Print the counts of the named rows; return the exit status."""
    with ExitStack() as stack:
        server = Server(stack)
        known = {row.name: (row, place) for row, place in [*rows(server), *web_rows(server), *framework_rows(server)]}
        if not names or not known.keys() >= set(names):
            print("name some of these rows:", *known, sep="\n  ")
            return 2
        for name in names:
            row, place = known[name]
            print(row.name)
            with place() as scene:
                for contender in row.here().contenders:
                    if contender.is_async:
                        continue
                    there = dict(scene)
                    contender.context.run(exec, contender.setup, there)
                    code = compile(contender.code, f"{__file__}: {contender.name}", "exec")
                    found = contender.context.run(counted, code, there)
                    ours = Counter({code: n for code, n in found.items() if code.co_filename.startswith(OURS)})
                    print(f"  {contender.name:<40} {found.total():6}, of dbscope {ours.total()}")
                    for each, number in ours.most_common():
                        where = Path(each.co_filename).relative_to(OURS)
                        print(f"    {number:6}  {where}:{each.co_firstlineno} {each.co_qualname}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
