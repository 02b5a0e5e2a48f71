"""The page on integrations of your own: its code passes the kit as it stands, and each mistake in it fails."""

import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.programs

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "write-your-own.md"
FILES = dict(re.findall(r"^```python\n# (\S+\.py)\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.M | re.S))
TESTS = 12
OPTIONS = ("-p", "no:cacheprovider", "-p", "no:hypothesispytest", "-p", "no:asyncio", "-W", "error", "-rsf")


def run(pytester, *options, **changes):
    """Run the page's files, with pieces of the integration replaced; what passed, and which tests failed."""
    for name, code in FILES.items():
        (pytester.path / name).write_text(code, encoding="utf-8")
    integration = pytester.path / "courier_scopes.py"
    code = integration.read_text(encoding="utf-8")
    for old, new in changes.get("replace", {}).items():
        assert old in code
        code = code.replace(old, new)
    integration.write_text(code, encoding="utf-8")
    if "append" in changes:
        with (pytester.path / "test_courier_scopes.py").open("a", encoding="utf-8") as file:
            file.write(changes["append"])
    return pytester.runpytest_subprocess(*OPTIONS, *options)


def test_the_integration_of_the_page_passes_the_kit(pytester):
    """A reader who pastes the three files has a working integration and its tests."""
    run(pytester).assert_outcomes(passed=TESTS)


FINISH = "            work.finish(veto=self.commit is not None and self.veto(reply.status))\n"
OPEN = 'with scope(f"delivery of {name}", commit=self.commit) as work:'


@pytest.mark.parametrize(
    ("replace", "failing"),
    [
        ({OPEN: "with scope(commit=self.commit) as work:"}, {"test_the_work_has_a_scope_with_its_name"}),
        ({"commit=self.commit) as": "commit=None) as"}, {"test_on_success_the_work_is_committed_before_*"}),
        ({"commit=self.commit) as": 'commit="on-success") as'}, {"test_by_default_the_handler_commits"}),
        ({" and self.veto(reply.status)": " and False"}, {"test_the_reply_may_veto_the_commit*"}),
        ({"return reply": "pass\n        return reply", FINISH: ""}, {"test_the_reply_may_veto_the_commit*"}),
        (
            {"            reply = call()\n": "            try:\n                reply = call()\n"
             "            except Exception:\n                raise RuntimeError('failed') from None\n"},
            {"test_an_error_rolls_back_and_is_kept"},
        ),
        (
            {FINISH: "            try:\n    " + FINISH + "            except Exception:\n                pass\n"},
            {"test_a_failing_commit_is_visible", "test_nothing_is_left_behind"},
        ),
        (
            {OPEN: 'work = scope(f"delivery of {name}", commit=self.commit).__enter__()\n        if True:'},
            {"test_an_error_rolls_back_and_is_kept", "test_nothing_is_left_behind"},
        ),
        (
            {OPEN: 'work = scope(f"delivery of {name}", commit=self.commit).__enter__()\n        if True:', FINISH: ""},
            {"test_the_work_is_over_before_its_stream"},
        ),
        (
            {
                "import ConfigurationError, scope": "import ConfigurationError, begin_scope",
                OPEN: 'work = begin_scope("all", f"delivery of {name}", commit=self.commit)\n        if True:',
                FINISH: "",
            },
            {"test_each_piece_of_work_has_its_own", "test_work_at_the_same_time_is_apart"},
        ),
    ],
    ids=["no name", "no commit", "always commits", "no veto", "no finish", "another error", "hides", "leaks", "late",
         "shared"],
)  # fmt: skip
def test_a_mistake_in_the_integration_is_found(pytester, replace, failing):
    """By the test that names the promise."""
    only = " or ".join(name.rstrip("*") for name in failing)
    result = run(pytester, "-k", only, replace=replace, append="    limit = 0.2\n")
    for name in failing:
        result.stdout.fnmatch_lines(f"FAILED test_courier_scopes.py::TestCourierScopes::{name}*")


def test_what_does_not_apply_is_shown(pytester):
    """With the reason, for the feature that was declared and no other."""
    result = run(pytester, append='    not_applicable = {"veto": "a courier has no opinion"}\n')
    result.assert_outcomes(passed=TESTS - 2, skipped=2)
    result.stdout.fnmatch_lines("SKIPPED * TestCourierScopes: veto does not apply: a courier has no opinion")
