"""`HookedAudioEncoder`: HuBERT and wav2vec 2.0 with a hook point everywhere."""

from __future__ import annotations

from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import ProcessorMixin, Wav2Vec2FeatureExtractor

from hookedlm.audio.loading import DOOR, fresh_layers
from hookedlm.audio.waveforms import Waveforms, as_waveforms
from hookedlm.axes import LOGITS, STREAM
from hookedlm.config import HookedTransformerConfig
from hookedlm.convert.audio import AudioLayers, truth_of
from hookedlm.encoders import EncoderBase, Loaded
from hookedlm.errors import InputError, TokenizerError, WeightError
from hookedlm.hooks import HookPoint
from hookedlm.layers.bert import BertBlock

Frames = Float[Tensor, "batch pos d_model"]
Mask = Int[Tensor, "batch pos"]
Inputs = Waveforms | Frames | tuple[Frames, Mask | None]
ReturnType = Literal["hidden", "logits"] | None
RETURN_TYPES = ("hidden", "logits", None)


class HookedAudioEncoder(EncoderBase):
    """A HuBERT or wav2vec 2.0 as one instrumented encoder, on Hugging Face's own tensors.

    Convolutions turn samples into frames and stay Hugging Face's; from there on the hook names are
    the classic ones (docs/hooks.md). ``processor`` is transformers' feature extractor, which
    normalises and pads waveforms. Sources: arXiv 2106.07447, 2006.11477.
    """

    def __init__(
        self,
        cfg: HookedTransformerConfig | dict[str, Any],
        move_to_device: bool = True,
        model_name: str | None = None,
        *,
        layers: AudioLayers | None = None,
        processor: Any = None,
    ):
        super().__init__()
        self._begin(cfg)
        if model_name is not None:
            self.cfg.model_name = model_name
        if layers is None:
            layers = fresh_layers(self.cfg)
            processor = Wav2Vec2FeatureExtractor() if processor is None else processor
        # A processor of sound and text is fine, too.
        self.processor = (
            processor.feature_extractor if isinstance(processor, ProcessorMixin) else processor
        )
        self._mask_config, self._counter = layers.config, layers.counter
        self.front_end = layers.front_end
        self.embed = layers.embed
        self.hook_full_embed = HookPoint(STREAM, shares=True)
        self.blocks = nn.ModuleList(layers.blocks)
        self.ln_final = layers.ln_final
        self.unembed = layers.unembed
        if layers.unembed is not None:
            self.hook_logits = HookPoint(LOGITS)
        self._finish(move_to_device)

    @classmethod
    def from_pretrained(
        cls,
        model_name: str,
        checkpoint_index: int | None = None,
        checkpoint_value: int | None = None,
        hf_model: nn.Module | None = None,
        device: str | torch.device | None = None,
        move_to_device: bool = True,
        dtype: str | torch.dtype = torch.float32,
        *,
        processor: Any = None,
        **from_pretrained_kwargs: Any,
    ) -> HookedAudioEncoder:
        """A HuBERT or wav2vec 2.0 from the hub, a local folder, or ``hf_model``; compared with
        Hugging Face's.

        ``processor`` is the feature extractor; without one, that of the checkpoint. Raises
        LoadError when there is nothing to read, ConversionError when the numbers differ.
        """
        cls._refuse_steps(checkpoint_index, checkpoint_value)
        loaded = DOOR.load(model_name, hf_model, processor, dtype, from_pretrained_kwargs)
        return cls._pretrained(loaded, device, move_to_device)

    @classmethod
    def _of(cls, loaded: Loaded[AudioLayers]) -> HookedAudioEncoder:
        return cls(
            loaded.cfg, move_to_device=False, layers=loaded.layers, processor=loaded.companion
        )

    # Sound ----------------------------------------------------------------------------------------

    def to_frames(
        self, raw_inputs: Waveforms, sampling_rate: int = 16000, move_to_device: bool = True
    ) -> tuple[Frames, Mask]:
        """(frames ``[batch, pos, d_model]``, mask of real ones), behind the convolutions and their
        projection; padded right.

        ``raw_inputs``: samples of one channel, or several in a list or ``[batch, sample]``. With
        ``move_to_device=False`` both come back on the CPU. No gradient reaches the samples: the
        feature extractor works in numpy. Raises InputError without a feature extractor, at another
        sampling rate than its own, and on what is no sound.
        """
        if self.processor is None:
            raise InputError(
                "this model has no feature extractor: pass processor=..., or give frames; "
                "frames_of(samples) makes them of what is normalised already"
            )
        expected = self.processor.sampling_rate
        if sampling_rate != expected:
            raise InputError(
                f"sampling_rate={sampling_rate}: this model hears {expected} samples a second; "
                "resample first, e.g. with torchaudio.functional.resample"
            )
        waves = as_waveforms(raw_inputs, self._counter.receptive_field)
        found = self.processor(
            waves,
            sampling_rate=sampling_rate,
            return_tensors="pt",
            padding=True,
            return_attention_mask=True,
        )
        frames, mask = self.frames_of(found["input_values"], found["attention_mask"])
        return (frames, mask) if move_to_device else (frames.cpu(), mask.cpu())

    def frames_of(
        self,
        samples: Float[Tensor, "batch sample"],
        sample_mask: Int[Tensor, "batch sample"] | None = None,
    ) -> tuple[Frames, Mask]:
        """`to_frames` of samples that a feature extractor made, ``sample_mask`` being 1 at real
        ones. Raises InputError on other shapes and on rows without a frame."""
        shortest = self._counter.receptive_field
        real = torch.ones_like(samples, dtype=torch.long) if sample_mask is None else sample_mask
        if samples.ndim != 2 or real.shape != samples.shape:
            raise InputError(
                f"samples of shape {tuple(samples.shape)}, mask of shape {tuple(real.shape)}: "
                "expected [batch, sample] of both"
            )
        real = real.to(self.device, torch.long)
        if real.shape[1] < shortest or (real.sum(1) < shortest).any():
            raise InputError(f"a row with too few samples: the first frame takes {shortest}")
        if (real.diff(dim=1) > 0).any():
            raise InputError("a row that begins with padding: pad on the right")
        frames = self.front_end(samples.to(self.device, self.dtype))
        return frames, self._counter.real_frames(frames.shape[1], real).long()

    # Running --------------------------------------------------------------------------------------

    def encoder_output(self, frames: Frames, one_zero_attention_mask: Mask | None = None) -> Frames:
        """The stream behind the last block and norm: Hugging Face's ``last_hidden_state``.

        ``one_zero_attention_mask`` is 1 at real frames; without one, all are. Raises InputError on
        shapes that do not fit.
        """
        expected = ("batch", "pos", self.cfg.d_model)
        if frames.ndim != 3 or frames.shape[-1] != expected[-1] or not frames.numel():
            raise InputError(f"frames of shape {tuple(frames.shape)}: expected {expected}")
        real = one_zero_attention_mask
        if real is not None:
            if real.shape != frames.shape[:2]:
                raise InputError(
                    f"attention mask of shape {tuple(real.shape)}: expected "
                    f"{tuple(frames.shape[:2])}, one for each frame"
                )
            real = real.to(self.device).bool()
            if not real.any(1).all():
                raise InputError("attention mask: a row has no real frame")
        embedded = self.embed(frames.to(self.device, self.dtype), real)
        resid = self.hook_full_embed(embedded)
        resid = self._through_blocks(resid, real)
        return resid if self.ln_final is None else self.ln_final(resid)

    def forward(
        self,
        inputs: Inputs,
        one_zero_attention_mask: Mask | None = None,
        sampling_rate: int = 16000,
        move_to_device: bool = True,
        return_type: ReturnType = "hidden",
    ) -> Float[Tensor, "batch pos out"] | None:
        """What the model makes of waveforms, of frames ``[batch, pos, d_model]`` or of a pair
        (frames, mask of real ones), which `to_frames` returns.

        ``return_type``: "hidden", the stream behind the last norm; "logits" of the CTC head
        ``[batch, pos, d_vocab]``; None. The mask of waveforms is known. Raises InputError on other
        types, without the head, on frames that are elsewhere unless ``move_to_device``, and as
        `to_frames` does.
        """
        if return_type not in RETURN_TYPES:
            raise InputError(f"return_type={return_type!r}: expected one of {RETURN_TYPES}")
        if return_type == "logits" and self.unembed is None:
            raise InputError("this model has no CTC head: use return_type='hidden'")
        frames, mask = self._frames(inputs, sampling_rate)
        if not move_to_device and frames.device != self.device:
            raise InputError(f"frames on {frames.device}: the model is on {self.device}")
        given = mask if one_zero_attention_mask is None else one_zero_attention_mask
        resid = self.encoder_output(frames, given)
        if self.unembed is None:
            return resid if return_type == "hidden" else None
        if return_type == "logits" or self.hook_logits.wanted:
            logits = self.hook_logits(self.unembed(resid))
            resid = logits if return_type == "logits" else resid
        return None if return_type is None else resid

    def _frames(self, inputs: Any, sampling_rate: int) -> tuple[Frames, Mask | None]:
        if isinstance(inputs, tuple) and len(inputs) == 2 and _are_frames(inputs[0]):
            return inputs
        return (inputs, None) if _are_frames(inputs) else self.to_frames(inputs, sampling_rate)

    # Checking -------------------------------------------------------------------------------------

    @torch.no_grad()
    def _check(self, hf_model: Any) -> None:
        """Compare with Hugging Face's model on a padded batch; raises ConversionError."""
        counter = self._counter
        n = counter.receptive_field + 10 * counter.hop
        real = torch.ones(2, n, dtype=torch.long)
        real[1, n - 4 * counter.hop :] = 0
        samples = torch.randn(2, n, generator=torch.Generator().manual_seed(0)) * real
        samples, real = samples.to(self.device, self.dtype), real.to(self.device)
        truth = truth_of(hf_model, {"input_values": samples, "attention_mask": real})

        def run() -> dict[str, Tensor]:
            frames, mask = self.frames_of(samples, real)
            stream = self.encoder_output(frames, mask)
            if self.unembed is None:
                return {"stream": stream}
            return {"stream": stream, "logits": self.hook_logits(self.unembed(stream))}

        mask = counter.real_frames(truth["stream"].shape[1], real)
        self._confirm(run, truth, dict.fromkeys(truth, mask))

    # Names ----------------------------------------------------------------------------------------

    def _reached(self, name: str, store: dict[str, Tensor]) -> bool:
        last = f"blocks.{len(self.blocks) - 1}."
        return super()._reached(last if name.startswith("ln_final.") else name, store)

    def why_missing(self, name: str) -> str:
        """Why a point of the classic naming is absent from this model."""
        if name == "hook_logits":
            return "It has no CTC head."
        post_norm = isinstance(self.blocks[0], BertBlock)
        if post_norm and name.startswith("ln_final."):
            return "Its stream is normed in each block: see ln2 of the last."
        if not post_norm and name.endswith("hook_normalized_resid_post"):
            return "Its stream is normed behind the last block only: see ln_final."
        return super().why_missing(name)

    @property
    def W_E(self) -> Tensor:
        """There is none: raises WeightError."""
        raise WeightError("sound enters through convolutions: there is no W_E")

    @property
    def W_pos(self) -> Tensor:
        """There is none: raises WeightError."""
        raise WeightError("positions come from a convolution over the frames: there is no W_pos")

    def to_single_token(self, string: str) -> int:
        """Raises TokenizerError: what the CTC head spells is given by its index."""
        raise TokenizerError(f"{string!r}: a speech encoder has no tokenizer, give the index")


def _are_frames(x: Any) -> bool:
    return isinstance(x, Tensor) and x.ndim == 3
