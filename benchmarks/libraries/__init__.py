"""One file for each library: how it does the tasks, in the way its documentation shows."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Entry:
    """``file``: the module of this package; ``statement``: what a user writes to import it."""

    title: str
    file: str
    statement: str


LIBRARIES = {
    "hookedlm": Entry("hookedlm", "hooked", "import hookedlm"),
    "transformers": Entry(
        "transformers", "plain", "import torch; from transformers import AutoModelForCausalLM"
    ),
    "transformer_lens_4": Entry(
        "TransformerLens 4", "lens_4", "from transformer_lens.model_bridge import TransformerBridge"
    ),
    "transformer_lens_2": Entry(
        "TransformerLens 2", "lens_2", "from transformer_lens import HookedTransformer"
    ),
    "nnsight": Entry("nnsight", "sight", "from nnsight import LanguageModel"),
    "pyvene": Entry("pyvene", "vene", "import pyvene"),
}
