"""Tests that TRACEJIT_VERIFY_CALLS leaves out: they assert what a verified call changes by its
nature. Each is the beginning of names, with the reason."""

from __future__ import annotations

_PRINTED = "what a step prints is printed once more, by eager"
_RUNS = "it counts how often the Python of a step runs, and eager runs it once more"
_REPLAYS = "it counts replays, and a verified call is none"
_LAUNCHES = "many calls are one launch once they are replayed, and verified calls are not"
NOT_VERIFIED = {
    "test_training_loops.py::test_a_call_that_prints": _PRINTED,
    "test_training_loops.py::test_calls_that_print": _PRINTED,
    "test_adversarial_world.py::test_world[writing_to_standard_output]": _PRINTED,
    "test_adversarial_world.py::test_the_reason_of_a_rerun_is_one_warning_that_names_the_line"
    "[printing]": _PRINTED,
    "test_compile.py::test_python_body_counter_by_profile": _RUNS,
    "test_transformers.py::test_models_train_like_eager_and_replay[gpt2]": _REPLAYS,
    "test_many_steps.py::test_many_calls_are_one_launch": _LAUNCHES,
    "test_many_steps.py::test_updates_of_many_parameters": _LAUNCHES,
    "test_many_steps.py::test_run_again_uses_the_same_kernel": _LAUNCHES,
    "test_many_steps.py::test_outputs_are_not_given_away": _LAUNCHES,
    "test_draws.py::test_states_that_come_from_outside": "a seed by chance is another each time",
    "test_draws.py::test_an_observer_that_fails": "an observer fails in the compiled step alone",
}


def why_not(name: str) -> str:
    """Why a test is left out; "" where it is not. `name`: as file::test[case]."""
    return next((why for start, why in NOT_VERIFIED.items() if name.startswith(start)), "")
