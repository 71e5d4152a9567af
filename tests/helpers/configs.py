"""Settings as `config.json` has them, to read and to spoil."""

# All values differ, so that no two fields can be swapped unnoticed.
BASE = {
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 40,
    "max_position_embeddings": 128,
}
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.5,
    "high_freq_factor": 4.5,
    "original_max_position_embeddings": 32,
}
