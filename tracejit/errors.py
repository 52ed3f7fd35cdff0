"""Every error that tracejit raises on purpose: what, where (the user's file:line), what to do.

Classes that mirror an error of eager PyTorch also derive from its class, so `except RuntimeError`
written for eager keeps working around a compiled step.
"""

from __future__ import annotations

import torch


class TracejitError(Exception):
    """Base of all errors of this package; subclasses carry their text as a template."""

    message = "{reason}"

    def __init__(self, **fields: object):
        self.fields = fields
        super().__init__(self.message.format(**fields))


class TracejitWarning(UserWarning):
    """Something that costs speed, with its cause and what to do about it."""


class UnsupportedOperation(TracejitError, RuntimeError):
    """A torch function, or a use of one, that capture has no rule for."""

    message = "{where}: {function} is not supported inside a compiled step ({shapes}). {remedy}"


class ShapeError(TracejitError, RuntimeError):
    """Shapes or dtypes that eager would reject too."""

    message = "{where}: {function}: {reason} ({shapes})"


class DtypeError(ShapeError, NotImplementedError):
    """A dtype for which eager has not implemented a function."""


class AxisError(TracejitError, IndexError):
    """An axis or index out of range."""

    message = "{where}: {reason}"


class ArgumentError(TracejitError, ValueError):
    """Arguments whose values eager rejects."""

    message = "{where}: {function}: {reason}"


class LinAlgError(TracejitError, torch.linalg.LinAlgError):
    """A matrix that eager refuses for its values: not invertible, not positive definite, …"""

    message = "{where}: {function}: {reason}"


class AutogradError(TracejitError, RuntimeError):
    """A use of autograd that eager rejects: in-place on a leaf, a saved tensor modified, …"""

    message = "{where}: {reason}"


class DerivativeError(AutogradError, NotImplementedError):
    """A derivative that eager has not implemented."""


class ValueDependentError(TracejitError, RuntimeError):
    """Python asked for the value of a tensor in a form that a trace cannot give."""

    message = (
        "{where}: {function} needs the value of a tensor of shape {shape}, and a compiled step "
        "is traced without values. {remedy}"
    )


class LeakedTracer(TracejitError, RuntimeError):
    """An intermediate of a trace was used outside it, or by code that bypasses interception."""

    message = (
        "{where}: {function} was called on an intermediate tensor of a compiled step, "
        "{reason}. {remedy}"
    )


class SideEffectError(TracejitError, RuntimeError):
    """The step changed something that a compiled step cannot honour."""

    message = "{where}: {reason}. {remedy}"


class CannotFallBack(TracejitError, RuntimeError):
    """A call that cannot be compiled, and cannot be run eagerly either, because it has already done
    something that must not be done twice. Later calls run eagerly from the start."""

    message = (
        "{cause}. The call cannot be run eagerly instead, since {reason}, which must not happen "
        "twice. From now on calls like this run eagerly from the start; or move that out of the "
        "step"
    )


class ReplayNotArmed(TracejitError, RuntimeError):
    """`mode="replay"` was asked for and the step cannot be proven safe to replay."""

    message = 'mode="replay" was asked for, but this step must rerun its Python: {reason}'


class WrongResult(TracejitError, RuntimeError):
    """A verified call of the compiled step left something else behind than eager. Its result was
    dropped, and its plan is not used any more."""

    message = "{step}: {how} differs from eager in {differences}{blame}{evidence}"


class BackendUnavailable(TracejitError, RuntimeError):
    """The executor asked for cannot run in this process."""

    message = "backend {backend!r} cannot run here: {reason}. {remedy}"


class TargetError(TracejitError, RuntimeError):
    """A step that is built for a GPU which need not be here was called."""

    message = "{reason}. {remedy}"


class LaunchError(TracejitError, RuntimeError):
    """A kernel could not be brought to the GPU, or not be launched there. Writes of earlier
    launches of the call have happened."""

    message = "{where}{launch} of step {step!r} {what} on {device}: {reason}"


class CaptureError(TracejitError, RuntimeError):
    """A compiled step was called while a CUDA graph is captured, and cannot be part of it."""

    message = "a compiled step cannot join the CUDA graph that is captured: {reason}. {remedy}"


class GraphError(TracejitError, RuntimeError):
    """A step was to run as a CUDA graph, and cannot."""

    message = (
        "step {step!r} cannot run as a CUDA graph: {reason}. It runs without require_graph=True"
    )


class CollectiveError(TracejitError, RuntimeError):
    """A collective that torch.distributed could not bring to its end, such as where a rank is gone.
    Nothing of the step was committed."""

    message = "{what} failed: {reason}"


class RanksDiffer(TracejitError, RuntimeError):
    """Ranks of a process group that came to a compiled step with different collectives. Nothing was
    communicated, and nothing of the step was committed, on any rank."""

    message = "{step}: the ranks of process group {group!r} do not agree: {reason}"


class InputsExhausted(TracejitError, RuntimeError):
    """Under `join(throw_on_early_termination=True)`: some rank has no more inputs."""

    message = "Detected at least one rank that exhausted inputs. Throwing across all ranks."


class CannotSave(TracejitError, RuntimeError):
    """A step has something that a file cannot keep: code of the user's that decides, or an object
    of the user's that it changes."""

    message = "{step} cannot be saved: {reason}. {remedy}"


class MissingPackage(TracejitError, ImportError):
    """A package that one of the extras brings is not installed."""

    message = "{what} needs the package {package}: pip install 'tracejit[{extra}]'"


class CannotExport(TracejitError, RuntimeError):
    """A step has something that a file of another format cannot say."""

    message = "{where}: {what} cannot be exported to ONNX: {reason}. {remedy}"


class CannotEject(TracejitError, RuntimeError):
    """A step does something that a file without tracejit cannot."""

    message = "{step} cannot be ejected: {reason}. {remedy}"


class StaticGraphError(TracejitError, ValueError):
    """A static graph was built, or fed, with what does not go together."""

    message = "static graph: {reason}"


class SavedFileError(TracejitError, ValueError):
    """A file that is no saved step, is damaged, or was written by a later version."""

    message = "{path} cannot be loaded: {reason}"


class CallError(TracejitError, ValueError):
    """A loaded step was called with arguments that none of its plans takes."""

    message = "{step}: {reason}"


class InvalidGraph(TracejitError):
    """A malformed Graph, Kernel or Plan: a bug in a pass, or a text that does not parse."""

    message = "{reason}"


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
