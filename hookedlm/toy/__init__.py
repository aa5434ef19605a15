"""Toy models: layers, initial weights and contexts from nothing but a config."""

from hookedlm.toy.build import LayerMaker, Layers, build_layers
from hookedlm.toy.initial import init_weights
from hookedlm.toy.prepare import ToyPreparer

__all__ = ["LayerMaker", "Layers", "ToyPreparer", "build_layers", "init_weights"]
