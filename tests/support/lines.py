"""Where a marked line of a test stands, as errors spell it."""

import inspect
import sys
from pathlib import Path


def marked(mark: str) -> str:
    """The calling test's line that ends with the comment `# <mark>`, as `test_x.py:12`."""
    frame = sys._getframe(1)
    lines, start = inspect.getsourcelines(frame.f_code)
    found = [start + number for number, line in enumerate(lines) if line.rstrip().endswith(f"# {mark}")]
    assert len(found) == 1, f"{mark!r} stands on {len(found)} lines"
    return f"{Path(frame.f_code.co_filename).name}:{found[0]}"
