"""Encoder-decoders: T5 and BART as one instrumented model."""

from hookedlm.encoder_decoder.model import HookedEncoderDecoder as HookedEncoderDecoder
