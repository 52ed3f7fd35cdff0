"""Every class of error and warning has an entry in docs/errors.md whose program raises it."""

from __future__ import annotations

import ast
import os
import re
import string
from pathlib import Path

import pytest

from support import error_page
from support.error_page import PAGE, PROGRAMS, classes, page, programs, quoted_on_the_page
from tracejit.errors import TracejitError, TracejitWarning

NAMES = sorted(path.stem for path in PROGRAMS.glob("*.py"))
KINDS = {kind.__name__: kind for kind in classes()}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_a_class_says_what_it_means_and_what_to_do(kind: type):
    assert "__doc__" in vars(kind) and "advice" in vars(kind), "it has no words of its own"
    assert len(error_page.meaning(kind)) > 20 and len(kind.advice) > 20
    assert kind.advice.endswith(".") and programs(kind), (
        f"docs/errors/{kind.__name__}.py is missing"
    )


def test_every_program_is_of_a_class():
    assert {name.partition("_")[0] for name in NAMES} == KINDS.keys()


@pytest.mark.sweep(3)
@pytest.mark.parametrize("name", NAMES)
def test_golden_programs_raise_what_the_page_quotes(name: str, tmp_path: Path):
    """TRACEJIT_ACCEPT=1 puts what is raised on the page, TRACEJIT_TEST_ALL=1 runs all of them."""
    path = PROGRAMS / f"{name}.py"
    assert len(path.read_text().splitlines()) <= 32, "it is not small"
    ast.parse(path.read_text())
    said = error_page.raised(path, tmp_path)
    kind = name.partition("_")[0]
    assert said.startswith(f"{kind}: "), said
    if KINDS[kind] is not TracejitWarning:
        fixed = [x for x, *_ in string.Formatter().parse(KINDS[kind].message) if x.strip(" :.,()")]
        assert all(x in said for x in fixed), f"{said!r} is not of the template"
    found = error_page.shown(said)
    known = quoted_on_the_page() if PAGE.exists() else {}
    if os.environ.get("TRACEJIT_ACCEPT") == "1":
        PAGE.write_text(page(dict.fromkeys(NAMES, "") | known | {name: found}))
    assert quoted_on_the_page().get(name) == found, "`make accept` rewrites docs/errors.md"


def test_golden_page_is_that_of_the_classes():
    said = quoted_on_the_page()
    if os.environ.get("TRACEJIT_ACCEPT") == "1":
        PAGE.write_text(page(dict.fromkeys(NAMES, "") | said))
    assert PAGE.read_text() == page(said), "`make accept` rewrites docs/errors.md"


def test_a_class_without_an_entry_is_found():
    class Unheard(TracejitError):
        pass

    assert Unheard not in classes()  # it is of a test
    Unheard.__module__ = "tracejit.errors"
    try:
        assert Unheard in classes()
        with pytest.raises(AssertionError, match="no words of its own"):
            test_a_class_says_what_it_means_and_what_to_do(Unheard)
    finally:
        Unheard.__module__ = __name__


def test_links_of_the_page_lead_somewhere():
    for name in re.findall(r"\]\(([^)#]+)\)", PAGE.read_text()):
        assert (PAGE.parent / name).exists(), name
