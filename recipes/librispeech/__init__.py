"""From LibriSpeech-like folders to a trained early-exit model."""
