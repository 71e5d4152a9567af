"""Speed and acceptance: `python -m medusa_jax.bench`.

measure     what is decoded with which system, and its timing
peers       Hugging Face beside us
summary     rates, ratios, acceptance, machine
report      Markdown and plots
synthetic   steps of shapes whose weights are not at hand
aot         the same, compiled for devices that are not here
"""
