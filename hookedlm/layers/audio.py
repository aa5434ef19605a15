"""What turns sound into a stream: Hugging Face's convolutions, with hook points between them
(arXiv 2006.11477, 2106.07447).

::

    samples ─ convolutions ─ features ─ projection ─▶ frames
    frames ─┬─ embed ─────────────────────▶ + ─ ln ─▶ full_embed
            └─ convolution ─ pos_embed ─────┘
"""

from __future__ import annotations

from typing import Any

from jaxtyping import Bool, Float
from torch import Tensor, nn

from hookedlm.axes import FEATURES, STREAM
from hookedlm.hooks import HookPoint
from hookedlm.layers.norm import Norm, Same
from hookedlm.layers.opaque import first

Stream = Float[Tensor, "batch pos d_model"]


class AudioFrontEnd(nn.Module):
    """From samples to frames, as Hugging Face wrote it.

    It stays in evaluation mode: its dropout is off and its running statistics are left alone.
    """

    def __init__(self, feature_extractor: nn.Module, feature_projection: nn.Module):
        super().__init__()
        self.feature_extractor = feature_extractor
        self.hook_features = HookPoint(FEATURES)
        self.feature_projection = feature_projection
        self.eval()

    def forward(self, samples: Float[Tensor, "batch sample"]) -> Stream:
        features = self.hook_features(self.feature_extractor(samples).transpose(1, 2))
        return first(self.feature_projection(features))

    def train(self, mode: bool = True) -> Any:
        """Evaluation mode, whatever is asked."""
        return super().train(False)


class AudioEmbed(nn.Module):
    """Frames and what a convolution over them says about their positions, summed (and normed where
    the stream is normed behind each addition). It stays in evaluation mode, too."""

    def __init__(self, pos_conv: nn.Module, ln: Norm | None):
        super().__init__()
        self.hook_embed = HookPoint(STREAM, shares=True)
        self.pos_conv = pos_conv
        self.hook_pos_embed = HookPoint(STREAM)
        self.ln: nn.Module = Same() if ln is None else ln
        self.eval()

    def forward(self, frames: Stream, real: Bool[Tensor, "batch pos"] | None) -> Stream:
        if real is not None:  # the convolution must not hear padding
            frames = frames.masked_fill(~real[..., None], 0.0)
        embedded = self.hook_embed(frames)
        return self.ln(embedded + self.hook_pos_embed(self.pos_conv(embedded)))

    def train(self, mode: bool = True) -> Any:
        """Evaluation mode, whatever is asked."""
        return super().train(False)
