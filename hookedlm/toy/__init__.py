"""Toy models: layers, initial weights and contexts from nothing but a config."""

from hookedlm.toy.build import Layers, build_layers
from hookedlm.toy.initial import init_weights
from hookedlm.toy.prepare import ToyPreparer

__all__ = ["Layers", "ToyPreparer", "build_layers", "init_weights"]
