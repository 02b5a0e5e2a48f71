"""What a block may ask for, and what contradicts itself: DESIGN's Transactions 1, before anything is entered."""

from typing import Any

import pytest

from dbscope import ConfigurationError
from dbscope.terms import Kind, Terms, terms_of


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({}, Kind.REQUIRED),
        ({"nested": True}, Kind.NESTED),
        ({"new": True}, Kind.NEW),
        ({"nested": False, "new": False}, Kind.REQUIRED),
        ({"kind": "requires-new", "new": True}, Kind.NEW),
        *(({"kind": kind.value}, kind) for kind in Kind if kind is not Kind.READER),
    ],
)
def test_transactions_1_the_kind(options: Any, kind: Kind) -> None:
    """A kind goes by Spring's name, or by its switch."""
    assert terms_of(options).kind is kind


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"isolate": True}, r"no option 'isolate'; it has isolation, .*kind, nested"),
        ({"kind": "required_new"}, r"one of 'required', 'requires-new', .*'never', not 'required_new'"),
        ({"kind": "reader"}, "not 'reader'"),
        ({"kind": ["never"]}, r"not \['never'\]"),
        ({"kind": "never", "new": True}, "'never' and 'requires-new' were asked for together"),
        ({"kind": "supports", "durable": True}, "which kind='supports' cannot"),
        ({"nested": True, "durable": True}, "which kind='nested' cannot"),
        ({"rollback_for": "KeyError"}, "rollback_for takes a class of exceptions, .* not 'KeyError'"),
        ({"no_rollback_for": (KeyError, KeyboardInterrupt)}, "What is no Exception .* always rolls back"),
        ({"no_rollback_for": KeyError, "rollback_for": (KeyError,)}, "KeyError is in both"),
    ],
)
def test_bad_input_options_of_a_block(options: Any, says: str) -> None:
    """What cannot be meant is refused where it is written, with what can."""
    with pytest.raises(ConfigurationError, match=says):
        terms_of(options)


@pytest.mark.parametrize(
    ("error", "rolls_back"),
    [
        (KeyError(), True),
        (IndexError(), False),
        (LookupError(), False),
        (ValueError(), True),
        (KeyboardInterrupt(), True),
        (None, False),
    ],
)
def test_transactions_1_the_nearest_class_decides(error: BaseException | None, rolls_back: bool) -> None:
    """Of the two lists, the one that names the nearest of the error's classes counts; no rule rolls back."""
    terms = Terms(rollback_for=(KeyError,), no_rollback_for=(LookupError,))
    assert terms.failure(error) is (error if rolls_back else None)
