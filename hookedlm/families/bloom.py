"""ALiBi: positions as a bias on the scores (BLOOM, MPT, old Falcon)."""

from hookedlm.families.gpt2 import GPT2
from hookedlm.families.row import Choice

BLOOM = GPT2.but(
    embed="transformer.word_embeddings",
    embed_norm="transformer.word_embeddings_layernorm",
    pos_embed=None,
    ln1="input_layernorm",
    ln2="post_attention_layernorm",
    attn="self_attention",
    qkv="self_attention.query_key_value",
    qkv_order="groups",
    o="self_attention.dense",
    d_head="self_attention.head_dim",
    scale="self_attention.inv_norm_factor",
    bias="alibi",
    up="mlp.dense_h_to_4h",
    down="mlp.dense_4h_to_h",
    act="mlp.gelu_impl",
)

ROWS = {
    "bloom": BLOOM,
    "mpt": GPT2.but(
        blocks="transformer.blocks",
        pos_embed=None,
        ln_final="transformer.norm_f",
        ln1="norm_1",
        ln2="norm_2",
        qkv="attn.Wqkv",
        o="attn.out_proj",
        scale="attn.softmax_scale",
        clip="attn.clip_qkv",
        bias="position_bias",
        mask_hides=True,
        mlp="ffn",
        up="ffn.up_proj",
        down="ffn.down_proj",
        act="ffn.act",
    ),
    # ALiBi Falcons carry the bias in the mask, so only the rotation needs choosing.
    "falcon": BLOOM.but(
        embed_norm=None,
        layout=Choice(
            "new_decoder_architecture",
            {
                True: "parallel",
                False: Choice("parallel_attn", {True: "parallel", False: "sequential"}),
            },
        ),
        ln1=("ln_attn", "input_layernorm"),
        ln2=("ln_mlp", "post_attention_layernorm"),
        rotary=Choice("alibi", {True: None, False: "tables"}),
        bias=None,
        act="mlp.act",
    ),
}
