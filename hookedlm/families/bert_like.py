"""BERT and its relatives as language models: each position sees those before it if the config says
``is_decoder``, else all of them. Embeddings are words, sentence types and positions, normed."""

from hookedlm.families.bert import BERT
from hookedlm.families.gpt2 import GPT2
from hookedlm.families.row import Choice, Row


def head_at(place: str, act: str, norm: str) -> dict[str, str]:
    """What stands before the unembedding: a matrix, an activation, a norm."""
    return {"head_dense": f"{place}.dense", "head_act": act, "head_norm": f"{place}.{norm}"}


def bert_like(body: str) -> Row:
    """BERT's decoder whose parts are below ``body``."""
    head = "cls.predictions.transform"
    return BERT.block.but(
        base=body,
        blocks=f"{body}.encoder.layer",
        embed=f"{body}.embeddings.word_embeddings",
        pos_embed=f"{body}.embeddings.position_embeddings",
        type_embed=f"{body}.embeddings.token_type_embeddings",
        embed_sum_norm=f"{body}.embeddings.LayerNorm",
        ln_final=None,
        **head_at(head, f"{head}.transform_act_fn", "LayerNorm"),
        unembed="cls.predictions.decoder",
        causal="attention.self.is_decoder",
        scale=None,
        mlp="",
    )


def roberta_like(body: str) -> Row:
    """RoBERTa's decoder, which numbers positions from behind padding's."""
    return bert_like(body).but(
        **head_at("lm_head", "gelu", "layer_norm"), unembed="lm_head.decoder"
    )


PRE_NORM = {"layout": "sequential", "embed_sum_norm": None}
ROBERTA = roberta_like("roberta")

ROWS = {
    "bert": bert_like("bert"),
    "bert-generation": bert_like("bert").but(head_dense=None, unembed="lm_head.decoder"),
    "big_bird": bert_like("bert").but(
        refused=(
            Choice("is_decoder", {True: None, False: ".bert.attention_type"}),
            "block_sparse",
            "its attention turns sparse beyond some 700 tokens (attention_type='block_sparse'), "
            "which has no form here. Load it with attention_type='original_full', or call "
            "model.bert.set_attention_type('original_full') first.",
        )
    ),
    "electra": bert_like("electra").but(
        **head_at("generator_predictions", "generator_predictions.activation", "LayerNorm"),
        unembed="generator_lm_head",
    ),
    "ernie": bert_like("ernie"),
    "rembert": bert_like("rembert").but(
        **head_at("cls.predictions", "cls.predictions.activation", "LayerNorm")
    ),
    "roc_bert": bert_like("roc_bert"),
    "megatron-bert": bert_like("bert").but(
        **PRE_NORM, ln1="attention.ln", ln2="ln", ln_final="bert.encoder.ln"
    ),
    "roformer": bert_like("roformer").but(
        pos_embed=None, attn="attention.self", rotary="sinusoid", rotary_given="sinusoidal_pos"
    ),
    "xlm": GPT2.but(
        blocks="transformer.blocks",
        loop_stays=True,  # it holds the stream of padding, known by its ids, at zero
        parallel_lists={
            "attn": "transformer.attentions",
            "ln1": "transformer.layer_norm1",
            "mlp": "transformer.ffns",
            "ln2": "transformer.layer_norm2",
        },
        embed="transformer.embeddings",
        pos_embed="transformer.position_embeddings",
        embed_sum_norm="transformer.layer_norm_emb",
        ln_final=None,
        unembed="pred_layer.proj",
        layout="post_norm",
        ln1="ln1",
        ln2="ln2",
        **{x: f"attn.{x}_lin" for x in "qkv"},
        qkv=None,
        o="attn.out_lin",
        n_heads="attn.n_heads",
        d_head="attn.head_dim",
        scale=None,
        scale_query=True,
        causal="config.causal",
        up="mlp.lin1",
        down="mlp.lin2",
    ),
    "reformer": Row(
        base="reformer",
        blocks="reformer.blocks",
        two_streams=("reformer.encoder.layers", "prev_attn_output", "hidden_states"),
        embed="reformer.embeddings.word_embeddings",
        attn=None,
        mlp=None,
        ln1=None,
        ln2=None,
        norm="LN",
        ln_final="reformer.encoder.layer_norm",
        unembed="lm_head.decoder",
    ),
    "roberta": ROBERTA,
    "camembert": ROBERTA,
    "xlm-roberta": ROBERTA,
    "data2vec-text": roberta_like("data2vec_text"),
    "xmod": ROBERTA.but(asked=("output.adapter_modules",)),
    "xlm-roberta-xl": ROBERTA.but(
        **PRE_NORM,
        ln1="attention.self_attn_layer_norm",
        ln2="LayerNorm",
        ln_final="roberta.encoder.LayerNorm",
    ),
    "roberta-prelayernorm": roberta_like("roberta_prelayernorm").but(
        layout="sequential",
        ln1="attention.LayerNorm",
        ln2="intermediate.LayerNorm",
        ln_final="roberta_prelayernorm.LayerNorm",
    ),
}
