"""TransformerLens 2.x' names and module paths; every object is hookedlm's own.

``hookedlm.install_as("transformer_lens")`` makes unchanged code import this. Its modules are made
from the table in `paths`; nothing is defined here.
"""

import sys

from hookedlm import evals as evals
from hookedlm import head_detector as head_detector
from hookedlm import patching as patching
from hookedlm import train as train
from hookedlm import utils as utils
from hookedlm.audio import HookedAudioEncoder as HookedAudioEncoder
from hookedlm.cache import ActivationCache as ActivationCache
from hookedlm.config import HookedTransformerConfig as HookedTransformerConfig
from hookedlm.encoder import BertNextSentencePrediction as BertNextSentencePrediction
from hookedlm.encoder import HookedEncoder as HookedEncoder
from hookedlm.encoder_decoder import HookedEncoderDecoder as HookedEncoderDecoder
from hookedlm.factored_matrix import FactoredMatrix as FactoredMatrix
from hookedlm.install import make_modules as _make_modules
from hookedlm.model import HookedTransformer as HookedTransformer
from hookedlm.past_key_values import (
    HookedTransformerKeyValueCache as HookedTransformerKeyValueCache,
)
from hookedlm.past_key_values import (
    HookedTransformerKeyValueCacheEntry as HookedTransformerKeyValueCacheEntry,
)
from hookedlm.svd_interpreter import SVDInterpreter as SVDInterpreter
from hookedlm.transformer_lens.paths import ABSENT, MODULES

EasyTransformer = HookedTransformer
EasyTransformerConfig = HookedTransformerConfig
EasyTransformerKeyValueCache = HookedTransformerKeyValueCache
EasyTransformerKeyValueCacheEntry = HookedTransformerKeyValueCacheEntry

_make_modules(sys.modules[__name__], MODULES, ABSENT)
