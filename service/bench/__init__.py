"""Measurements behind the claims: speed per exit, streaming parity, depth switches, memory over hours."""
