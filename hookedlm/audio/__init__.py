"""Speech encoders: HuBERT and wav2vec 2.0 as one instrumented model."""

from hookedlm.audio.model import HookedAudioEncoder as HookedAudioEncoder
