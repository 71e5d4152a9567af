"""Prompts to answers, many at a time."""
