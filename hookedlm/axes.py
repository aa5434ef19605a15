"""The vocabulary of dimensions: every hook point, weight and docstring speaks in these words.

| axis | meaning |
| --- | --- |
| batch | prompt in the batch |
| pos | position of the token a vector belongs to (the query, in attention) |
| key_pos | position attended to; longer than ``pos`` when a key-value cache is in use |
| head | query head, ``cfg.n_heads`` of them |
| kv_head | key/value head, ``cfg.n_key_value_heads`` of them |
| d_head | width of one head |
| d_value | width of one head's values, where it is another than ``d_head`` |
| d_latent | width of the bottleneck of latent attention: one for queries, one for keys and values |
| d_all | all heads side by side, ``n_heads * d_head`` (norms over the full width of q or k) |
| d_model | width of the residual stream |
| d_embed | width of embeddings, or of the unembedding's input, where it is not ``d_model`` |
| d_mlp | neurons of an MLP |
| d_vocab | tokens of the vocabulary |
| expert | experts of a mixture |
| stream | residual streams side by side, where a model keeps several |
| patch | what a block works on that is no token: a patch of several, or more than the tokens |
| d_gate | width of a head's output gate: 1, or ``d_head`` |
| d_layer_input | what a token says to a single layer (Gemma 4) |
| choice | answers of a classifier |
| d_conv | channels of the convolutions that hear a waveform |
| 1 | kept, so that it broadcasts |
"""

AXES = (
    "batch",
    "pos",
    "key_pos",
    "head",
    "kv_head",
    "d_head",
    "d_value",
    "d_latent",
    "d_model",
    "d_embed",
    "d_all",
    "d_mlp",
    "d_vocab",
    "expert",
    "stream",
    "patch",
    "d_gate",
    "d_layer_input",
    "choice",
    "d_conv",
    "1",
)

STREAM = "batch pos d_model"
EMBEDDED = "batch pos d_embed"
SCALE = "batch pos 1"
QUERY = "batch pos head d_head"
GATE = "batch pos head d_gate"
KEY = "batch pos kv_head d_head"
VALUE = "batch pos kv_head d_value"
Z = "batch pos head d_value"
LATENT = "batch pos d_latent"
CROSS_KEY = "batch key_pos kv_head d_head"
SCORES = "batch head pos key_pos"
PER_HEAD = "batch pos head d_model"
PER_KV_HEAD = "batch pos kv_head d_model"
NEURONS = "batch pos d_mlp"
LOGITS = "batch pos d_vocab"
ROUTING = "batch pos expert"
LAYER_INPUT = "batch pos d_layer_input"
EXPERTS = "batch pos expert d_model"
EXPERT_NEURONS = "batch pos expert d_mlp"
FEATURES = "batch pos d_conv"
STREAMS = "batch pos stream d_model"
PATCHES = "batch patch d_model"


def split_axes(axes: str) -> tuple[str, ...]:
    """The axes of a declaration such as ``"batch pos d_model"``; ValueError on an unknown one."""
    names = tuple(axes.split())
    unknown = [name for name in names if name not in AXES]
    if unknown:
        raise ValueError(f"unknown axes {unknown}; the vocabulary is {AXES}")
    return names
