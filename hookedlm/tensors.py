"""Small tools for tensors, which know no model: shapes, statistics of matrices, initial weights."""

from __future__ import annotations

import importlib.util
import inspect
import math
import operator
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeVar

import einops
import numpy as np
import torch
from jaxtyping import Float, Int, Num, Shaped
from torch import Tensor, nn

from hookedlm.errors import InputError
from hookedlm.factored_matrix import FactoredMatrix

T = TypeVar("T")

USE_DEFAULT_VALUE = None
"""What stands for "as the model's config says" where an argument can be True, False or this."""


# Shapes -------------------------------------------------------------------------------------------


def to_numpy(tensor: Any) -> np.ndarray:
    """A tensor, array, list, tuple or number as an array on the CPU, without its gradient.

    bfloat16, which numpy lacks, becomes float32. Raises InputError for anything else.
    """
    if isinstance(tensor, np.ndarray):
        return tensor
    if isinstance(tensor, Tensor):
        plain = tensor.detach().cpu().resolve_conj().resolve_neg()
        return (plain.float() if plain.dtype == torch.bfloat16 else plain).numpy()
    if isinstance(tensor, (list, tuple)):
        return np.array([to_numpy(x) if isinstance(x, Tensor) else x for x in tensor])
    if isinstance(tensor, (int, float, complex, bool, str, np.generic)):
        return np.array(tensor)
    raise InputError(
        f"{type(tensor).__name__} can't become an array: give a tensor, an array, a list, a tuple "
        "or a number"
    )


def transpose(tensor: Shaped[Tensor, "... a b"]) -> Shaped[Tensor, "... b a"]:
    """The last two axes swapped."""
    return tensor.mT


def get_corner(tensor: Tensor | FactoredMatrix, n: int = 3) -> Tensor:
    """The first ``n`` along every axis, for a look; of a FactoredMatrix, its product's."""
    if isinstance(tensor, FactoredMatrix):
        return tensor.get_corner(n)
    return tensor[(slice(n),) * tensor.ndim]


def remove_batch_dim(tensor: Shaped[Tensor, "batch ..."]) -> Shaped[Tensor, "..."]:
    """Without its first axis if that has size 1, else as it is."""
    return tensor.squeeze(0)


def repeat_along_head_dimension(
    tensor: Shaped[Tensor, "batch pos d_model"], n_heads: int, clone_tensor: bool = True
) -> Shaped[Tensor, "batch pos n_heads d_model"]:
    """The same for every head. Without ``clone_tensor`` the heads share memory: read only."""
    repeated = einops.repeat(tensor, "batch pos d_model -> batch pos n d_model", n=n_heads)
    return repeated.clone() if clone_tensor else repeated


def get_cumsum_along_dim(
    tensor: Num[Tensor, "..."], dim: int, reverse: bool = False
) -> Num[Tensor, "..."]:
    """The running sum along ``dim``; with ``reverse``, of an element and all after it."""
    return tensor.flip(dim).cumsum(dim).flip(dim) if reverse else tensor.cumsum(dim)


def get_offset_position_ids(
    past_kv_pos_offset: int, attention_mask: Int[Tensor, "batch offset_and_pos"]
) -> Int[Tensor, "batch pos"]:
    """Each position's number among the real ones of its row (0 for padding before the first).

    ``attention_mask`` (1 real, 0 padding) covers past and present; the past's are left out.
    """
    return (attention_mask.cumsum(1) - 1).clamp(min=0)[:, past_kv_pos_offset:]


# What matrices are like ---------------------------------------------------------------------------


def is_square(x: Shaped[Tensor, "..."]) -> bool:
    """Whether it has two axes of one length."""
    return x.ndim == 2 and x.shape[0] == x.shape[1]


def is_lower_triangular(x: Shaped[Tensor, "..."]) -> bool:
    """Whether it is square and 0 above the diagonal."""
    return is_square(x) and x.equal(x.tril())


def check_structure(
    t1: Num[Tensor, "rows columns"], t2: Num[Tensor, "rows columns"], *, verbose: bool = False
) -> bool:
    """Whether two matrices rise and fall in the same places, down the rows and along the columns.

    Prints PASSED or FAILED with the neighbours that disagree, and with ``verbose`` also how. Raises
    InputError for different shapes.
    """
    if t1.ndim != 2 or t1.shape != t2.shape:
        raise InputError(
            f"two matrices of one shape are compared, got {tuple(t1.shape)} and {tuple(t2.shape)}"
        )
    failed = False
    for what, axis in (("rows", 0), ("columns", 1)):
        falls = [
            (t.narrow(axis, 0, t.shape[axis] - 1) >= t.narrow(axis, 1, t.shape[axis] - 1))
            for t in (t1, t2)
        ]
        differ = (falls[0] != falls[1]).any(1 - axis).nonzero().flatten().tolist()
        if verbose:
            for i in differ:
                print(f"{what} {i}:{i + 1}  {[f.select(axis, i).tolist() for f in falls]}")
        if differ:
            print(f"{what} that compare differently with the next: {differ}")
            failed = True
    print("FAILED" if failed else "PASSED")
    return not failed


def composition_scores(
    left: FactoredMatrix, right: FactoredMatrix, broadcast_dims: bool = True
) -> Float[Tensor, "..."]:
    """How much of ``right`` reads what ``left`` writes: ``|LR| / (|L| |R|)``, Frobenius norms.

    Shape [*leading of left, *leading of right]; without ``broadcast_dims`` the leading dimensions
    are broadcast with each other. At most 1, and nan where a matrix is 0. Source: Elhage et al.
    2021, transformer-circuits.pub/2021/framework. Raises InputError when ``left`` has not as many
    columns as ``right`` has rows.
    """
    if left.rdim != right.ldim:
        raise InputError(f"can't compose {left!r} with {right!r}: their inner sizes differ")
    # Rotations on the outside change no norm, and without them the product is [mdim, mdim].
    L, R = left.collapse_l(), right.collapse_r()
    if broadcast_dims:
        L = L.reshape(*left.shape[:-2], *(1,) * (right.ndim - 2), *L.shape[-2:])
    product, norms = (L @ R).norm(dim=(-2, -1)), [M.norm(dim=(-2, -1)) for M in (L, R)]
    return product / (norms[0] * norms[1])


# Initial weights ----------------------------------------------------------------------------------

FanMode = Literal["fan_in", "fan_out"]


def calc_fan_in_and_fan_out(tensor: Shaped[Tensor, "..."]) -> tuple[int, int]:
    """(inputs, outputs) of a weight: [out], [in, out] or [head, in, out], whose outputs are of all
    heads together.

    Raises InputError for other ranks.
    """
    shape = tensor.shape
    if not 1 <= len(shape) <= 3:
        raise InputError(
            f"a weight of shape {tuple(shape)} has no fan: expected [out], [in, out] or "
            "[head, in, out]"
        )
    n_heads = shape[0] if len(shape) == 3 else 1
    return (shape[-2] if len(shape) > 1 else 1), n_heads * shape[-1]


def init_xavier_uniform_(param: Tensor, gain: float = 1.0) -> Tensor:
    """Filled in place, uniformly within ``gain sqrt(6 / (in + out))`` (Glorot and Bengio 2010)."""
    bound = gain * math.sqrt(6 / sum(calc_fan_in_and_fan_out(param)))
    return nn.init.uniform_(param, -bound, bound)


def init_xavier_normal_(param: Tensor, gain: float = 1.0) -> Tensor:
    """Filled in place, with standard deviation ``gain sqrt(2 / (in + out))``."""
    return nn.init.normal_(param, std=gain * math.sqrt(2 / sum(calc_fan_in_and_fan_out(param))))


def init_kaiming_uniform_(
    param: Tensor,
    a: int | float = 0,
    nonlinearity: str = "relu",
    gain: float = 1.0,
    mode: FanMode = "fan_in",
) -> Tensor:
    """Filled in place, uniformly within sqrt(3) times the deviation of `init_kaiming_normal_`."""
    bound = math.sqrt(3) * _kaiming_std(param, a, nonlinearity, gain, mode)
    return nn.init.uniform_(param, -bound, bound)


def init_kaiming_normal_(
    param: Tensor,
    a: int | float = 0,
    nonlinearity: str = "relu",
    gain: float = 1.0,
    mode: FanMode = "fan_in",
) -> Tensor:
    """Filled in place, with standard deviation ``gain g / sqrt(fan)`` (arXiv 1502.01852).

    ``g`` is ``torch.nn.init.calculate_gain(nonlinearity, a)``. Raises InputError for an unknown
    ``mode``.
    """
    return nn.init.normal_(param, std=_kaiming_std(param, a, nonlinearity, gain, mode))


def _kaiming_std(param: Tensor, a: int | float, nonlinearity: Any, gain: float, mode: str) -> float:
    fans = dict(zip(("fan_in", "fan_out"), calc_fan_in_and_fan_out(param), strict=True))
    if mode not in fans:
        raise InputError(f"mode={mode!r}: expected 'fan_in' or 'fan_out'")
    return gain * nn.init.calculate_gain(nonlinearity, a) / math.sqrt(fans[mode])


# Python and the machine ---------------------------------------------------------------------------


def get_nested_attr(obj: Any, attr_str: str) -> Any:
    """``get_nested_attr(model, "blocks.0.attn")``; raises AttributeError as Python does."""
    return operator.attrgetter(attr_str)(obj)


def set_nested_attr(obj: Any, attr_str: str, value: Any) -> None:
    """Sets an attribute given as "a.b.c"."""
    owner, _, name = attr_str.rpartition(".")
    setattr(get_nested_attr(obj, owner) if owner else obj, name, value)


def override_or_use_default_value(default_flag: T, override: T | None = None) -> T:
    """``override``, or ``default_flag`` when that is None."""
    return default_flag if override is None else override


def select_compatible_kwargs(kwargs_dict: Mapping[str, Any], callable: Callable) -> dict[str, Any]:
    """Those of the keyword arguments that ``callable`` takes: all, if it ends in ``**kwargs``."""
    parameters = inspect.signature(callable).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return dict(kwargs_dict)
    names = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    return {name: value for name, value in kwargs_dict.items() if name in names}


def is_library_available(name: str) -> bool:
    """Whether a module of that name can be imported; it is not."""
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):  # a parent is missing, or was blocked
        return False


def warn_if_mps(device: str | torch.device) -> None:
    """A warning if ``device`` is Apple's, where torch's results have been silently wrong."""
    if torch.device(device).type == "mps":
        warnings.warn(
            "some operations of torch give wrong results on mps without an error: compare with "
            "device='cpu' before you trust a number",
            stacklevel=2,
        )


def print_gpu_mem(step_name: str = "") -> None:
    """Prints how many GiB torch's tensors take on all GPUs."""
    n_bytes = sum(torch.cuda.memory_allocated(i) for i in range(torch.cuda.device_count()))
    print(f"{step_name} ~ {n_bytes / 2**30:.2f} GiB allocated on GPU.")
