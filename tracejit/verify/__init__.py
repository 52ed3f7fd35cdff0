"""Verified calls: eager runs beside the compiled step, from the same state, and both are compared.

before.py       the state before a call, to make the call once more
outcome.py      what a call has left behind, as data
compare.py      two outcomes compared, by the rule of `equality.py`
certificate.py  what was verified, when, on what, to what error
runs.py         runs beside each other: observed, traced anew, in float64
verifier.py     which calls of a step are verified, and what follows
step.py         the part of a compiled step that does so
blame.py        the first launch, node and line that are wrong
rules.py        the same for a rule of capture, or its derivative
recording.py    the torch calls of a step as a program
shrink.py       smaller programs and graphs that go wrong in the same way
children.py     work that may crash, in child processes
"""
