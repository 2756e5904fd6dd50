"""Exit policies: when a chunk leaves the encoder. Import them from `asr_exit.policy`. No torch in this package."""
