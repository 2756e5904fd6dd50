"""Solving exit thresholds on held-out audio: observe, solve, replay in the engine, store with the model."""
