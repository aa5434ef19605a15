"""Which module paths of TransformerLens 2.x lead where, and why some lead nowhere."""

from hookedlm.install import Content

PARTS = {
    "abstract_attention": "AbstractAttention",
    "attention": "Attention",
    "bert_block": "BertBlock",
    "bert_embed": "BertEmbed",
    "bert_mlm_head": "BertMLMHead",
    "bert_nsp_head": "BertNSPHead",
    "bert_pooler": "BertPooler",
    "embed": "Embed",
    "gated_mlp": "GatedMLP",
    "grouped_query_attention": "GroupedQueryAttention",
    "layer_norm": "LayerNorm",
    "layer_norm_pre": "LayerNormPre",
    "mlp": "MLP",
    "mlps": "MLP, GatedMLP, MoE",
    "mlps.gated_mlp": "GatedMLP",
    "mlps.mlp": "MLP",
    "mlps.moe": "MoE",
    "moe": "MoE",
    "pos_embed": "PosEmbed",
    "rms_norm": "RMSNorm",
    "rms_norm_pre": "RMSNormPre",
    "t5_attention": "T5Attention",
    "t5_block": "T5Block",
    "token_typed_embed": "TokenTypeEmbed",
    "transformer_block": "TransformerBlock",
    "unembed": "Unembed",
}
"""Module below ``components`` -> classes in it."""

CONVERTED = (
    "apertus bert bloom coder gemma gpt2 gptj gpt_oss llama mingpt mistral mixtral neo neox olmo "
    "olmo2 olmoe opt phi phi3 qwen qwen2 qwen3"
).split()
"""Families that TransformerLens converts by a function each; one does for all here."""

MODULES: dict[str, Content] = {
    # A module and the class in it share a name.
    "ActivationCache": {"hookedlm.cache": "ActivationCache"},
    "BertNextSentencePrediction": {"hookedlm.encoder": "BertNextSentencePrediction"},
    "FactoredMatrix": {"hookedlm.factored_matrix": "FactoredMatrix"},
    "HookedAudioEncoder": {"hookedlm.audio": "HookedAudioEncoder"},
    "HookedEncoder": {"hookedlm.encoder": "HookedEncoder"},
    "HookedEncoderDecoder": {"hookedlm.encoder_decoder": "HookedEncoderDecoder"},
    "HookedTransformer": {
        "hookedlm.model": "HookedTransformer, Output, Loss",
        "hookedlm.config": "DTYPES as DTYPE_FROM_STRING, HookedTransformerConfig",
    },
    "HookedTransformerConfig": {"hookedlm.config": "HookedTransformerConfig"},
    "SVDInterpreter": {"hookedlm.svd_interpreter": "SVDInterpreter"},
    # Modules that are hookedlm's own.
    "evals": "hookedlm.evals",
    "head_detector": "hookedlm.head_detector",
    "patching": "hookedlm.patching",
    "train": "hookedlm.train",
    "utils": "hookedlm.utils",
    # Modules that are put together.
    "hook_points": {
        "hookedlm.hooks": "HookPoint, LensHandle, HookFn as HookFunction",
        "hookedlm.root": "HookedRootModule, NamesFilter, DeviceType",
        "hookedlm.slices": "Slice, SliceInput",
    },
    "loading_from_pretrained": {
        "hookedlm.model_configs": (
            "DEFAULT_MODEL_ALIASES, MODEL_ALIASES, OFFICIAL_MODEL_NAMES, convert_hf_model_config, "
            "convert_neel_model_config, fill_missing_keys, get_basic_config, "
            "get_num_params_of_pretrained, get_official_model_name, get_pretrained_model_config, "
            "get_pretrained_state_dict, make_model_alias_map"
        ),
        "hookedlm.checkpoints": "get_checkpoint_labels",
        "hookedlm.config": "HookedTransformerConfig",
    },
    "loading": "hookedlm.transformer_lens.loading_from_pretrained",
    "past_key_value_caching": {
        "hookedlm.past_key_values": (
            "HookedTransformerKeyValueCache, HookedTransformerKeyValueCacheEntry"
        )
    },
    "components": {
        "hookedlm.components": (
            "AbstractAttention, Attention, BertBlock, BertEmbed, BertMLMHead, BertNSPHead, "
            "BertPooler, Embed, GatedMLP, GroupedQueryAttention, LayerNorm, LayerNormPre, MLP, "
            "MoE, PosEmbed, RMSNorm, RMSNormPre, T5Attention, T5Block, TokenTypeEmbed, "
            "TransformerBlock, Unembed"
        ),
    },
    **{f"components.{path}": {"hookedlm.components": names} for path, names in PARTS.items()},
    "factories": {},
    "factories.activation_function_factory": {"hookedlm.components": "ActivationFunctionFactory"},
    "factories.mlp_factory": {"hookedlm.components": "MLPFactory"},
    "pretrained": {},
    "pretrained.weight_conversions": {
        "hookedlm.model_configs": ", ".join(
            f"convert_weights as convert_{family}_weights" for family in CONVERTED
        )
    },
    "utilities": {},
    "utilities.activation_functions": {
        "hookedlm.layers.activations": (
            "ACTIVATION_FN_DICT, ACTIVATION_FN_DICT as SUPPORTED_ACTIVATIONS, XIELU, solu, xielu"
        ),
        "hookedlm.layers.mlp": "Activation as ActivationFunction",
    },
    "utilities.library_utils": {"hookedlm.tensors": "is_library_available"},
}

_ONE_DEVICE = "a model stands on one device here: model.device, model.to(device)"
_INTERNAL = "a step of TransformerLens' own forward pass; torch.nn.functional.linear does the same"

ABSENT: dict[str, str] = {
    "lit": (
        "a network service: it runs the server of the Language Interpretability Tool; "
        "hookedlm.plots draws figures"
    ),
    "utilities.addmm": _INTERNAL,
    "utilities.attention": _INTERNAL,
    "utilities.devices": _ONE_DEVICE,
}
"""Path -> what there is instead."""
