"""`FactoredMatrix`: the product of two thin matrices, never multiplied out unless asked.

A head's QK and OV circuits are ``[d_model, d_model]`` matrices of rank ``d_head``. Everything here
(singular values, eigenvalues, norms, products) works on the two factors:

    A [.., ldim, mdim]  @  B [.., mdim, rdim]   =   AB [.., ldim, rdim],   mdim the small one
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Complex, Float
from torch import Tensor

from hookedlm.errors import InputError

HALF = (torch.float16, torch.bfloat16)


class SVD(NamedTuple):
    """``AB = U @ diag(S) @ Vh.mT``; ``Vh`` holds the right singular vectors as columns."""

    U: Float[Tensor, "... ldim k"]
    S: Float[Tensor, "... k"]
    Vh: Float[Tensor, "... rdim k"]


class FactoredMatrix:
    """The matrix ``A @ B``, kept as its two factors, with leading dimensions broadcast.

    Behaves like a tensor of shape [*leading, ldim, rdim] under ``@``, ``* scalar``, ``+``, ``-``,
    indexing and ``.T``; ``.AB`` multiplies out. Don't edit the factors in place.

    Raises InputError when the inner dimensions differ or the leading ones don't broadcast.
    """

    def __init__(self, A: Float[Tensor, "... ldim mdim"], B: Float[Tensor, "... _ rdim"]):
        if A.ndim < 2 or B.ndim < 2 or A.shape[-1] != B.shape[-2]:
            raise InputError(
                f"A {tuple(A.shape)} and B {tuple(B.shape)} are no factors of a matrix: A is "
                "[..., ldim, mdim] and B is [..., mdim, rdim], with the same mdim"
            )
        try:
            leading = torch.broadcast_shapes(A.shape[:-2], B.shape[:-2])
        except RuntimeError as error:
            raise InputError(
                f"the leading dimensions of A {tuple(A.shape)} and B {tuple(B.shape)} don't "
                "broadcast"
            ) from error
        self.A = A.expand(*leading, *A.shape[-2:])
        self.B = B.expand(*leading, *B.shape[-2:])
        self.ldim, self.mdim, self.rdim = A.shape[-2], A.shape[-1], B.shape[-1]
        self.shape = torch.Size((*leading, self.ldim, self.rdim))
        self.has_leading_dims = len(leading) > 0
        self._svd: SVD | None = None

    @property
    def ndim(self) -> int:
        """How many dimensions the product has, the leading ones included."""
        return len(self.shape)

    @property
    def pair(self) -> tuple[Float[Tensor, "... ldim mdim"], Float[Tensor, "... mdim rdim"]]:
        """(A, B)."""
        return self.A, self.B

    @property
    def AB(self) -> Float[Tensor, "... ldim rdim"]:
        """The product, multiplied out."""
        return self.A @ self.B

    @property
    def BA(self) -> Float[Tensor, "... mdim mdim"]:
        """The factors multiplied in the other order; it has the eigenvalues of AB."""
        self._check_square("BA")
        return self.B @ self.A

    @property
    def T(self) -> FactoredMatrix:
        """The transposed matrix (of each pair of leading indices)."""
        return FactoredMatrix(self.B.mT, self.A.mT)

    def __matmul__(self, other: Tensor | FactoredMatrix) -> Tensor | FactoredMatrix:
        """``self @ vector`` is a tensor [.., ldim]; with a matrix it is a FactoredMatrix."""
        if isinstance(other, FactoredMatrix):
            return (self @ other.A) @ other.B
        if not isinstance(other, Tensor):
            return NotImplemented
        if other.ndim < 1 or other.shape[-2 if other.ndim > 1 else -1] != self.rdim:
            raise InputError(f"can't multiply {self!r} with a tensor {tuple(other.shape)}")
        if other.ndim == 1:
            return (self.A @ (self.B @ other).unsqueeze(-1)).squeeze(-1)
        if self.rdim > self.mdim:
            return FactoredMatrix(self.A, self.B @ other)
        return FactoredMatrix(self.AB, other)

    def __rmatmul__(self, other: Tensor) -> Tensor | FactoredMatrix:
        """``vector @ self`` is a tensor [.., rdim]; with a matrix it is a FactoredMatrix."""
        if not isinstance(other, Tensor):
            return NotImplemented
        if other.ndim < 1 or other.shape[-1] != self.ldim:
            raise InputError(f"can't multiply a tensor {tuple(other.shape)} with {self!r}")
        if other.ndim == 1:
            return ((other @ self.A).unsqueeze(-2) @ self.B).squeeze(-2)
        if self.ldim > self.mdim:
            return FactoredMatrix(other @ self.A, self.B)
        return FactoredMatrix(other, self.AB)

    def __mul__(self, scalar: int | float | Tensor) -> FactoredMatrix:
        """Scaled by a number or a tensor of one element; raises InputError for larger tensors."""
        return FactoredMatrix(self.A * one_number(scalar), self.B)

    def __rmul__(self, scalar: int | float | Tensor) -> FactoredMatrix:
        return self * scalar

    def __truediv__(self, scalar: int | float | Tensor) -> FactoredMatrix:
        return FactoredMatrix(self.A / one_number(scalar), self.B)

    def __neg__(self) -> FactoredMatrix:
        return FactoredMatrix(-self.A, self.B)

    def __add__(self, other: FactoredMatrix) -> FactoredMatrix:
        """The sum of two factored matrices, factored still: inner dimensions add up."""
        if not isinstance(other, FactoredMatrix):
            return NotImplemented
        if self.shape[-2:] != other.shape[-2:]:
            raise InputError(f"{self!r} and {other!r} have different shapes")
        leading = torch.broadcast_shapes(self.shape[:-2], other.shape[:-2])
        mine, others = self._expanded(leading), other._expanded(leading)
        return FactoredMatrix(
            torch.cat((mine.A, others.A), dim=-1), torch.cat((mine.B, others.B), dim=-2)
        )

    def __sub__(self, other: FactoredMatrix) -> FactoredMatrix:
        return self + (-other) if isinstance(other, FactoredMatrix) else NotImplemented

    def __getitem__(self, idx: Any) -> FactoredMatrix:
        """Indexed like the product; the two matrix axes are never dropped (an int keeps size 1).

        Leading indices are what torch takes. Rows and columns are picked independently of each
        other. Raises InputError for more indices than dimensions.
        """
        leading, rows, columns = self._split_index(idx)
        return FactoredMatrix(
            picked(self.A[leading], rows, axis=-2), picked(self.B[leading], columns, axis=-1)
        )

    def unsqueeze(self, k: int) -> FactoredMatrix:
        """A new leading dimension at ``k``; negative ``k`` counts as for the product."""
        at = k if k >= 0 else k + self.ndim + 1
        if not 0 <= at <= self.ndim - 2:
            raise InputError(f"unsqueeze({k}) of {self!r}: only among the leading dimensions")
        return FactoredMatrix(self.A.unsqueeze(at), self.B.unsqueeze(at))

    def get_corner(self, k: int = 3) -> Float[Tensor, "... rows columns"]:
        """The first ``k`` along every axis of the product, which is not multiplied out for it."""
        leading = (slice(k),) * (self.ndim - 2)
        return self.A[(*leading, slice(k))] @ self.B[(*leading, slice(None), slice(k))]

    def svd(self) -> SVD:
        """(U, S, Vh) with ``AB = U @ diag(S) @ Vh.mT``; S falls. Half precision gives float32.

        The singular vectors of each factor reduce the problem to a core of the inner dimension.
        There are min(ldim, mdim, rdim) singular values. Kept for the next call, unless gradients
        flow through it.
        """
        wants_grad = torch.is_grad_enabled() and (self.A.requires_grad or self.B.requires_grad)
        if self._svd is not None and not wants_grad:
            return self._svd
        A, B = (widened(collapsed(factor)) for factor in self.pair)
        U_a, S_a, Vt_a = torch.linalg.svd(A, full_matrices=False)
        U_b, S_b, Vt_b = torch.linalg.svd(B, full_matrices=False)
        core = S_a.unsqueeze(-1) * (Vt_a @ U_b) * S_b.unsqueeze(-2)
        U, S, Vt = torch.linalg.svd(core, full_matrices=False)
        leading = self.shape[:-2]
        left, right = U_a @ U, Vt_b.mT @ Vt.mT
        result = SVD(
            left.expand(*leading, *left.shape[-2:]),
            S.expand(*leading, S.shape[-1]),
            right.expand(*leading, *right.shape[-2:]),
        )
        if not wants_grad and not torch.is_inference_mode_enabled():
            self._svd = result
        return result

    @property
    def U(self) -> Float[Tensor, "... ldim k"]:
        """Left singular vectors, as columns."""
        return self.svd().U

    @property
    def S(self) -> Float[Tensor, "... k"]:
        """Singular values, largest first."""
        return self.svd().S

    @property
    def Vh(self) -> Float[Tensor, "... rdim k"]:
        """Right singular vectors, as columns (not the transposed matrix its name suggests)."""
        return self.svd().Vh

    @property
    def eigenvalues(self) -> Complex[Tensor, "... k"]:
        """The min(ldim, mdim) eigenvalues of AB that need not be 0, in no particular order.

        Half precision gives float32's. Raises InputError when AB is not square.
        """
        self._check_square("eigenvalues")
        A, B = widened(self.A), widened(self.B)
        return torch.linalg.eigvals(B @ A if self.mdim <= self.ldim else A @ B)

    def norm(self) -> Float[Tensor, "..."]:
        """The Frobenius norm, one per leading index."""
        # |AB|^2 = <A'A, BB'>: two small matrices. Squaring halves the digits, hence the float64.
        A, B = (exact(collapsed(factor)) for factor in self.pair)
        squared = ((A.mT @ A) * (B @ B.mT)).sum((-2, -1)).clamp(min=0)
        return squared.sqrt().to(widened(self.A[..., :0, :0]).dtype).expand(self.shape[:-2])

    def make_even(self) -> FactoredMatrix:
        """The same matrix, its singular values split evenly over both factors."""
        U, S, Vh = self.svd()
        root = S.sqrt().unsqueeze(-2)
        return FactoredMatrix((U * root).to(self.A.dtype), (Vh * root).mT.to(self.B.dtype))

    def collapse_l(self) -> Float[Tensor, "... k rdim"]:
        """diag(S) @ Vh.mT: AB with its left singular vectors rotated away (same row geometry)."""
        _, S, Vh = self.svd()
        return S.unsqueeze(-1) * Vh.mT

    def collapse_r(self) -> Float[Tensor, "... ldim k"]:
        """U @ diag(S): AB with its right singular vectors rotated away (same column geometry)."""
        U, S, _ = self.svd()
        return U * S.unsqueeze(-2)

    def __repr__(self) -> str:
        return f"FactoredMatrix(shape={tuple(self.shape)}, mdim={self.mdim})"

    def _expanded(self, leading: torch.Size) -> FactoredMatrix:
        A, B = self.pair
        return FactoredMatrix(A.expand(*leading, *A.shape[-2:]), B.expand(*leading, *B.shape[-2:]))

    def _check_square(self, what: str) -> None:
        if self.ldim != self.rdim:
            raise InputError(f"{what} needs a square matrix, this is {self.ldim} x {self.rdim}")

    def _split_index(self, idx: Any) -> tuple[tuple, Any, Any]:
        """An index of the product as (leading, rows, columns), missing ones filled with ``:``."""
        items = list(idx) if isinstance(idx, tuple) else [idx]
        n_axes = sum(axes_indexed(item) for item in items)
        if n_axes > self.ndim:
            raise InputError(f"{n_axes} indices for {self!r}, which has {self.ndim} dimensions")
        gaps = [i for i, item in enumerate(items) if item is Ellipsis]
        if len(gaps) > 1:
            raise InputError("an index can contain one '...' only")
        at = gaps[0] if gaps else len(items)
        items[at : at + 1] = [slice(None)] * (self.ndim - n_axes)

        n_leading = self.ndim - 2
        leading: list[Any] = []
        matrix: list[Any] = []
        for item in items:
            inside = not matrix and (item is None or n_leading > 0)
            (leading if inside else matrix).append(item)
            n_leading -= axes_indexed(item) if inside else 0
        if len(matrix) != 2 or n_leading < 0 or any(item is None for item in matrix):
            raise InputError(
                f"{idx!r} does not index {self!r}: new and jointly masked dimensions can only be "
                "among the leading ones"
            )
        return tuple(leading), matrix[0], matrix[1]


def axes_indexed(item: Any) -> int:
    """How many dimensions of a tensor one item of an index uses up."""
    if item is None or item is Ellipsis:
        return 0
    if isinstance(item, Tensor) and item.dtype == torch.bool:
        return item.ndim
    return item.ndim if isinstance(item, np.ndarray) and item.dtype == bool else 1


def picked(matrix: Tensor, index: Any, axis: int) -> Tensor:
    """The rows (axis -2) or columns (axis -1) that ``index`` selects; an int selects one."""
    if isinstance(index, slice):
        where = (..., index, slice(None)) if axis == -2 else (..., index)
        return matrix[where]
    chosen = torch.as_tensor(index, device=matrix.device)
    if chosen.ndim > 1:
        raise InputError(f"rows and columns are picked by an int, slice or list, not {index!r}")
    if chosen.dtype == torch.bool:
        if chosen.shape != matrix.shape[axis : axis + 1 or None]:
            raise InputError(f"a mask of {matrix.shape[axis]} is needed, got {tuple(chosen.shape)}")
        return matrix.index_select(axis, chosen.nonzero().flatten())
    size, chosen = matrix.shape[axis], chosen.reshape(-1).long()
    if chosen.numel() and not -size <= int(chosen.min()) <= int(chosen.max()) < size:
        raise IndexError(f"index {index!r} is out of range for a dimension of size {size}")
    return matrix.index_select(axis, chosen % size)


def one_number(scalar: int | float | Tensor) -> int | float | Tensor:
    """A python number, or a tensor of one element without its dimensions."""
    if not isinstance(scalar, Tensor):
        return scalar
    if scalar.numel() != 1:
        raise InputError(
            f"a FactoredMatrix is scaled by a single number, not by a tensor of shape "
            f"{tuple(scalar.shape)}: multiply .A or .B, or .AB"
        )
    return scalar.reshape(())


def collapsed(factor: Tensor) -> Tensor:
    """``factor`` with every broadcast leading dimension at size 1, so nothing is done twice."""
    leading = zip(factor.shape[:-2], factor.stride()[:-2], strict=True)
    return factor[tuple(slice(0, 1) if not step and n else slice(None) for n, step in leading)]


def widened(factor: Tensor) -> Tensor:
    """``factor`` in float32 if it is in half precision, for which torch has no decompositions."""
    return factor.float() if factor.dtype in HALF else factor


def exact(factor: Tensor) -> Tensor:
    """``factor`` in float64 where the device has it."""
    return widened(factor) if factor.device.type == "mps" else factor.double()
