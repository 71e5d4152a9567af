"""The backbone: tokens to hidden states and logits."""
