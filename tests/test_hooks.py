"""`HookPoint` by itself: what it lets through, what it refuses, what it remembers."""

from __future__ import annotations

import pytest
import torch

from hookedlm.errors import HookedLMError, HookReturnError, NoGradientError
from hookedlm.hooks import HookPoint, HookRequest, attached, compact


@pytest.fixture
def point() -> HookPoint:
    point = HookPoint("batch pos d_model")
    point.name = "blocks.3.hook_resid_pre"
    return point


@pytest.fixture
def x() -> torch.Tensor:
    return torch.arange(24.0).reshape(2, 3, 4)


def doubled(tensor, hook):
    return tensor * 2


def plus_one(tensor, hook):
    return tensor + 1


def observe(tensor, hook):
    return None


# The identity -------------------------------------------------------------------------------------


def test_a_silent_point_returns_the_very_tensor(point, x):
    assert point(x) is x
    assert point.forward(x) is x


def test_declared_axes_are_checked_against_the_vocabulary(point):
    assert point.axes == ("batch", "pos", "d_model")
    assert HookPoint().axes is None
    with pytest.raises(ValueError, match="batch"):
        HookPoint("batch possition d_model")


def test_repr_tells_axes_and_cost():
    assert repr(HookPoint("batch pos 1")) == "HookPoint(batch pos 1)"
    assert "on demand" in repr(HookPoint("batch pos 1", on_demand=True))
    assert "unknown" in repr(HookPoint())


def test_torch_hooks_are_refused_because_they_would_never_run(point):
    for register in (
        point.register_forward_hook,
        point.register_forward_pre_hook,
        point.register_full_backward_hook,
    ):
        with pytest.raises(TypeError, match="add_hook"):
            register(lambda *args: None)


def test_layer_reads_the_name(point):
    assert point.layer() == 3
    for name in ("hook_embed", "ln_final.hook_scale", None):
        point.name = name
        with pytest.raises(ValueError, match="no block"):
            point.layer()


# Forward hooks ------------------------------------------------------------------------------------


def test_a_hook_gets_the_tensor_and_its_point(point, x):
    seen = []
    point.add_hook(lambda tensor, hook: seen.append((tensor, hook)))
    assert point(x) is x
    assert seen[0][0] is x
    assert seen[0][1] is point


def test_a_returned_tensor_replaces(point, x):
    point.add_hook(doubled)
    assert torch.equal(point(x), 2 * x)


def test_an_in_place_edit_works(point, x):
    expected = x.clone()
    expected[:, 1] = 0

    def edit(tensor, hook):
        tensor[:, 1] = 0

    point.add_hook(edit)
    assert torch.equal(point(x), expected)


def test_hooks_run_in_order_and_each_sees_what_the_last_left(point, x):
    point.add_hook(doubled)
    point.add_hook(observe)
    point.add_hook(plus_one)
    assert torch.equal(point(x), 2 * x + 1)


def test_prepend_puts_a_hook_first(point, x):
    point.add_hook(doubled)
    point.add_hook(plus_one, prepend=True)
    assert torch.equal(point(x), 2 * (x + 1))


@pytest.mark.parametrize("shares", [True, False])
def test_a_shared_tensor_is_copied_for_editors_only(x, shares):
    """Where the tensor is also another point's, an in-place edit must not reach that one."""
    point, seen = HookPoint("batch pos d_model", shares=shares), []
    point.add_hook(lambda tensor, hook: seen.append(tensor), observes=True)
    assert point(x) is x
    assert seen.pop() is x
    point.add_hook(lambda tensor, hook: tensor.zero_())
    before = x.clone()
    assert not point(x).any()
    assert torch.equal(x, before) is shares


@pytest.mark.parametrize(
    "wrong, named",
    [
        (3.0, "float"),
        ([1, 2], "list"),
        ((torch.zeros(2, 3, 4),), "tuple"),
        (torch.zeros(2, 3, 1), r"shape \(2, 3, 1\)"),
        (torch.zeros(3, 4), r"shape \(3, 4\)"),
        (torch.zeros(2, 3, 4, dtype=torch.float64), "float64"),
        (torch.zeros(2, 3, 4, dtype=torch.long), "int64"),
        (torch.zeros(2, 3, 4, device="meta"), "meta"),
    ],
)
def test_a_replacement_that_cannot_stand_in_is_refused(point, x, wrong, named):
    point.add_hook(lambda tensor, hook: wrong)
    with pytest.raises(HookReturnError, match=named) as raised:
        point(x)
    assert "blocks.3.hook_resid_pre" in str(raised.value)
    assert isinstance(raised.value, ValueError)
    assert isinstance(raised.value, HookedLMError)
    if isinstance(wrong, torch.Tensor):
        assert "batch pos d_model" in str(raised.value)


def test_bad_arguments_of_add_and_remove(point):
    with pytest.raises(TypeError, match="callable"):
        point.add_hook("fn")
    with pytest.raises(ValueError, match="sideways"):
        point.add_hook(observe, dir="sideways")
    with pytest.raises(ValueError, match="sideways"):
        point.remove_hooks("sideways")
    assert not point.wanted


# Taking hooks out ---------------------------------------------------------------------------------


def test_a_handle_removes_its_own_hook_and_twice_is_harmless(point, x):
    first, second = point.add_hook(doubled), point.add_hook(doubled)
    first.remove()
    assert torch.equal(point(x), 2 * x)
    first.remove()
    assert torch.equal(point(x), 2 * x)
    second.remove()
    assert point(x) is x
    assert not point.wanted


def test_permanent_hooks_stay_until_told(point):
    point.add_perma_hook(doubled)
    point.add_hook(plus_one)
    point.remove_hooks("fwd")
    assert [handle.fn for handle in point.fwd_hooks] == [doubled]
    assert point.fwd_hooks[0].is_permanent
    point.remove_hooks("both", including_permanent=True)
    assert not point.fwd_hooks
    assert not point.wanted


def test_levels_select_what_is_removed(point):
    point.add_hook(doubled, level=1)
    point.add_hook(plus_one, level=2)
    point.add_perma_hook(observe)
    point.remove_hooks("fwd", including_permanent=True, level=2)
    assert [handle.fn for handle in point.fwd_hooks] == [doubled, observe]


def test_directions_are_removed_apart(point):
    point.add_hook(observe, "both")
    assert (len(point.fwd_hooks), len(point.bwd_hooks)) == (1, 1)
    point.remove_hooks("fwd")
    assert (len(point.fwd_hooks), len(point.bwd_hooks)) == (0, 1)
    assert point.wanted
    point.remove_hooks("bwd")
    assert not point.wanted


def test_attached_removes_exactly_its_own_whatever_happens(point):
    mine = point.add_hook(doubled)
    for stop in (ValueError, KeyboardInterrupt, SystemExit):
        with pytest.raises(stop), attached([HookRequest(point, observe)]) as handles:  # noqa: PT012
            assert point.fwd_hooks == [mine, *handles]
            raise stop
        assert point.fwd_hooks == [mine]


def test_attached_takes_the_first_out_when_the_second_cannot_go_in(point):
    requests = [HookRequest(point, observe), HookRequest(point, None)]
    with pytest.raises(TypeError), attached(requests):
        pytest.fail("the body must not run")
    assert not point.wanted


def test_a_hook_may_remove_itself_while_running(point, x):
    handles = []

    def once(tensor, hook):
        handles[0].remove()
        return tensor * 2

    handles.append(point.add_hook(once))
    point.add_hook(plus_one)
    assert torch.equal(point(x), 2 * x + 1)
    assert torch.equal(point(x), x + 1)


# Memory of a point --------------------------------------------------------------------------------


def test_ctx_persists_until_cleared(point, x):
    def count(tensor, hook):
        hook.ctx["calls"] = hook.ctx.get("calls", 0) + 1

    point.add_hook(count)
    point(x), point(x)
    assert point.ctx == {"calls": 2}
    point.clear_context()
    assert point.ctx == {}
    assert point.fwd_hooks


# Backward hooks -----------------------------------------------------------------------------------


def leaf() -> torch.Tensor:
    return torch.tensor([1.0, -2.0, 3.0], requires_grad=True)


def test_a_backward_hook_sees_the_gradient(point):
    x, seen = leaf(), []
    point.add_hook(lambda grad, hook: seen.append((grad.clone(), hook)), "bwd")
    (point(x) ** 3).sum().backward()
    assert torch.allclose(seen[0][0], 3 * x.detach() ** 2)
    assert seen[0][1] is point
    assert torch.allclose(x.grad, 3 * x.detach() ** 2)


@pytest.mark.parametrize("wrap", [lambda g: g, lambda g: (g,)], ids=["tensor", "one-tuple"])
def test_a_returned_gradient_replaces(point, wrap):
    x = leaf()
    point.add_hook(lambda grad, hook: wrap(grad * 10), "bwd")
    point.add_hook(lambda grad, hook: wrap(grad + 1), "bwd")
    (point(x) ** 2).sum().backward()
    assert torch.allclose(x.grad, 20 * x.detach() + 1)


@pytest.mark.parametrize("wrong", [3.0, torch.zeros(2), (torch.zeros(3), torch.zeros(3))])
def test_a_gradient_that_cannot_stand_in_is_refused(point, wrong):
    point.add_hook(lambda grad, hook: wrong, "bwd")
    with pytest.raises(HookReturnError, match="hook_resid_pre"):
        point(leaf()).sum().backward()


def test_neighbouring_points_each_see_the_gradient_of_their_own_place():
    """Two points on one tensor: the later one's replacement is what the earlier one sees."""
    first, second = HookPoint(), HookPoint()
    seen = {}

    def at_second(grad, hook):
        seen["second"] = grad.clone()
        return grad * 5

    first.add_hook(lambda grad, hook: seen.update(first=grad.clone()), "bwd")
    second.add_hook(at_second, "bwd")
    x = leaf()
    second(first(x)).sum().backward()
    assert torch.equal(seen["second"], torch.ones(3))
    assert torch.equal(seen["first"], torch.full((3,), 5.0))
    assert torch.equal(x.grad, torch.full((3,), 5.0))


def test_both_directions_with_one_function(point):
    calls = []
    point.add_hook(lambda tensor, hook: calls.append(tensor.detach().clone()), "both")
    x = leaf()
    (2 * point(x)).sum().backward()
    assert torch.equal(calls[0], x.detach())
    assert torch.equal(calls[1], torch.full((3,), 2.0))


def test_gradients_flow_through_forward_hooks(point):
    x = leaf()
    point.add_hook(lambda tensor, hook: tensor * torch.tensor([0.0, 1.0, 4.0]))
    point(x).sum().backward()
    assert torch.equal(x.grad, torch.tensor([0.0, 1.0, 4.0]))


def test_a_backward_hook_where_no_gradient_flows_is_an_error(point):
    point.add_hook(observe, "bwd")
    with pytest.raises(NoGradientError, match="no_grad"):
        point(torch.ones(3))
    with torch.no_grad(), pytest.raises(NoGradientError):
        point(leaf())


def test_a_recorder_of_gradients_may_meet_a_tensor_without_one(point):
    handle = point.add_hook(observe, "bwd", observes=True)
    x = torch.ones(3)
    assert point(x) is x
    assert handle.fired == 0


# Storage ------------------------------------------------------------------------------------------


def test_compact_copies_only_what_would_keep_much_more_alive():
    big = torch.arange(1000.0)
    few = compact(big[:3])
    assert torch.equal(few, big[:3])
    assert few.untyped_storage().nbytes() == 12
    assert compact(big) is big
    most = big[:900]
    assert compact(most) is most
