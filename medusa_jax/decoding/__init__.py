"""Decoding on token ids: prefill, step, acceptance."""
