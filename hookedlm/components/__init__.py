"""The parts of a model as classes of their own: built from a config, asked about with `isinstance`.

A loaded model is made of a few layer classes, whose options were spent while building. The classes
here carry TransformerLens' names and constructors: ``MLP(cfg)`` is a new layer with weights drawn
as the config says, a subclass of the layer that models are made of, so that it can stand in one.
``isinstance(model.blocks[0].ln1, LayerNormPre)`` answers by what the layer does.
"""

from hookedlm.components.attention import AbstractAttention as AbstractAttention
from hookedlm.components.attention import Attention as Attention
from hookedlm.components.attention import GroupedQueryAttention as GroupedQueryAttention
from hookedlm.components.bert import BertBlock as BertBlock
from hookedlm.components.bert import BertEmbed as BertEmbed
from hookedlm.components.bert import BertMLMHead as BertMLMHead
from hookedlm.components.bert import BertNSPHead as BertNSPHead
from hookedlm.components.bert import BertPooler as BertPooler
from hookedlm.components.bert import TokenTypeEmbed as TokenTypeEmbed
from hookedlm.components.block import TransformerBlock as TransformerBlock
from hookedlm.components.pointwise import MLP as MLP
from hookedlm.components.pointwise import ActivationFunctionFactory as ActivationFunctionFactory
from hookedlm.components.pointwise import Embed as Embed
from hookedlm.components.pointwise import GatedMLP as GatedMLP
from hookedlm.components.pointwise import LayerNorm as LayerNorm
from hookedlm.components.pointwise import LayerNormPre as LayerNormPre
from hookedlm.components.pointwise import MLPFactory as MLPFactory
from hookedlm.components.pointwise import MoE as MoE
from hookedlm.components.pointwise import PosEmbed as PosEmbed
from hookedlm.components.pointwise import RMSNorm as RMSNorm
from hookedlm.components.pointwise import RMSNormPre as RMSNormPre
from hookedlm.components.pointwise import Unembed as Unembed
from hookedlm.components.t5 import T5Attention as T5Attention
from hookedlm.components.t5 import T5Block as T5Block
