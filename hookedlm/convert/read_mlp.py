"""Read MLPs and mixtures of experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers.activations import ACT2FN, FastGELUActivation, NewGELUActivation

from hookedlm.convert import hf
from hookedlm.convert.expert_neurons import ACT, HFNeurons, neurons_of
from hookedlm.convert.experts import HFRouting, ScaledInputExperts, matrix_name
from hookedlm.convert.hf import ConfigReads, Coverage, MissingPartError
from hookedlm.convert.placed import hooks_of, is_away
from hookedlm.convert.read_norm import NormReading, read_norm
from hookedlm.families.row import Row
from hookedlm.layers.activations import GeluTanh, ScaledInput, Swish
from hookedlm.layers.linears import MLPLinears
from hookedlm.layers.mlp import MLPTensors
from hookedlm.spec import MLPSpec, MoESpec


@dataclass
class MLPReading:
    """One dense MLP."""

    spec: MLPSpec
    tensors: MLPTensors
    act: Any
    norm: NormReading | None = None


@dataclass
class MoEReading:
    """One mixture of experts: Hugging Face's router and experts, and those that all tokens pass."""

    spec: MoESpec
    router: nn.Module
    experts: nn.Module
    routing: HFRouting
    neurons: HFNeurons | None = None
    shared: MLPReading | None = None
    shared_gate: nn.Module | None = None
    router_bias: Tensor | None = None


LONGHAND_GELU = (NewGELUActivation, FastGELUActivation)


def read_mlp(block: nn.Module, row: Row, config: ConfigReads, seen: Coverage) -> MLPReading:
    """A dense MLP, gate and linear branch cut apart where they are stored as one."""
    act = _activation(block, row, config)
    down = hf.find(block, row.down)
    gate, up = hf.find(block, row.gate), hf.find(block, row.up)
    both = hf.find(block, row.gate_up)
    if act is None or down is None or (up is None and both is None):
        raise MissingPartError(f"no MLP at {row.up!r}, {row.down!r} with activation {row.act!r}")
    b_gate = W_gate = None
    if both is not None:
        seen.take(both.weight, hf.bias_of(both))
        W_gate, W_up = hf.flat_weight(both).chunk(2)
        b_both = hf.bias_of(both)
        b_gate, b_up = (None, None) if b_both is None else b_both.chunk(2)
    else:
        seen.take(up.weight, hf.bias_of(up))
        W_up, b_up = hf.flat_weight(up), hf.bias_of(up)
        if gate is not None:
            seen.take(gate.weight, hf.bias_of(gate))
            W_gate, b_gate = hf.flat_weight(gate), hf.bias_of(gate)
        elif row.gate is not None:
            raise MissingPartError(f"no gate at {row.gate!r}")
    seen.take(down.weight, hf.bias_of(down))
    if isinstance(act, nn.Module):
        seen.take_module(act)
    inner = hf.find(block, row.mlp_norm)
    norm = None if inner is None else read_norm(inner, row, config, seen)
    tensors = MLPTensors(
        W_in=W_up.t(),
        W_out=hf.flat_weight(down).t(),
        b_in=b_up,
        b_out=hf.bias_of(down),
        W_gate=None if W_gate is None else W_gate.t(),
        b_gate=b_gate,
    )
    name = type(act).__name__ if isinstance(act, nn.Module) else act.__name__
    act = GeluTanh(act) if isinstance(act, LONGHAND_GELU) else act
    limit = hf.resolved(row.gated_limit, block, config)
    spec = MLPSpec(
        d_mlp=W_up.shape[0],
        gated=W_gate is not None,
        act=name,
        act_norm=None if norm is None else norm.spec,
        limit=None if limit is None else float(limit),
    )
    return MLPReading(spec, tensors, act, norm)


def read_linears(block: nn.Module, row: Row, config: ConfigReads) -> MLPLinears | None:
    """The parts of an MLP that hold no plain matrix, to be called as they are; None if some is
    missing, or if nothing stands in the way of its weights."""
    act, module = _activation(block, row, config), hf.find(block, row.mlp)
    names = {name: getattr(row, name) for name in ("up", "gate", "down")}
    found: dict[str, Any] = {name: hf.find(block, place) for name, place in names.items()}
    found["both"] = hf.find(block, row.gate_up)
    maps = [part for part in found.values() if isinstance(part, nn.Module)]
    lacks = row.gate is not None and found["gate"] is None
    lacks = lacks or act is None or found["down"] is None or found["up"] is found["both"]
    if lacks or hf.resolved(row.gated_limit, block, config) is not None:
        return None
    if all(map(hf.is_plain_linear, maps)) or not set(maps) <= set(module.modules()):
        return None
    if any(vars(hook).get("place_submodules") for hook in hooks_of(module)):
        return None  # their weights come when the whole is called
    return MLPLinears(act=act, norm=hf.find(block, row.mlp_norm), **found)


def _activation(block: nn.Module, row: Row, config: ConfigReads) -> Any:
    beta = hf.resolved(row.swish_beta, block, config)
    if beta is not None:
        return Swish(float(beta))
    act = ACT2FN[row.act_name] if row.act_name is not None else hf.find(block, row.act)
    factor = hf.resolved(row.act_in_scale, block, config)
    return act if act is None or factor in (None, 1.0) else ScaledInput(act, float(factor))


def read_moe(block: nn.Module, row: Row, config: ConfigReads, seen: Coverage) -> MoEReading:
    """A mixture whose router and experts follow transformers' common signature."""
    router, experts = hf.find(block, row.router), hf.find(block, row.experts)
    if router is None or experts is None:
        raise MissingPartError(f"no router at {row.router!r} or experts at {row.experts!r}")
    if is_away(router):  # its rule on edited logits needs them at any time
        raise MissingPartError(f"{type(router).__name__}'s weights are fetched as it runs")
    bias = hf.find(block, row.router_bias)
    seen.take_module(router)
    seen.take_module(experts)
    seen.take(bias)
    n_experts, d_model = router.get_parameter(matrix_name(router)).shape
    top_k = hf.find(router, "top_k") or hf.find(block, row.top_k)
    if top_k is None:
        raise MissingPartError(f"no top_k in {type(router).__name__} or at {row.top_k!r}")
    shared, gate = _shared(block, row, config, seen)
    divisor = hf.resolved(row.shared_divisor, block, config)
    act = hf.find(experts, ACT)
    spec = MoESpec(
        n_experts=int(n_experts),
        top_k=int(top_k),
        d_model=int(d_model),
        d_mlp=_width(experts, int(d_model)),
        act=type(act).__name__ if isinstance(act, nn.Module) else str(getattr(act, "__name__", "")),
        scale=float(hf.resolved(row.routed_scale, block, config) or 1.0),
        divisor=1.0 if shared is None else float(divisor or 1.0),
        d_shared=None if shared is None else shared.spec.d_mlp,
        weighted_input=row.weighted_input,
    )
    neurons = neurons_of(experts, row, int(n_experts))
    if row.weighted_input:
        experts = ScaledInputExperts(experts, int(n_experts))
    scores = int(top_k) if row.router_scores else None
    routing = HFRouting(router, row.router_batched, hf.find(block, row.picks), scores)
    return MoEReading(spec, router, experts, routing, neurons, shared, gate, bias)


def _width(experts: nn.Module, d_model: int) -> int:
    """How many neurons an expert has."""
    told = hf.find(experts, ("intermediate_dim", "ffn_hidden_size", "intermediate_size"))
    if isinstance(told, int):
        return told
    down = next(p for name, p in experts.named_parameters() if "down" in name and p.ndim == 3)
    return next((n for n in down.shape[1:] if n != d_model), d_model)


def _shared(
    block: nn.Module, row: Row, config: ConfigReads, seen: Coverage
) -> tuple[MLPReading | None, nn.Module | None]:
    """The experts that every token passes: one MLP, with the names of the family's dense ones."""
    if not isinstance(hf.find(block, row.shared), nn.Module):
        return None, None
    place = next(
        p
        for p in ((row.shared,) if isinstance(row.shared, str) else row.shared or ())
        if hf.find(block, p) is not None
    )
    parts = {name: getattr(row, name) for name in ("gate", "up", "gate_up", "down", "act")}
    moved = {
        name: f"{place}.{part.rpartition('.')[2]}"
        for name, part in parts.items()
        if isinstance(part, str)
    }
    gate = hf.find(block, row.shared_gate)
    seen.take_module(gate)
    reading = read_mlp(block, row.but(**moved), config, seen)
    return (reading, gate) if reading.spec.d_mlp else (None, None)
