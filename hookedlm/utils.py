"""Everything that `transformer_lens.utils` has, under one roof. The code is elsewhere."""

from hookedlm.data import get_attention_mask as get_attention_mask
from hookedlm.data import get_dataset as get_dataset
from hookedlm.data import (
    get_input_with_manually_prepended_bos as get_input_with_manually_prepended_bos,
)
from hookedlm.data import get_tokenizer_with_bos as get_tokenizer_with_bos
from hookedlm.data import get_tokens_with_bos_removed as get_tokens_with_bos_removed
from hookedlm.data import keep_single_column as keep_single_column
from hookedlm.data import tokenize_and_concatenate as tokenize_and_concatenate
from hookedlm.factored_matrix import FactoredMatrix as FactoredMatrix
from hookedlm.hub import CACHE_DIR as CACHE_DIR
from hookedlm.hub import clear_huggingface_cache as clear_huggingface_cache
from hookedlm.hub import download_file_from_hf as download_file_from_hf
from hookedlm.layers.activations import ACTIVATION_FN_DICT as ACTIVATION_FN_DICT
from hookedlm.layers.activations import XIELU as XIELU
from hookedlm.layers.activations import gelu_tanh
from hookedlm.layers.activations import solu as solu
from hookedlm.layers.activations import xielu as xielu
from hookedlm.loading import default_device
from hookedlm.loss import lm_accuracy as lm_accuracy
from hookedlm.loss import lm_cross_entropy_loss as lm_cross_entropy_loss
from hookedlm.names import get_act_name as get_act_name
from hookedlm.prompts import LocallyOverridenDefaults as LocallyOverridenDefaults
from hookedlm.prompts import test_prompt as test_prompt
from hookedlm.sampling import sample_logits as sample_logits
from hookedlm.slices import Slice as Slice
from hookedlm.slices import SliceInput as SliceInput
from hookedlm.tensors import USE_DEFAULT_VALUE as USE_DEFAULT_VALUE
from hookedlm.tensors import calc_fan_in_and_fan_out as calc_fan_in_and_fan_out
from hookedlm.tensors import check_structure as check_structure
from hookedlm.tensors import composition_scores as composition_scores
from hookedlm.tensors import get_corner as get_corner
from hookedlm.tensors import get_cumsum_along_dim as get_cumsum_along_dim
from hookedlm.tensors import get_nested_attr as get_nested_attr
from hookedlm.tensors import get_offset_position_ids as get_offset_position_ids
from hookedlm.tensors import init_kaiming_normal_ as init_kaiming_normal_
from hookedlm.tensors import init_kaiming_uniform_ as init_kaiming_uniform_
from hookedlm.tensors import init_xavier_normal_ as init_xavier_normal_
from hookedlm.tensors import init_xavier_uniform_ as init_xavier_uniform_
from hookedlm.tensors import is_library_available as is_library_available
from hookedlm.tensors import is_lower_triangular as is_lower_triangular
from hookedlm.tensors import is_square as is_square
from hookedlm.tensors import override_or_use_default_value as override_or_use_default_value
from hookedlm.tensors import print_gpu_mem as print_gpu_mem
from hookedlm.tensors import remove_batch_dim as remove_batch_dim
from hookedlm.tensors import repeat_along_head_dimension as repeat_along_head_dimension
from hookedlm.tensors import select_compatible_kwargs as select_compatible_kwargs
from hookedlm.tensors import set_nested_attr as set_nested_attr
from hookedlm.tensors import to_numpy as to_numpy
from hookedlm.tensors import transpose as transpose
from hookedlm.tensors import warn_if_mps as warn_if_mps

gelu_new = gelu_fast = gelu_pytorch_tanh = gelu_tanh  # transformers' three names for one function
get_device = default_device
