"""The transformer itself: torch only, no Hugging Face. Options were spent while building."""
