"""Autocast inside a step: which arguments of a torch function are cast before its rule sees them.

In: a torch call and the state of autocast on this thread. Out: its arguments, those that torch
would cast replaced by casts. Rules know nothing of it. As in eager each cast has a derivative, and
that of a weight from outside is made once and used until autocast's cache is cleared.

The lists are torch's own (ATen/autocast_mode.h, and autocast_mode.cpp for the CPU), told by the
functions that a user calls: tests/test_autocast.py compares each with the running torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from tracejit.capture.trace.state import TraceState
from tracejit.capture.trace.table import RULES, spellings
from tracejit.capture.trace.tensor import TO_IR
from tracejit.ir.types import DType, f32, f64
from tracejit.records import dataclass

Tensor = torch.Tensor
_DEVICES = ("cpu", "cuda")

# per type of device: enabled, the lower precision; and whether casts of weights are cached
State = tuple[tuple[bool, torch.dtype], tuple[bool, torch.dtype], bool]


def state() -> State | None:
    """The state of autocast on this thread; None while it is off."""
    return full_state() if torch._C._is_any_autocast_enabled() else None


def full_state() -> State:
    """The state of autocast on this thread, whether it is on or not."""
    (cpu, cuda) = ((torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in _DEVICES)
    return cpu, cuda, torch.is_autocast_cache_enabled()


def set_state(now: State | None) -> None:
    """Let autocast be as `full_state`, or `state`, has described it."""
    if now is None:
        for device in _DEVICES:
            torch.set_autocast_enabled(device, False)
        return
    for device, (enabled, dtype) in zip(_DEVICES, now, strict=False):
        torch.set_autocast_enabled(device, enabled)
        torch.set_autocast_dtype(device, dtype)
    torch.set_autocast_cache_enabled(now[2])


def is_nested() -> bool:
    """Whether this is inside a region of autocast, enabled or not: the cache lives on after it."""
    torch.autocast_increment_nesting()
    return torch.autocast_decrement_nesting() > 0


# ---- which functions


@dataclass(frozen=True, slots=True)
class _Call:
    """A call whose arguments are being cast."""

    t: TraceState
    device: str
    lower: DType

    def is_eligible(self, x: object) -> bool:
        """Whether autocast of this device looks at an argument."""
        if not isinstance(x, Tensor):
            return False
        h = self.t.lift(x)
        return h.dtype.is_float and h.dtype is not f64 and h.device.startswith(self.device)

    def cast(self, x: object, to: DType) -> object:
        """An argument in another dtype; sequences of tensors item by item."""
        if type(x) in (list, tuple):
            return type(x)([self.cast(item, to) for item in x])
        if not self.is_eligible(x) or self.t.lift(x).dtype is to:
            return x
        return _cast(self.t, x, to, kept=to is self.lower)

    def all_to(self, to: DType, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """All arguments in one dtype."""
        args = tuple([self.cast(x, to) for x in args])
        return args, {k: self.cast(x, to) for k, x in kwargs.items()}


Policy = Callable[[_Call, tuple, dict], tuple[tuple, dict]]


def _lower(call: _Call, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    return call.all_to(call.lower, args, kwargs)


def _float32(call: _Call, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    return call.all_to(f32, args, kwargs)


def _widest(call: _Call, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """The widest of the lower precision and what is given; float64 is not looked at."""
    to = call.lower
    for x in _tensors((*args, *kwargs.values())):
        if not call.is_eligible(x):
            continue
        dtype = call.t.lift(x).dtype
        if dtype is f32:
            to = f32
        elif dtype is not call.lower and to is not f32:
            raise call.t.shape_error("Unexpected floating ScalarType in at::autocast::prioritize")
    return call.all_to(to, args, kwargs)


def _tensors(xs: Iterable[object]) -> Iterable[object]:
    for x in xs:
        if type(x) in (list, tuple):
            yield from _tensors(x)
        else:
            yield x


def _first_float32(call: _Call, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """The result is float32, unless a dtype is asked for: so is then the first argument."""
    if any(isinstance(x, torch.dtype) for x in (*args, *kwargs.values())):
        return args, kwargs
    if args:
        return (call.cast(args[0], f32), *args[1:]), kwargs
    return args, {k: call.cast(x, f32) if k in _FIRST else x for k, x in kwargs.items()}


_FIRST = ("input", "self", "x", "A")


def _padded(call: _Call, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """F.pad: what it pads with decides."""
    mode = kwargs.get("mode", args[2] if len(args) > 2 else "constant")
    pad = kwargs.get("pad", args[1] if len(args) > 1 else ())
    if mode == "replicate" or (mode == "reflect" and len(pad) <= 4):
        return _float32(call, args, kwargs)
    return args, kwargs


def _normed(call: _Call, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """torch._weight_norm: along the first or last axis it is one function, else composed."""
    dim = kwargs.get("dim", args[2] if len(args) > 2 else 0)
    if dim in (0, len(call.t.lift(args[0]).shape) - 1):
        return args, kwargs
    return _float32(call, args, kwargs)


def _refused(what: str) -> Policy:
    def policy(call: _Call, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        raise call.t.unsupported(f"{what}; call it within torch.autocast({call.device!r}, False)")

    return policy


_of_onednn = _refused("An lstm has no rule under autocast where torch leaves it to oneDNN")


def _of_products(call: _Call, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """torch.lstm, which casts within its products where oneDNN does not compute it: of a packed
    sequence, and with projections."""
    if len(args) > 1 and isinstance(args[1], torch.Tensor):  # the sizes of the steps' batches
        return args, kwargs
    states = args[1] if len(args) > 1 else kwargs.get("hx")
    if isinstance(states, (list, tuple)) and len({x.shape[-1] for x in states}) == 2:
        return args, kwargs
    return _of_onednn(call, args, kwargs)


_SPACES = {
    "": None,
    "linalg": torch._C._linalg,
    "functional": torch.functional,
    "builtin": torch._C._VariableFunctions,
}


def _table(*rows: tuple[Policy, str]) -> dict[Callable, Policy]:
    found: dict[Callable, Policy] = {}
    for policy, names in rows:
        for name in names.split():
            space, _, bare = name.rpartition(".")
            owner = _SPACES[space]
            for function in spellings(name) if owner is None else (getattr(owner, bare),):
                found[function] = policy
    return found


_BOTH = (
    (
        _lower,
        "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d conv_tbc prelu "
        "addmm matmul __matmul__ __rmatmul__ mm linear addbmm baddbmm bmm "
        "scaled_dot_product_attention linalg.linalg_matmul linalg.linalg_vecdot",
    ),
    (
        _float32,
        "poisson_nll_loss cosine_embedding_loss nll_loss cross_entropy hinge_embedding_loss kl_div "
        "l1_loss smooth_l1_loss huber_loss mse_loss margin_ranking_loss multilabel_margin_loss "
        "soft_margin_loss triplet_margin_loss multi_margin_loss binary_cross_entropy_with_logits "
        "cdist builtin.cdist",
    ),
)
POLICIES: dict[str, dict[Callable, Policy]] = {
    "cpu": _table(
        *_BOTH,
        (
            _float32,
            "avg_pool3d adaptive_avg_pool3d max_pool3d adaptive_max_pool3d ctc_loss "
            "adaptive_max_pool3d_with_indices binary_cross_entropy prod trace quantile nanquantile "
            "max_unpool2d max_unpool3d grid_sampler grid_sampler_2d grid_sampler_3d "
            "polar view_as_complex fake_quantize_per_tensor_affine",
        ),
        (
            _float32,
            "_lu_with_info cholesky cholesky_inverse cholesky_solve geqrf inverse lu_solve orgqr "
            "ormqr pinverse qr svd triangular_solve linalg.linalg_cholesky "
            "linalg.linalg_cholesky_ex linalg.linalg_cond linalg.linalg_eigh "
            "linalg.linalg_eigvalsh linalg.linalg_householder_product linalg.linalg_inv "
            "linalg.linalg_inv_ex linalg.linalg_lstsq linalg.linalg_matrix_rank linalg.linalg_qr "
            "linalg.linalg_solve linalg.linalg_svd linalg.linalg_svdvals linalg.linalg_tensorinv "
            "linalg.linalg_tensorsolve",
        ),
        (
            _widest,
            "cat concat concatenate stack hstack vstack dstack column_stack row_stack index_copy",
        ),
        (_padded, "pad"),
        (_refused("_foreach_mm has no rule under autocast"), "_foreach_mm"),
        (_of_products, "lstm"),
    ),
    "cuda": _table(
        *_BOTH,
        (
            _lower,
            "convolution addmv addr mv functional.einsum "
            "functional.chain_matmul builtin.chain_matmul "
            "linalg.linalg_multi_dot rnn_tanh_cell rnn_relu_cell lstm_cell gru_cell",
        ),
        (
            _float32,
            "__rdiv__ exp expm1 log log10 log2 log1p reciprocal rsqrt tan acos asin arccos arcsin "
            "cosh sinh erfinv pow __pow__ __rpow__ square softplus layer_norm group_norm rms_norm "
            "native_layer_norm "
            "cosine_similarity dist pdist renorm logsumexp normalize "
            "upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_linear1d "
            "_upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_nearest_exact3d "
            "upsample_bilinear2d _upsample_bilinear2d_aa upsample_trilinear3d "
            "upsample_bicubic2d _upsample_bicubic2d_aa",
        ),
        (
            _first_float32,
            "prod softmax log_softmax softmin cumprod cumsum sum norm functional.norm "
            "linalg.linalg_norm linalg.linalg_vector_norm linalg.linalg_matrix_norm",
        ),
        (
            _widest,
            "addcdiv addcmul atan2 arctan2 bilinear cross dot vdot index_put scatter_add "
            "grid_sampler functional.tensordot builtin.tensordot",
        ),
        (
            _refused("A recurrent network has no rule under autocast on a GPU"),
            "rnn_tanh rnn_relu lstm gru",
        ),
        (_normed, "_weight_norm"),
        (_refused("pairwise_distance has no rule under autocast on a GPU"), "pairwise_distance"),
        (
            _refused("torch refuses it under autocast on a GPU: use the form with logits"),
            "binary_cross_entropy",
        ),
    ),
}


# ---- casting


def casted(t: TraceState, func: Callable, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """The arguments of a torch call as autocast hands them on."""
    if kwargs.get("out") is not None:  # as functions in place, which torch does not cast for
        return args, kwargs
    for device in _DEVICES:
        policy = POLICIES[device].get(func)
        if policy is not None and torch.is_autocast_enabled(device):
            lower = TO_IR[torch.get_autocast_dtype(device)]
            args, kwargs = policy(_Call(t, device, lower), args, kwargs)
    return args, kwargs


def _cast(t: TraceState, x: Tensor, to: DType, *, kept: bool) -> Tensor:
    """A tensor in another dtype. That of a weight is `kept` until the cache is cleared, whatever
    is written to the weight, and has its history also under no_grad."""
    h = t.lift(x)
    dtype = torch.float32 if to is f32 else torch.get_autocast_dtype(h.device.partition(":")[0])
    cached = kept and h.is_real and h.dtype is f32 and h.requires_grad_leaf
    if not (cached and torch.is_autocast_cache_enabled()):
        return RULES[Tensor.to].run(t, x, dtype)
    key = t.casts.region, h
    if key not in t.casts.known:
        with torch.enable_grad():
            made = t.lift(RULES[Tensor.to].run(t, x, dtype))
            t.casts.known[key] = t.read(made), made.strides
    value, strides = t.casts.known[key]
    return t.fresh(t.b.alias(value), strides)
