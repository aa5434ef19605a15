"""Waveforms in any of the forms people hold them in, as the feature extractor wants them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from torch import Tensor

from hookedlm.errors import InputError

Waveform = Float[Tensor, "sample"] | Float[np.ndarray, "sample"] | Sequence[float]
Waveforms = Waveform | Float[Tensor, "batch sample"] | Sequence[Waveform]


def as_waveforms(raw: Waveforms, shortest: int) -> list[Float[np.ndarray, "sample"]]:
    """One array of samples for each waveform in ``raw``: a single one, a batch ``[batch, sample]``
    or a list of them.

    Raises InputError on what is no sound of one channel, and on one of fewer samples than
    ``shortest``, which would make no frame.
    """
    rows: list[Any] = []
    if isinstance(raw, (Tensor, np.ndarray)):
        rows = [raw] if raw.ndim < 2 else list(raw)
    elif isinstance(raw, (list, tuple)) and raw:
        rows = [raw] if np.isscalar(raw[0]) else list(raw)
    if not rows:
        raise InputError(
            f"{type(raw).__name__} without a waveform: expected one, a list of them, or frames "
            "[batch, pos, d_model]"
        )
    waves = [_as_array(row) for row in rows]
    for i, wave in enumerate(waves):
        if wave.ndim != 1:
            raise InputError(
                f"waveform {i} has shape {wave.shape}: expected one channel, [sample]. Average or "
                "pick channels first."
            )
        if len(wave) < shortest:
            raise InputError(
                f"waveform {i} has {len(wave)} samples: the first frame takes {shortest}"
            )
        if not np.isfinite(wave).all():
            raise InputError(f"waveform {i} holds infinities, or what is not a number")
    return waves


def _as_array(wave: Any) -> np.ndarray:
    if isinstance(wave, Tensor):
        wave = wave.detach().float().cpu().numpy()
    try:
        return np.asarray(wave, dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise InputError(f"a waveform is numbers, one for each sample: {error}") from error
