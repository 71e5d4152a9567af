"""Drafters: from a hidden state to the tree of guesses that a step verifies."""
