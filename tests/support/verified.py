"""Tests that TRACEJIT_VERIFY_CALLS leaves out: they assert what a verified call changes by its
nature. Each is the beginning of names, with the reason."""

from __future__ import annotations

import os

VERIFYING = bool(os.environ.get("TRACEJIT_VERIFY_CALLS"))  # other numbers of traces and replays

_PRINTED = "what a step prints is printed once more, by eager"
_RUNS = "it counts how often the Python of a step runs, and eager runs it once more"
_TRACES = "it counts traces, and one that finds a plan that is due is made once more"
_LAUNCHES = "many calls are one launch once they are replayed, and verified calls are not"
_FAULTS = "it plants a fault, which is found"
_NOT_RUN = "its kernels are noted and not run, so nothing is computed"
NOT_VERIFIED = {
    "test_training_loops.py::test_a_call_that_prints": _PRINTED,
    "test_training_loops.py::test_calls_that_print": _PRINTED,
    "test_adversarial_world.py::test_world[writing_to_standard_output]": _PRINTED,
    "test_adversarial_world.py::test_the_reason_of_a_rerun_is_one_warning_that_names_the_line"
    "[printing]": _PRINTED,
    "test_adversarial_habits.py::test_case[log_lines_every_five_steps]": _PRINTED,
    "test_adversarial_state.py::test_case[printed_every_five]": _PRINTED,
    "test_adversarial_values.py::test_values[printed": _PRINTED,
    "test_adversarial_values.py::test_values[nothing_selected]": _PRINTED,
    "test_bisect.py::test_a_fault_in_a_small_step": _FAULTS,
    "test_compile.py::test_python_body_counter_by_profile": _RUNS,
    "test_interrupts.py::test_interrupt_while_writing_is_deferred": (
        "an interrupt of a verified call leaves all as before it"
    ),
    "test_fallback.py::test_a_step_that_makes_a_plan_on_every_call": (
        "each call makes a plan, and all of them are to be verified"
    ),
    "test_streams.py::test_calls_that_show_nothing_are_replayed": _PRINTED,
    "test_streams.py::test_calls_that_show_go_as_earlier_ones": _PRINTED,
    "test_programs.py::test_no_torch_kernel_computes": "eager does, beside the compiled step",
    "test_trail.py::test_nothing_of_the_users_is_kept_alive": _TRACES,
    "test_trail.py::test_what_is_put_on_an_intermediate_is_not_kept_alive": _TRACES,
    "test_trail.py::test_models_and_optimizers_are_not_kept_alive": _TRACES,
    "test_trail.py::test_each_number_of_selected_elements_is_a_way_of_its_own": _TRACES,
    "test_trail.py::test_proxies_are_used_again_only": "ids of intermediates are others in eager",
    "test_attention.py::test_what_is_not_a_number_stays_where_it_is_seen[v]": (
        "eager's 0 · NaN behind a mask reaches the rows of its block, and ours none"
    ),
    "test_foreach.py::test_wrong_tables_are_seen": _FAULTS,
    "test_cuda_device.py::test_a_step_is_launched_on_the_current_stream": _NOT_RUN,
    "test_cuda_device.py::test_numbers_are_copied_once": _NOT_RUN,
    "test_cuda_device.py::test_a_step_becomes_a_graph": _NOT_RUN,
    "test_testing.py::test_a_small_error_in_a_parameter_is_caught": _FAULTS,
    "test_testing.py::test_a_nan_is_caught": _FAULTS,
    "test_testing.py::test_a_lost_gradient_is_caught": _FAULTS,
    "test_testing.py::test_a_wrong_integer_is_caught": _FAULTS,
    "test_testing.py::test_a_drifting_free_run_is_caught": _FAULTS,
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
