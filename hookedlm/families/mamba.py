"""State-space models: a norm and a mixer per block, the mixer run as Hugging Face wrote it."""

from hookedlm.families.row import Row

MAMBA = Row(
    base="backbone",
    blocks="backbone.layers",
    embed="backbone.embeddings",
    ln_final="backbone.norm_f",
    layout="mixer",
    ln1="norm",
    ln2=None,
    mixer="mixer",
    attn=None,
    mlp=None,
    rotary=None,
    stream32=".residual_in_fp32",
)

ROWS = {"mamba": MAMBA, "falcon_mamba": MAMBA}
