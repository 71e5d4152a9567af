"""HTTP: OpenAI's interface to an engine that decodes many requests together."""
