"""A pytest plugin (-p benchmarks.pytest_lines) that tells isolated.py how each test went.

After an error of the device no other test is begun: the process has no use of it any more.
"""

from __future__ import annotations

import pytest

from benchmarks.isolated import Lines, fatal

_lines = Lines()
_worst: dict[str, tuple[str, str]] = {}  # of the phases of the test that runs
_session: list[pytest.Session] = []


def pytest_sessionstart(session: pytest.Session) -> None:
    _session[:] = [session]


def pytest_collection_finish(session: pytest.Session) -> None:
    if session.config.option.collectonly:
        for item in session.items:
            _lines.known(item.nodeid)


def pytest_runtest_logstart(nodeid: str, location: tuple) -> None:
    _worst.clear()
    _lines.begin(nodeid)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.outcome != "passed":
        _worst[report.nodeid] = report.outcome, report.longreprtext
    if report.outcome == "failed" and fatal(report.longreprtext):
        _session[0].shouldstop = "the device is of no more use"


def pytest_runtest_logfinish(nodeid: str, location: tuple) -> None:
    outcome, text = _worst.get(nodeid, ("passed", ""))
    _lines.end(nodeid, outcome, text)
