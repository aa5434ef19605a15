"""`GenerationMethods`: text from a hooked model, by transformers' own generation utilities."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from hookedlm.convert import hf
from hookedlm.convert.prepare import OURS
from hookedlm.convert.text_model import text_config
from hookedlm.errors import InputError

if TYPE_CHECKING:
    from hookedlm.model import HookedTransformer


class Generator(PreTrainedModel, GenerationMixin):
    """A hooked model in the shape transformers' ``generate`` expects; it holds no weights."""

    main_input_name = "input_ids"
    _supports_sdpa = True

    def __init__(self, model: HookedTransformer, config: PretrainedConfig):
        super().__init__(config)
        self.generation_config = GenerationConfig()
        self.hooked = [model]  # in a list, so that it is no sub-module

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True  # whatever the config says is about experts that run elsewhere

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.hooked[0].device

    @property
    def dtype(self) -> torch.dtype:
        """What the weights are stored in."""
        return self.hooked[0].dtype

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        inputs_embeds: Tensor | None = None,
        **others: Any,
    ) -> CausalLMOutputWithPast:
        """One step: hooks run, told by ``hook.pos_offset`` where they are."""
        takes = self.hooked[0].driver.preparer.accepts - OURS
        logits = self.hooked[0](
            input_ids,
            attention_mask=attention_mask,
            past_kv_cache=past_key_values,
            inputs_embeds=inputs_embeds,
            **{name: x for name, x in others.items() if name in takes},
        )
        return CausalLMOutputWithPast(logits=logits, past_key_values=past_key_values)

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        known = self.hooked[0].driver.preparer.accepts
        super()._validate_model_kwargs({n: x for n, x in model_kwargs.items() if n not in known})

    def _update_model_kwargs_for_generation(
        self, outputs: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        own, known = self.hooked[0]._outside[0], self.hooked[0].driver.preparer.accepts - OURS
        update = super()._update_model_kwargs_for_generation
        if isinstance(own, GenerationMixin) and known & model_kwargs.keys() - {"position_ids"}:
            update = own._update_model_kwargs_for_generation  # it knows how its inputs grow
        return update(outputs, model_kwargs, *args, **kwargs)


class GenerationMethods:
    """`generate`."""

    @torch.no_grad()
    def generate(
        self: HookedTransformer,
        input: Any = "",
        max_new_tokens: int = 10,
        stop_at_eos: bool = True,
        eos_token_id: Any = None,
        do_sample: bool = True,
        top_k: int | None = None,
        top_p: float | None = None,
        temperature: float = 1.0,
        freq_penalty: float = 0.0,
        use_past_kv_cache: bool = True,
        prepend_bos: bool | None = None,
        padding_side: Literal["left", "right"] | None = None,
        return_type: Literal["input", "str", "tokens"] = "input",
        verbose: bool = True,
        *,
        attention_mask: Tensor | None = None,
        repetition_penalty: float | None = None,
        streamer: Any = None,
        **generation_kwargs: Any,
    ) -> Any:
        """The prompt and ``max_new_tokens`` more, as text or tokens (``return_type``).

        ``input``: text, texts or tokens; several are padded on the left. Hooks stay active: with
        the cache they see only new positions, and ``hook.pos_offset`` tells where they are.
        ``inputs_embeds`` may stand for the prompt; then only what is new comes back.
        ``do_sample=False`` or ``temperature=0`` is greedy. Rows that met eos are padded. Everything
        else transformers' ``generate`` takes may be passed too.
        """
        prompt: dict[str, Tensor]
        if "inputs_embeds" in generation_kwargs:
            _, mask = self._read_embeds(
                generation_kwargs["inputs_embeds"], input or None, None, attention_mask, None
            )
            prompt = {} if mask is None else {"attention_mask": mask}
            mask = torch.ones(len(generation_kwargs["inputs_embeds"]), 0)  # what comes back is new
        else:
            tokens, mask = self._prompt(input, prepend_bos, attention_mask)
            prompt = {"input_ids": tokens, "attention_mask": mask}
        if return_type not in ("input", "str", "tokens"):
            raise InputError(f"return_type={return_type!r}: expected 'input', 'str' or 'tokens'")
        if return_type == "str":
            self._the_tokenizer("return_type='str'")
        was_text = "input_ids" in prompt and isinstance(input, (str, list, tuple))
        options = self._generation_options(stop_at_eos, eos_token_id, do_sample, temperature)
        options |= {
            name: value
            for name, value in (
                ("top_p", top_p if options["do_sample"] else None),
                ("repetition_penalty", repetition_penalty),
                ("streamer", streamer),
            )
            if value is not None
        }
        if options["do_sample"]:
            options["top_k"] = top_k if top_k is not None else 0
        if freq_penalty:
            given = generation_kwargs.pop("logits_processor", None) or []
            options["logits_processor"] = [FrequencyPenalty(freq_penalty), *given]
        cached = use_past_kv_cache and self._can_cache()
        if cached and (own_cache := self.driver.preparer.own_cache) is not None:
            options["past_key_values"] = own_cache()
        out = self._generator().generate(
            **prompt,
            max_new_tokens=max_new_tokens,
            use_cache=cached,
            **(options | generation_kwargs),
        )
        self.run_state.pos_offset = 0
        if return_type == "str" or (return_type == "input" and was_text):
            texts = self._texts(out, mask)
            return texts[0] if isinstance(input, str) and was_text else texts
        return out

    def _prompt(
        self: HookedTransformer, input: Any, prepend_bos: bool | None, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        if isinstance(input, Tensor):
            if input.is_floating_point():
                raise InputError("generate starts from text or tokens, not from a stream")
            tokens = (input if input.ndim == 2 else input[None]).to(self.device)
            if mask is None:
                mask = self.padding_mask(tokens, "left") if self._pads_left(None) else None
            mask = torch.ones_like(tokens) if mask is None else mask.to(self.device)
            if bool((mask[:, -1] == 0).any()):
                raise InputError("prompts to continue must be padded on the left, not on the right")
            return tokens, mask
        tokens, mask = self.to_tokens_and_mask(input, prepend_bos, "left")
        return tokens.to(self.device), mask.to(self.device)

    def _generation_options(
        self: HookedTransformer,
        stop_at_eos: bool,
        eos_token_id: Any,
        do_sample: bool,
        temperature: float,
    ) -> dict[str, Any]:
        options: dict[str, Any] = {"do_sample": do_sample and temperature > 0}
        if options["do_sample"]:
            options["temperature"] = float(temperature)
        if stop_at_eos and eos_token_id is None:
            eos_token_id = self._eos()
        options["eos_token_id"] = eos_token_id if stop_at_eos else None
        options["pad_token_id"] = (
            self.pad_token_id
            if self.tokenizer is not None
            else (eos_token_id if isinstance(eos_token_id, int) else 0)
        )
        return options

    def _eos(self: HookedTransformer) -> Any:
        if self.tokenizer is not None and self.tokenizer.eos_token_id is not None:
            return self.tokenizer.eos_token_id
        own = self._outside[0]
        return hf.find(None if own is None else text_config(own), "eos_token_id")

    def _can_cache(self: HookedTransformer) -> bool:
        """Whether the family's code takes transformers' cache (some keep a state of their own)."""
        return self.driver.preparer.remembers

    def _generator(self: HookedTransformer) -> Generator:
        config = hf.find(self._outside[0], "config")
        if not isinstance(config, PretrainedConfig):
            config = PretrainedConfig(
                num_hidden_layers=self.cfg.n_layers,
                hidden_size=self.cfg.d_model,
                vocab_size=self.cfg.d_vocab,
            )
        else:
            config = copy.deepcopy(config)
        return Generator(self, config)

    def _texts(self: HookedTransformer, out: Tensor, mask: Tensor) -> list[str]:
        texts = []
        for row, real in zip(out, mask, strict=True):
            ids = row[int((real == 0).sum()) :].tolist()
            bos = self.tokenizer.bos_token_id
            texts.append(self.tokenizer.decode(ids[1:] if ids[:1] == [bos] else ids))
        return texts


class FrequencyPenalty:
    """Logits less ``penalty`` for every time a token already occurred (TransformerLens' rule)."""

    def __init__(self, penalty: float):
        self.penalty = penalty

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        counts = torch.zeros_like(scores).scatter_add_(
            1, input_ids, torch.ones_like(input_ids, dtype=scores.dtype)
        )
        return scores - self.penalty * counts
