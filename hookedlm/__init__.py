"""Hugging Face causal language models as one uniform transformer with a hook point everywhere."""

__version__ = "0.1.0"

from hookedlm.audio import HookedAudioEncoder as HookedAudioEncoder
from hookedlm.cache import ActivationCache as ActivationCache
from hookedlm.config import HookedTransformerConfig as HookedTransformerConfig
from hookedlm.encoder import HookedEncoder as HookedEncoder
from hookedlm.encoder_decoder import HookedEncoderDecoder as HookedEncoderDecoder
from hookedlm.factored_matrix import FactoredMatrix as FactoredMatrix
from hookedlm.families import Row as Row
from hookedlm.hooks import HookPoint as HookPoint
from hookedlm.install import install_as as install_as
from hookedlm.load import guess_templates as guess_templates
from hookedlm.load import load as load
from hookedlm.load import load_demo as load_demo
from hookedlm.model import HookedTransformer as HookedTransformer
from hookedlm.names import get_act_name as get_act_name
from hookedlm.root import HookedRootModule as HookedRootModule
from hookedlm.shards import ActivationShards as ActivationShards
from hookedlm.shards import open_stream as open_stream
from hookedlm.slices import Slice as Slice
from hookedlm.svd_interpreter import SVDInterpreter as SVDInterpreter
