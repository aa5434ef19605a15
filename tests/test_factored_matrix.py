"""FactoredMatrix against the same operations on the dense product."""

import gc
import weakref

import numpy as np
import pytest
import torch

from hookedlm.errors import InputError
from hookedlm.factored_matrix import FactoredMatrix, collapsed

close = torch.testing.assert_close


def rand(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


SHAPES = [
    ((7, 3), (3, 5)),
    ((4, 6), (6, 3)),
    ((3, 5), (5, 8)),
    ((2, 7, 3), (2, 3, 5)),
    ((2, 1, 7, 3), (4, 3, 5)),
    ((7, 3), (2, 3, 5)),
]


@pytest.fixture(params=SHAPES, ids=str)
def f(request):
    a, b = request.param
    return FactoredMatrix(rand(*a), rand(*b, seed=1))


@pytest.fixture
def square():
    return FactoredMatrix(rand(2, 6, 3), rand(2, 3, 6, seed=1))


def test_shapes_and_the_product(f):
    dense = f.A @ f.B
    assert f.shape == dense.shape
    assert f.ndim == dense.ndim
    assert f.has_leading_dims == (dense.ndim > 2)
    assert (f.ldim, f.mdim, f.rdim) == (dense.shape[-2], f.A.shape[-1], dense.shape[-1])
    assert f.A.shape[:-2] == f.B.shape[:-2] == dense.shape[:-2]
    assert f.pair == (f.A, f.B)
    assert torch.equal(f.AB, dense)
    close(f.T.AB, dense.mT)
    assert repr(f) == f"FactoredMatrix(shape={tuple(dense.shape)}, mdim={f.mdim})"


def test_products_with_vectors_and_matrices(f):
    dense = f.AB
    left, right = rand(f.ldim), rand(f.rdim)
    close(f @ right, dense @ right)
    close(left @ f, left @ dense)
    for width in (1, 4, 9):
        matrix = rand(f.rdim, width)
        assert isinstance(f @ matrix, FactoredMatrix)
        close((f @ matrix).AB, dense @ matrix)
        matrix = rand(width, f.ldim)
        assert isinstance(matrix @ f, FactoredMatrix)
        close((matrix @ f).AB, matrix @ dense)
    close((f @ f.T).AB, dense @ dense.mT)
    close((f.T @ f).AB, dense.mT @ dense)
    batched = rand(5, *(1,) * (f.ndim - 2), f.rdim, 2)
    close((f @ batched).AB, dense @ batched)


def test_the_inner_dimension_never_grows_beyond_the_factors():
    f = FactoredMatrix(rand(9, 2), rand(2, 9))
    assert (f @ rand(9, 7)).mdim == (rand(7, 9) @ f).mdim == (f @ f).mdim == 2
    wide = FactoredMatrix(rand(3, 8), rand(8, 3))
    assert (wide @ rand(3, 7)).mdim == (rand(7, 3) @ wide).mdim == 3


@pytest.mark.parametrize(
    "scalar", [2, -0.5, torch.tensor(3.0), torch.tensor([[[2.0]]]), np.float64(0.25)]
)
def test_arithmetic_with_one_number(f, scalar):
    dense, number = f.AB, float(scalar)
    close((f * scalar).AB, dense * number)
    close((scalar * f).AB, number * dense)
    close((f / scalar).AB, dense / number)
    close((-f).AB, -dense)
    assert (f * scalar).shape == f.shape


def test_sums_stay_factored():
    f, g = FactoredMatrix(rand(2, 7, 3), rand(3, 5)), FactoredMatrix(rand(7, 2), rand(2, 5))
    assert (f + g).mdim == 5
    close((f + g).AB, f.AB + g.AB)
    close((f - g).AB, f.AB - g.AB)
    with pytest.raises(InputError, match="different shapes"):
        f + g.T
    with pytest.raises(TypeError):
        f + f.AB


def test_svd_is_that_of_the_product(f):
    U, S, Vh = f.svd()
    k = min(f.ldim, f.mdim, f.rdim)
    assert U.shape == (*f.shape[:-1], k)
    assert Vh.shape == (*f.shape[:-2], f.rdim, k)
    close(S, torch.linalg.svdvals(f.AB)[..., :k])
    close(U @ torch.diag_embed(S) @ Vh.mT, f.AB)
    identity = torch.eye(k, dtype=torch.float64).expand(*f.shape[:-2], k, k)
    close(U.mT @ U, identity)
    close(Vh.mT @ Vh, identity)
    assert torch.equal(f.U, U)
    assert torch.equal(f.S, S)
    assert torch.equal(f.Vh, Vh)
    close(f.collapse_l(), S.unsqueeze(-1) * Vh.mT)
    close(U @ f.collapse_l(), f.AB)
    close(f.collapse_r() @ Vh.mT, f.AB)


def test_svd_knows_its_own_rank_from_the_dense_one():
    A = rand(6, 3)
    A[:, 2] = A[:, 0] + A[:, 1]
    S = FactoredMatrix(A, rand(3, 6)).S
    assert S.shape == (3,)
    assert S[2] < 1e-12 < S[1]


def test_norm_is_frobenius(f):
    close(f.norm(), torch.linalg.matrix_norm(f.AB))
    f32 = FactoredMatrix(f.A.float(), f.B.float())
    assert f32.norm().dtype == torch.float32
    close(f32.norm(), torch.linalg.matrix_norm(f.AB).float(), rtol=1e-5, atol=0)


def test_broadcast_factors_are_decomposed_once():
    f = FactoredMatrix(rand(7, 3), rand(2, 1, 3, 5).expand(2, 4, 3, 5))
    assert f.A.shape == (2, 4, 7, 3)
    assert collapsed(f.A).shape == (1, 1, 7, 3)
    assert collapsed(f.B).shape == (2, 1, 3, 5)
    close(f.norm(), torch.linalg.matrix_norm(f.AB))
    close(f.S, torch.linalg.svdvals(f.AB)[..., :3])


def test_norm_of_factors_that_nearly_cancel():
    # |A| and |B| are about 1000 times |AB|: squared in float32, nothing would be left.
    basis = torch.linalg.qr(rand(8, 8)).Q
    A = basis[:4].clone()
    B = basis[4:].mT + 1e-3 * basis[:4].mT
    f = FactoredMatrix(A.float(), B.float())
    truth = torch.linalg.matrix_norm(f.A.double() @ f.B.double())
    close(f.norm().double(), truth, rtol=1e-5, atol=0)


def test_eigenvalues_are_those_of_the_product(square):
    for f in (square, FactoredMatrix(rand(2, 3, 5), rand(2, 5, 3, seed=1))):
        found = f.eigenvalues
        assert found.shape == (2, min(f.ldim, f.mdim))
        assert found.is_complex()
        dense = torch.linalg.eigvals(f.AB)
        for mine, truth in zip(found, dense, strict=True):
            for value in mine:  # each is one of the product's, and the sums agree (the trace)
                assert (truth - value).abs().min() < 1e-9
        close(found.sum(-1).real, f.AB.diagonal(dim1=-2, dim2=-1).sum(-1))
    close(square.BA, square.B @ square.A)


def test_what_needs_a_square_matrix_says_so():
    f = FactoredMatrix(rand(4, 2), rand(2, 5))
    for name in ("BA", "eigenvalues"):
        with pytest.raises(InputError, match=f"{name} needs a square matrix, this is 4 x 5"):
            getattr(f, name)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_factors(dtype):
    f = FactoredMatrix(rand(6, 3, dtype=dtype), rand(3, 6, dtype=dtype))
    dense = f.A.float() @ f.B.float()
    assert f.S.dtype == f.norm().dtype == torch.float32
    close(f.S, torch.linalg.svdvals(dense)[:3], rtol=1e-4, atol=1e-4)
    close(f.norm(), dense.norm(), rtol=1e-4, atol=0)
    assert f.eigenvalues.dtype == torch.complex64
    assert f.make_even().A.dtype == dtype


def test_make_even_splits_the_singular_values(f):
    even = f.make_even()
    close(even.AB, f.AB)
    close(even.A.mT @ even.A, torch.diag_embed(even.S))
    close(even.B @ even.B.mT, torch.diag_embed(even.S))


def test_svd_is_not_stale_and_not_detached():
    A, B = rand(5, 2).requires_grad_(), rand(2, 4)
    f = FactoredMatrix(A, B)
    for _ in range(2):
        with torch.no_grad():
            assert not f.S.requires_grad
        assert f.S.requires_grad
    for _ in range(2):  # a kept result would have lost its graph
        A.grad = None
        f.S.square().sum().backward()
        close(A.grad, 2 * A.detach() @ B @ B.mT)  # the sum is |AB|^2
    A.grad = None
    f.norm().square().backward()
    close(A.grad, 2 * A.detach() @ B @ B.mT)


INDICES = [
    0,
    -1,
    slice(1, 3),
    [0, 2],
    (1, 2),
    (slice(None), 1),
    (..., 0),
    (..., slice(1, 3), slice(None)),
    (0, ..., slice(2)),
    (None, 0),
    (0, None),
    (torch.tensor([1, 0]), torch.tensor([2, 0])),
    torch.tensor([[0, 1], [2, 1]]),
    torch.tensor([True, False, True]),
    (torch.ones(3, 4, dtype=torch.bool), slice(2)),
]


@pytest.mark.parametrize("index", INDICES, ids=repr)
def test_leading_indices_are_those_of_the_product(index):
    f = FactoredMatrix(rand(3, 4, 6, 2), rand(3, 4, 2, 5))
    dense = f.AB[index]
    if index == (..., 0):  # the last axis keeps size 1
        dense = dense.unsqueeze(-1)
    assert isinstance(f[index], FactoredMatrix)
    close(f[index].AB, dense)


def test_rows_and_columns_keep_their_axes():
    f = FactoredMatrix(rand(3, 6, 2), rand(3, 2, 5))
    dense = f.AB
    close(f[:, 1].AB, dense[:, 1:2])
    close(f[0, 1, 2].AB, dense[0, 1:2, 2:3])
    close(f[1, -1].AB, dense[1, -1:])
    close(f[[0, 2], [1, 3]].AB, dense[[0, 2]][:, [1, 3]])
    close(f[..., [4, 0], torch.tensor([0, 0, -1])].AB, dense[:, [4, 0]][:, :, [0, 0, -1]])
    mask = torch.tensor([True, False, False, True, True])
    close(f[..., mask].AB, dense[..., mask])
    flat = FactoredMatrix(rand(6, 2), rand(2, 5))
    assert flat[3].shape == (1, 5)
    assert flat[np.int64(3), 2:].shape == (1, 3)
    assert len(list(flat)) == 6


@pytest.mark.parametrize("index", [(0, 0, 0, 0), (0, 0, None), (..., ...), (0, [[1]])])
def test_wrong_indices_are_refused_in_words(index):
    with pytest.raises(InputError):
        FactoredMatrix(rand(3, 6, 2), rand(3, 2, 5))[index]


def test_indices_out_of_range_raise_index_errors():
    f = FactoredMatrix(rand(3, 6, 2), rand(3, 2, 5))
    for index in [3, (0, 6), (0, 0, -6), (0, 0, [1, 5])]:
        with pytest.raises(IndexError):
            f[index]


def test_unsqueeze_and_corner():
    f = FactoredMatrix(rand(3, 4, 6, 2), rand(3, 4, 2, 5))
    for k in (0, 1, 2, -3, -5):
        close(f.unsqueeze(k).AB, f.AB.unsqueeze(k))
    for k in (3, -1, -2, 7):
        with pytest.raises(InputError, match="leading"):
            f.unsqueeze(k)
    close(f.get_corner(), f.AB[:3, :3, :3, :3])
    close(f.get_corner(2), f.AB[:2, :2, :2, :2])


def test_factors_that_do_not_fit_are_refused_in_words():
    with pytest.raises(InputError, match="same mdim"):
        FactoredMatrix(rand(3, 2), rand(3, 2))
    with pytest.raises(InputError, match="same mdim"):
        FactoredMatrix(rand(3), rand(3, 2))
    with pytest.raises(InputError, match="broadcast"):
        FactoredMatrix(rand(2, 3, 2), rand(3, 2, 3))
    f = FactoredMatrix(rand(3, 2), rand(2, 4))
    with pytest.raises(InputError, match="can't multiply"):
        f @ rand(3)
    with pytest.raises(InputError, match="can't multiply"):
        rand(4, 4) @ f
    with pytest.raises(InputError, match="single number"):
        f * torch.ones(2)
    with pytest.raises(TypeError):
        f @ 3


def test_nothing_keeps_a_matrix_alive():
    """Singular values are kept with the matrix, not in a table of matrices."""
    f = FactoredMatrix(torch.randn(3, 5, 2), torch.randn(3, 2, 4))
    first = f.svd()
    assert f.svd() is first
    gone = weakref.ref(f)
    del f
    gc.collect()
    assert gone() is None
