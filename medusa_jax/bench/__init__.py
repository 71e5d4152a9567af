"""Speed and acceptance: `python -m medusa_jax.bench`.

runs            what is decoded with which system, and its timing
peers           Hugging Face beside us
figures         rates, ratios, acceptance, machine
report          Markdown and plots
random_weights  the step of shapes whose weights are not at hand
"""
