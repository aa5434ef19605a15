"""What encoders of texts and of sound and encoder-decoders share: the door a checkpoint comes in
by, the comparison with Hugging Face's numbers, and the methods of `HookedTransformer` that fit."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Self, TypeVar

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedTokenizerBase

from hookedlm.caching import CachingMethods
from hookedlm.config import HookedTransformerConfig
from hookedlm.convert.check import TOLERANCES, compare, within
from hookedlm.convert.encoder import bidirectional_mask
from hookedlm.driver import LatestContexts
from hookedlm.errors import ConversionError, InputError, LoadError
from hookedlm.layers.context import Context
from hookedlm.loading import default_device, load_tokenizer, resolve, to_dtype
from hookedlm.model import HookedTransformer
from hookedlm.placing import PlacingMethods
from hookedlm.reach import where_found
from hookedlm.root import HookedRootModule
from hookedlm.spec import AttentionSpec, BlockSpec, MLPSpec, NormSpec
from hookedlm.weights import WeightMethods

Layers = TypeVar("Layers")
Stream = Float[Tensor, "batch pos d_model"]


def needed(config: Any, weight: str) -> str | None:
    """No weight may be missing."""
    return None


def described(
    model: Any, blocks: Sequence[Any], act: Any, name: str, **more: Any
) -> HookedTransformerConfig:
    """The classic config of a converted model, read off the first of its ``blocks`` (an encoder is
    uniform, or it was refused)."""
    spec: BlockSpec = blocks[0].spec
    attn, mlp, ln1 = spec.attn, spec.mlp, spec.ln1
    assert isinstance(attn, AttentionSpec)
    assert isinstance(mlp, MLPSpec)
    assert isinstance(ln1, NormSpec)
    weight = next(blocks[0].parameters())
    fields: dict[str, Any] = dict(
        model_name=name,
        original_architecture=(model.config.architectures or [type(model).__name__])[0],
        n_layers=len(blocks),
        d_model=model.config.hidden_size,
        n_heads=attn.n_heads,
        d_head=attn.d_head,
        attn_scale=1.0 / attn.scale,
        use_attn_scale=attn.scale != 1.0,
        d_mlp=mlp.d_mlp,
        gated_mlp=mlp.gated,
        final_rms=ln1.kind == "RMS",
        act_fn=act if isinstance(act, str) else type(act).__name__,
        eps=ln1.eps,
        normalization_type=ln1.kind,
        attention_dir="bidirectional",
        dtype=weight.dtype,
        device=str(weight.device),
    )
    return HookedTransformerConfig(**fields | more)


@contextmanager
def drawn_under(seed: int | None) -> Iterator[None]:
    """Weights drawn inside come from ``seed``, and leave the global generator as it was; without a
    seed they come from it."""
    with torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        yield


@dataclass
class Loaded(Generic[Layers]):
    """Everything a model of this kind is made from."""

    cfg: HookedTransformerConfig
    layers: Layers
    companion: Any
    """Its tokenizer or feature extractor."""
    hf_model: nn.Module
    device: torch.device | None
    """Where it should go."""
    dtype: torch.dtype | None
    """What it should be cast to."""


@dataclass(frozen=True)
class Door(Generic[Layers]):
    """How checkpoints of one kind of model are read.

    ``auto`` picks the class of transformers for a config. ``part_of`` names the part, for
    ``convert`` to leave out, that a checkpoint may lack a weight of; None: it may not.
    """

    what: str
    kinds: Collection[str]
    elsewhere: str
    auto: Callable[[Any], Any]
    convert: Callable[[Any, frozenset[str]], Layers]
    describe: Callable[[Any, Layers, str], HookedTransformerConfig]
    companion: Callable[[str, bool, str | None], Any] = load_tokenizer
    part_of: Callable[[Any, str], str | None] = needed

    def load(
        self,
        name: str,
        hf_model: Any,
        companion: Any,
        dtype: str | torch.dtype | None,
        kwargs: Mapping[str, Any],
    ) -> Loaded[Layers]:
        """Find, read and convert; a module given as ``hf_model`` stays as it is.

        Raises LoadError when a name leads nowhere, or weights are missing there.
        """
        kwargs = dict(kwargs)
        wanted = to_dtype(kwargs.pop("torch_dtype", dtype))
        without: frozenset[str] = frozenset()
        device = None
        if hf_model is None:
            path, local = resolve(name)
            hf_model, without = self._read(path, local, wanted, kwargs)
            if companion is None:
                companion = self.companion(path, local, kwargs.get("revision"))
            device = default_device()
        elif kwargs:
            raise LoadError(f"{', '.join(kwargs)}: only used when a checkpoint is read")
        layers = self.convert(hf_model, without)
        cfg = self.describe(hf_model, layers, name.rstrip("/").split("/")[-1])
        if isinstance(companion, PreTrainedTokenizerBase):
            cfg.tokenizer_name = companion.name_or_path or None
        return Loaded(cfg, layers, companion, hf_model, device, wanted)

    def _read(
        self, path: str, local: bool, dtype: torch.dtype | None, kwargs: dict[str, Any]
    ) -> tuple[nn.Module, frozenset[str]]:
        where = {**kwargs, "local_files_only": True} if local else where_found(kwargs)
        # Transformers keeps some weights in float32 then (T5): read all so, cast all at the end.
        first = torch.float32 if dtype == torch.float16 else dtype
        try:
            config = AutoConfig.from_pretrained(path, **where)
            if config.model_type not in self.kinds:
                raise LoadError(
                    f"{path!r} is a {config.model_type}: {self.what}s here are "
                    f"{', '.join(self.kinds)}; {self.elsewhere}"
                )
            model, report = self.auto(config).from_pretrained(
                path, output_loading_info=True, dtype="auto" if first is None else first, **where
            )
        except LoadError:
            raise
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            why = " ".join(str(error).split())
            raise LoadError(f"can't read an {self.what} from {path!r}: {why}") from error
        parts = {key: self.part_of(config, key) for key in sorted(report["missing_keys"])}
        if left := [key for key, part in parts.items() if part is None]:
            raise LoadError(f"{path!r} has no {', '.join(left[:3])}")
        return model.eval(), frozenset(part for part in parts.values() if part)


class EncoderBase(CachingMethods, WeightMethods, PlacingMethods, HookedRootModule):
    """What `HookedEncoder`, `HookedAudioEncoder` and `HookedEncoderDecoder` are."""

    what: ClassVar[str] = "encoder"
    _mask_config: Any

    def _begin(self, cfg: HookedTransformerConfig | dict[str, Any]) -> None:
        self.cfg = HookedTransformerConfig.unwrap(cfg)
        if self.cfg.n_devices != 1:
            raise InputError(f"n_devices: an {self.what} stands on one device here")
        self._outside: list[Any] = []
        self.driver = LatestContexts()

    def _finish(self, move_to_device: bool) -> None:
        self.setup()
        if move_to_device and self.cfg.device is not None:
            self.to(self.cfg.device)

    @classmethod
    def _of(cls, loaded: Loaded[Any]) -> Self:
        """A model of what was loaded, where it stands."""
        raise NotImplementedError

    @classmethod
    def _pretrained(
        cls,
        loaded: Loaded[Any],
        device: str | torch.device | None,
        move_to_device: bool,
    ) -> Self:
        hooked = cls._of(loaded)
        hooked.eval()
        hooked._check(loaded.hf_model)
        if device is None and move_to_device:
            device = loaded.device
        if device is not None or loaded.dtype not in (None, hooked.dtype):
            hooked.to(device=device or hooked.device, dtype=loaded.dtype)
        return hooked

    @classmethod
    def _refuse_steps(cls, *checkpoint: int | None) -> None:
        if any(step is not None for step in checkpoint):
            raise NotImplementedError(f"checkpoints of {cls.what}s: name a revision=... instead")

    # Running --------------------------------------------------------------------------------------

    def _through_blocks(self, resid: Stream, real: Int[Tensor, "batch pos"] | None) -> Stream:
        """The stream behind the last block, each position attending to all that are ``real``."""
        context = Context(mask=bidirectional_mask(self._mask_config, resid.detach(), real))
        self.driver.latest = [context] * len(self.blocks)
        for block in self.blocks:
            resid = block(resid, context)
        return resid

    # Checking -------------------------------------------------------------------------------------

    def _check(self, hf_model: Any) -> None:
        """Compare with Hugging Face's model; raises ConversionError."""
        raise NotImplementedError

    def _confirm(
        self,
        run: Callable[[], dict[str, Tensor]],
        truth: Mapping[str, Tensor],
        real: Mapping[str, Tensor | None],
    ) -> None:
        """Compare what ``run`` says, unheard and with every hook on, with the truth of the same
        name, at the positions that are ``real``. In half precision, where errors of rounding grow
        from block to block, the median position judges. Raises ConversionError.
        """
        everywhere = [(lambda name: True, lambda x, hook: None)]
        for hooks in ([], everywhere):
            with self.hooks(fwd_hooks=hooks):
                ours = run()
            for name, x in ours.items():
                mask = real.get(name)
                kept = x.new_ones(x.shape[:-1]) if mask is None else mask
                agreement = compare(x, truth[name], kept.bool())
                if not within(agreement, self.dtype, reroutes=True):
                    raise ConversionError(
                        f"{name} differ from Hugging Face's by {agreement.error:.1e} (allowed "
                        f"{TOLERANCES[self.dtype]:.0e})"
                    )

    # As in `HookedTransformer` --------------------------------------------------------------------

    is_in_full_cache = HookedTransformer.is_in_full_cache
    set_use_attn_result = HookedTransformer.set_use_attn_result
    set_use_split_qkv_input = HookedTransformer.set_use_split_qkv_input
    set_use_attn_in = HookedTransformer.set_use_attn_in
    set_use_hook_mlp_in = HookedTransformer.set_use_hook_mlp_in

    def cache_size(self, *args: Any, **kwargs: Any) -> Any:
        """Not measured before a run: always raises NotImplementedError."""
        raise NotImplementedError("run_with_cache(...)[1].nbytes says what a run has recorded")

    def why_missing(self, name: str) -> str:
        """Why a point of the classic naming is absent from this model."""
        if name in ("hook_embed", "hook_pos_embed"):
            return f"An encoder's is embed.{name}."
        return ""
