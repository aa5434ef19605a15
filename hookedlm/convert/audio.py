"""Speech encoders: Hugging Face's modules become uniform layers on their own tensors, around the
convolutions, which stay as they are."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from hookedlm.convert import hf
from hookedlm.convert.encoder import uniform_block
from hookedlm.convert.hf import ConfigReads, Coverage, MissingPartError
from hookedlm.convert.read_norm import read_norm
from hookedlm.errors import ConversionError
from hookedlm.families.hubert import AUDIO_ENCODERS, AudioRow
from hookedlm.layers.audio import AudioEmbed, AudioFrontEnd
from hookedlm.layers.bert import BertBlock
from hookedlm.layers.block import SequentialBlock
from hookedlm.layers.embed import Unembed
from hookedlm.layers.norm import Norm


class FrameCounter:
    """How samples become frames, by Hugging Face's own arithmetic.

    ``receptive_field`` samples make one frame, each further ``hop`` one more.
    """

    def __init__(self, shell: Any):
        self.shell = shell
        config = shell.config
        self.hop = math.prod(config.conv_stride)
        field = 1
        for kernel, stride in zip(
            reversed(config.conv_kernel), reversed(config.conv_stride), strict=True
        ):
            field = (field - 1) * stride + kernel
        self.receptive_field = field

    def real_frames(
        self, n_frames: int, real: Int[Tensor, "batch sample"]
    ) -> Bool[Tensor, "batch pos"]:
        """Which of ``n_frames`` frames belong to samples that ``real`` marks with 1."""
        return self.shell._get_feature_vector_attention_mask(n_frames, real)


@dataclass
class AudioLayers:
    """Everything a `HookedAudioEncoder` is made of; parts that the model lacks are None."""

    config: Any
    counter: FrameCounter
    front_end: AudioFrontEnd
    embed: AudioEmbed
    blocks: list[BertBlock | SequentialBlock]
    ln_final: Norm | None
    unembed: Unembed | None


def convert_audio(model: Any) -> AudioLayers:
    """The layers of a speech encoder, on Hugging Face's tensors; its modules are left as they are.

    Raises ConversionError on a type that is no known speech encoder and on parameters nobody
    accounts for.
    """
    kind = model.config.model_type
    row = AUDIO_ENCODERS.get(kind)
    if row is None:
        raise ConversionError(
            f"{kind!r} is no speech encoder this library knows ({', '.join(AUDIO_ENCODERS)})"
        )
    ours = hf.skeleton(model)
    base, seen = ours.base_model, Coverage(ours)
    try:
        layers = _layers(ours, base, row, seen)
    except (MissingPartError, RuntimeError, AttributeError) as error:
        raise ConversionError(f"this {kind} is not built as expected: {error}") from error
    if left := seen.left():
        hint = "Adapters are not built" if seen.left(base) else "Give hf_model=model.base_model"
        raise ConversionError(f"parameters nobody accounts for: {', '.join(left[:4])}. {hint}.")
    return layers


def _layers(ours: Any, base: Any, row: AudioRow, seen: Coverage) -> AudioLayers:
    config = ConfigReads(ours.config)
    reading = read_norm(hf.at(base, row.norm), row.block, config, seen)
    norm = Norm(reading.spec, reading.w, reading.b)
    pre_norm = bool(config(row.pre_norm))
    opaque = [hf.at(base, place) for place in (row.features, row.projection, row.positions)]
    for module in opaque:
        seen.take_module(module)
    features, projection, positions = opaque
    blocks = [_block(block, row, config, seen) for block in hf.at(base, row.block.blocks)]
    head = hf.find(ours, row.head)
    unembed = None
    if head is not None:
        seen.take(head.weight, head.bias)
        unembed = Unembed(hf.flat_weight(head).t(), head.bias)
    seen.take(hf.find(base, row.training))
    # The mask must be one that fused attention takes, whatever kernel Hugging Face was to use.
    mask_config = copy.deepcopy(ours.config)
    mask_config._attn_implementation = "sdpa"
    return AudioLayers(
        mask_config,
        FrameCounter(_shell(base)),
        AudioFrontEnd(features, projection),
        AudioEmbed(positions, None if pre_norm else norm),
        blocks,
        norm if pre_norm else None,
        unembed,
    )


def _block(
    block: nn.Module, row: AudioRow, config: ConfigReads, seen: Coverage
) -> BertBlock | SequentialBlock:
    spec, parts = uniform_block(block, row.block, config, seen)
    return (BertBlock if spec.layout == "post_norm" else SequentialBlock)(spec, parts)


def _shell(base: Any) -> Any:
    """A base model without modules and parameters: its methods are all that is needed of it."""
    shell = copy.copy(base)
    vars(shell).update(_modules={}, _parameters={}, _buffers={})
    return shell


@torch.no_grad()
def truth_of(model: Any, inputs: dict[str, Tensor]) -> dict[str, Float[Tensor, "batch pos out"]]:
    """What Hugging Face's model says on ``inputs``, in evaluation mode: stream, and logits if any.

    The module itself keeps its mode.
    """
    twin = hf.skeleton(model).eval()
    stream = twin.base_model(**inputs).last_hidden_state
    head = hf.find(twin, AUDIO_ENCODERS[model.config.model_type].head)
    return {"stream": stream} | ({} if head is None else {"logits": head(stream)})
