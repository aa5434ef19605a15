"""Text decoders of models that also see or hear. Most are a known family under another type name.

A row's places are looked up where the decoder is, so that a wrapper needs no entry.
"""

from hookedlm.families.bert_like import bert_like
from hookedlm.families.llama import ROWS as LLAMAS
from hookedlm.families.mixtral import ROWS as MIXTURES

ROWS = {
    "git": bert_like("git").but(
        unembed="output",
        causal=True,
        type_embed=None,
        asked=("attention.self.image_patch_tokens",),
    ),
    "glm4v_text": LLAMAS["glm4"].but(rotary="tables"),
    "glm_ocr_text": LLAMAS["glm4"].but(rotary="tables"),
    "glm4v_moe_text": MIXTURES["glm4_moe"].but(rotary="tables"),
    "mllama_text_model": LLAMAS["llama"],
    "paddleocr_vl_text": LLAMAS["llama"],
    "phi4_multimodal": LLAMAS["phi3"],
    "qwen2_vl_text": LLAMAS["qwen2"],
    "qwen2_5_vl_text": LLAMAS["qwen2"],
    "qwen2_5_omni_text": LLAMAS["qwen2"],
    "qwen3_vl_text": LLAMAS["qwen3"].but(window=None),
    "qwen3_vl_moe_text": MIXTURES["qwen3_moe"].but(window=None),
    "qwen3_omni_moe_text": MIXTURES["qwen3_moe"],
}
