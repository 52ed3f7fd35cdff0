"""Steps as people write them, exported: what comes back trains on as the step does."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import torch

import tracejit
from support.export_programs import PROGRAMS
from support.onnx_checks import flat

WARM, CALLS = 7, 20  # calls before and after
QUICK = ("gan", "accumulation", "gnn")
DRAWN = ("vae", "mixup_ce")  # what they draw are inputs of a model
TWO_WAYS = ("accumulation",)  # where each file has one way through the step
NEAR = 2e-5


@pytest.fixture(
    scope="module",
    params=[n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in PROGRAMS],
)
def found(request, tmp_path_factory) -> dict[str, object]:
    """What each kind of a step returns in the calls after it was exported, the step itself last."""
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    plain, args = PROGRAMS[request.param]()
    step = tracejit.compile(plain)
    for i in range(WARM):
        step(*args(i))
    assert step.stats.replays
    step.save(folder / "a.step")
    loaded, state = (tracejit.load(folder / "a.step") for _ in range(2))
    kinds = {"loaded": loaded}
    if request.param not in TWO_WAYS:
        step.eject(folder / "ejected.py")
        spec = importlib.util.spec_from_file_location("ejected", folder / "ejected.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        kinds["ejected"] = module.Step(state.state_dict())
    if (
        request.param not in (*DRAWN, *TWO_WAYS)
        and importlib.util.find_spec("onnxruntime") is not None
    ):
        from tracejit.export.onnx.run import OnnxStep

        tracejit.to_onnx(step, folder / "step.onnx", *args(0))
        kinds["onnx"] = OnnxStep(folder / "step.onnx")
    returned: dict[str, list] = {name: [] for name in (*kinds, "eager")}
    for i in range(WARM, WARM + CALLS):
        torch.manual_seed(1000 + i)
        given = args(i)
        for name, call in (*kinds.items(), ("eager", plain)):
            torch.manual_seed(i)
            returned[name].append(call(*given))
    step.draw(folder / "step.svg", measure=False)
    return returned


@pytest.mark.parametrize("kind", ["loaded", "ejected", "onnx"])
def test_it_goes_on_as_eager_does(kind, found):
    if not found.get(kind):
        pytest.skip("it is no export of this program, or the extra onnx is not installed")
    for ours, theirs in zip(found[kind], found["eager"], strict=True):
        assert len(flat(ours)) == len(flat(theirs))
        for a, b in zip(flat(ours), flat(theirs), strict=True):
            assert np.shape(a) == np.shape(b)
            size = np.abs(np.asarray(b, np.float64)).max(initial=0)
            np.testing.assert_allclose(a, b, rtol=NEAR, atol=NEAR * (size + 1e-3))
