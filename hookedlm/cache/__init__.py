"""`ActivationCache`: the activations of one pass, and the residual-stream algebra on them.

The stream is a sum of what each part wrote. Norms are linear once their scale is held fixed, so a
logit is a sum over parts too; every method here is built so that its parts add up to the whole,
on every family. Source of the view: "A Mathematical Framework for Transformer Circuits" (2021).
"""

from __future__ import annotations

from hookedlm.cache.components import ComponentMethods
from hookedlm.cache.files import FileMethods


class ActivationCache(ComponentMethods, FileMethods):
    """A dictionary of activations that knows its model.

    Keys: a full name, a shorthand (``"k6"``, ``"pattern3"``), or a tuple ``("resid_pre", 3)``,
    ``("scale", 3, "ln1")``; negative layers count from the end. ``has_batch_dim`` says whether the
    tensors still have their batch axis.

    A norm can be applied in two ways. ``"frozen"``: linear, with the scale it had in this run, so
    that parts keep adding up (attribution). ``"recompute"``: each tensor by its own statistics, as
    the model would norm it if it were the stream (logit lens).
    """
