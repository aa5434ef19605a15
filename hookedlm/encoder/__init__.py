"""Encoders: BERT as one instrumented model, and its question about pairs of sentences."""

from hookedlm.encoder.model import HookedEncoder as HookedEncoder
from hookedlm.encoder.next_sentence import (
    BertNextSentencePrediction as BertNextSentencePrediction,
)
