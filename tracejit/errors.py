"""Every error that tracejit raises on purpose: what, where (the user's file:line), what to do.

Classes that mirror an error of eager PyTorch also derive from its class, so `except RuntimeError`
written for eager keeps working around a compiled step.
"""

from __future__ import annotations

import torch

from tracejit.quotes import quote


class TracejitError(Exception):
    """Base of all errors of this package; subclasses carry their text as a template.

    A class says what it means in the first words of its docstring, and what a user is to do in
    `advice`. With the program docs/errors/CLASS.py these are its entry in docs/errors.md.
    """

    message = "{reason}"
    advice = ""

    def __init__(self, **fields: object):
        self.fields = fields
        super().__init__(self.message.format(**fields))

    @property
    def text(self) -> str:
        """What the error says, without the user's line of code."""
        return self.args[0]

    def __str__(self) -> str:
        return self.text + quote(self.fields.get("where"))

    def __reduce__(self) -> tuple:
        plain = (str, int, float, type(None))
        fields = {k: x if isinstance(x, plain) else str(x) for k, x in self.fields.items()}
        return _unpickled, (type(self), fields, self.text)


class TracejitWarning(UserWarning):
    """Something that costs speed, with its cause and what to do about it. It is said once."""

    advice = (
        "Do what the warning says, or leave it: the results are eager's either way. "
        '`on_unsupported="raise"` raises an error instead where a call would run eagerly.'
    )


class UnsupportedOperation(TracejitError, RuntimeError):
    """A torch function, or a use of one, that capture has no rule for."""

    message = "{where}: {function} is not supported inside a compiled step ({shapes}). {remedy}"
    advice = (
        "Write it with functions of docs/operations.md, as the message says, or move the call "
        'out of the step. By default (`on_unsupported="eager"`) the call runs eagerly, with one '
        "warning that says the same."
    )


class ShapeError(TracejitError, RuntimeError):
    """Shapes or dtypes that eager would reject too."""

    message = "{where}: {function}: {reason} ({shapes})"
    advice = "Mend the shapes or dtypes at the line that is named: eager PyTorch raises there too."


class DtypeError(ShapeError, NotImplementedError):
    """A dtype for which eager has not implemented a function."""

    advice = "Cast to a dtype that eager implements, such as `x.float()`."


class AxisError(TracejitError, IndexError):
    """An axis or index out of range."""

    message = "{where}: {reason}"
    advice = "Mend the axis or index, or the values of the index tensor: eager raises there too."


class ArgumentError(TracejitError, ValueError):
    """Arguments whose values eager rejects."""

    message = "{where}: {function}: {reason}"
    advice = "Pass a value that eager accepts."


class LinAlgError(TracejitError, torch.linalg.LinAlgError):
    """A matrix that eager refuses for its values: not invertible, not positive definite, …"""

    message = "{where}: {function}: {reason}"
    advice = (
        "Look at the matrix: eager raises too. A step may catch the error, and go on as in eager."
    )


class AutogradError(TracejitError, RuntimeError):
    """A use of autograd that eager rejects: in-place on a leaf, a saved tensor modified, …"""

    message = "{where}: {reason}"
    advice = (
        "Mend the use of autograd, as in eager: put updates under `torch.no_grad()`, clone "
        "before an in-place write, call backward once or with `retain_graph=True`."
    )


class DerivativeError(AutogradError, NotImplementedError):
    """A derivative that eager has not implemented."""

    advice = (
        "Detach the argument that is named, or use another function: eager has no derivative "
        "either."
    )


class ValueDependentError(TracejitError, RuntimeError):
    """Python asked for the value of a tensor in a form that a trace cannot give."""

    message = (
        "{where}: {function} needs the value of a tensor of shape {shape}, and a compiled step "
        "is traced without values. {remedy}"
    )
    advice = (
        "Return the tensor and use it after the call. `loss.item()`, `if loss > t` and "
        "`x[mask]` are supported."
    )


class LeakedTracer(TracejitError, RuntimeError):
    """An intermediate of a trace was used outside it, or by code that bypasses interception."""

    message = (
        "{where}: {function} was called on an intermediate tensor of a compiled step, "
        "{reason}. {remedy}"
    )
    advice = (
        "Use intermediates inside the step only, through torch's public functions and methods, "
        "or return them."
    )


class SideEffectError(TracejitError, RuntimeError):
    """The step changed something that a compiled step cannot honour."""

    message = "{where}: {reason}. {remedy}"
    advice = "Change it outside of the step, or in the way that the message names."


class CannotFallBack(TracejitError, RuntimeError):
    """A call that cannot be compiled, and cannot be run eagerly either, because it has already done
    something that must not be done twice. Later calls run eagerly from the start."""

    message = (
        "{cause}. The call cannot be run eagerly instead, since {reason}, which must not happen "
        "twice. From now on calls like this run eagerly from the start; or move that out of the "
        "step"
    )
    advice = (
        "Move what must not be done twice, or what is not supported, out of the step. Nothing "
        "is left half done: later calls of this kind run eagerly from the start."
    )


class ReplayNotArmed(TracejitError, RuntimeError):
    """`mode="replay"` was asked for and the step cannot be proven safe to replay."""

    message = 'mode="replay" was asked for, but this step must rerun its Python: {reason}'
    advice = (
        'Move what the message names out of the step, or leave `mode` at "auto", which reruns '
        "the step's Python instead."
    )


class WrongResult(TracejitError, RuntimeError):
    """A verified call of the compiled step left something else behind than eager. Its result was
    dropped, and its plan is not used any more."""

    message = "{step}: {how} differs from eager in {differences}{blame}{evidence}"
    advice = (
        "It is a fault of tracejit: please report it with the file of evidence. `python -m "
        "tracejit bisect FILE:STEP` shrinks the step, and `replay-evidence` says whether "
        "another version is right. By default eager's results are kept until then."
    )


class BackendUnavailable(TracejitError, RuntimeError):
    """The executor asked for cannot run in this process."""

    message = "backend {backend!r} cannot run here: {reason}. {remedy}"
    advice = 'Leave `backend` at "auto", or install what is missing.'


class TargetError(TracejitError, RuntimeError):
    """A step that is built for a GPU which need not be here was called."""

    message = "{reason}. {remedy}"
    advice = "Call `step.build(...)`, and compile the step without a target where it is to run."


class LaunchError(TracejitError, RuntimeError):
    """A kernel could not be brought to the GPU, or not be launched there. Writes of earlier
    launches of the call have happened."""

    message = "{where}{launch} of step {step!r} {what} on {device}: {reason}"
    advice = (
        "Read the reason: the GPU's memory, its driver, or a kernel that does not fit it. Where "
        "earlier launches have written, go on from a checkpoint."
    )


class CaptureError(TracejitError, RuntimeError):
    """A compiled step was called while a CUDA graph is captured, and cannot be part of it."""

    message = "a compiled step cannot join the CUDA graph that is captured: {reason}. {remedy}"
    advice = (
        "Call the step a few times, with arguments like those of the capture, before it is "
        "captured."
    )


class GraphError(TracejitError, RuntimeError):
    """A step was to run as a CUDA graph, and cannot."""

    message = (
        "step {step!r} cannot run as a CUDA graph: {reason}. It runs without require_graph=True"
    )
    advice = "Leave out `require_graph=True`, or take out what the message names."


class CollectiveError(TracejitError, RuntimeError):
    """A collective that torch.distributed could not bring to its end, such as where a rank is gone.
    Nothing of the step was committed."""

    message = "{what} failed: {reason}"
    advice = (
        "See why the rank or the process group is gone, and start the group again; parameters "
        "are as before the call."
    )


class RanksDiffer(TracejitError, RuntimeError):
    """Ranks of a process group that came to a compiled step with different collectives. Nothing was
    communicated, and nothing of the step was committed, on any rank."""

    message = "{step}: the ranks of process group {group!r} do not agree: {reason}"
    advice = (
        "Let all ranks come to the step with the same collectives, in the same order: the "
        "message says where they part."
    )


class InputsExhausted(TracejitError, RuntimeError):
    """Under `join(throw_on_early_termination=True)`: some rank has no more inputs."""

    message = "Detected at least one rank that exhausted inputs. Throwing across all ranks."
    advice = (
        "Give all ranks as many batches, or leave `throw_on_early_termination` out: ranks without "
        "inputs then take part in the others' steps."
    )


class CannotSave(TracejitError, RuntimeError):
    """A step has something that a file cannot keep: code of the user's that decides, or an object
    of the user's that it changes."""

    message = "{step} cannot be saved: {reason}. {remedy}"
    advice = (
        "Do what the message says, such as to print after the call, or save the state by "
        "`torch.save`."
    )


class MissingPackage(TracejitError, ImportError):
    """A package that one of the extras brings is not installed."""

    message = "{what} needs the package {package}: pip install 'tracejit[{extra}]'"
    advice = "Install the package, as the message says."


class CannotExport(TracejitError, RuntimeError):
    """A step has something that a file of another format cannot say."""

    message = "{where}: {what} cannot be exported to ONNX: {reason}. {remedy}"
    advice = "Write that part in other functions, or leave it out of the step that is exported."


class CannotEject(TracejitError, RuntimeError):
    """A step does something that a file without tracejit cannot."""

    message = "{step} cannot be ejected: {reason}. {remedy}"
    advice = "Move that part out of the step that is ejected; `step.save` keeps more."


class StaticGraphError(TracejitError, ValueError):
    """A static graph was built, or fed, with what does not go together."""

    message = "static graph: {reason}"
    advice = "Give each placeholder a name of its own, and feed what was declared."


class SavedFileError(TracejitError, ValueError):
    """A file that is no saved step, is damaged, or was written by a later version."""

    message = "{path} cannot be loaded: {reason}"
    advice = "Save the step again with this version, or get the file anew. Nothing of it was run."


class CallError(TracejitError, ValueError):
    """A loaded step was called with arguments that none of its plans takes."""

    message = "{step}: {reason}"
    advice = (
        "Pass arguments like those that the step was saved with; the message names what "
        "differs. To save more plans, call the step with such arguments before."
    )


class InvalidGraph(TracejitError):
    """A malformed Graph, Kernel or Plan: a bug in a pass, or a text that does not parse."""

    message = "{reason}"
    advice = (
        "Mend the text, if you have written it. Else it is a fault of a pass: please report it, "
        "with `python -m tracejit bisect FILE:STEP`."
    )


def _unpickled(kind: type[TracejitError], fields: dict, text: str) -> TracejitError:
    """An error of another process."""
    error = kind(**fields)
    error.args = (text,)
    return error


OF_EAGER = (
    ShapeError,
    AxisError,
    ArgumentError,
    LinAlgError,
    AutogradError,
    StaticGraphError,
    InputsExhausted,
)  # eager raises these too
OF_RANKS = (CollectiveError, RanksDiffer)  # the other ranks raise as well
