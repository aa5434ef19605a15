"""HuBERT and wav2vec 2.0: encoders of speech, alike behind their convolutions."""

from __future__ import annotations

from dataclasses import dataclass

from hookedlm.families.row import Choice, Row


@dataclass(frozen=True)
class AudioRow:
    """Where Hugging Face keeps a speech encoder's parts: places from its base model.

    ``block`` counts from a block, ``head`` from the whole model. ``pre_norm`` is the key of the
    config that says whether ``norm`` stands behind the blocks (and theirs before each branch) or
    before the first block (and theirs behind each addition). ``training`` is only used there.
    """

    block: Row
    features: str
    projection: str
    positions: str
    norm: str
    pre_norm: str
    training: str
    head: str


HUBERT = AudioRow(
    block=Row(
        blocks="encoder.layers",
        layout=Choice("do_stable_layer_norm", {True: "sequential", False: "post_norm"}),
        norm="LN",
        ln1="layer_norm",
        ln2="final_layer_norm",
        attn="attention",
        q="attention.q_proj",
        k="attention.k_proj",
        v="attention.v_proj",
        o="attention.out_proj",
        d_head="attention.head_dim",
        scale="attention.scaling",
        causal=False,
        rotary=None,
        mlp="feed_forward",
        gate=None,
        up="feed_forward.intermediate_dense",
        down="feed_forward.output_dense",
        act="feed_forward.intermediate_act_fn",
    ),
    features="feature_extractor",
    projection="feature_projection",
    positions="encoder.pos_conv_embed",
    norm="encoder.layer_norm",
    pre_norm="do_stable_layer_norm",
    training="masked_spec_embed",
    head="lm_head",
)

AUDIO_ENCODERS: dict[str, AudioRow] = {"hubert": HUBERT, "wav2vec2": HUBERT}
"""``config.model_type`` -> row."""
