"""Benchmarks: `python -m medusa_jax.bench [prompts | steps | memory]`.

prompts    speed and acceptance over prompt sets, beside plain decoding and Hugging Face
steps      time of a step over the size of its tree
memory     bytes per device of prefill and steps, by the compiler of a machine that is not here

measure    which prompts are decoded by which system, and the timing of that; a run that was
           stopped goes on (`tuning.journal`)
peers      Hugging Face beside us
timing     the time of steps and of a prefill
synthetic  random weights of real shapes
summary    rates, ratios, acceptance, machine
report     Markdown and plots
output     the files of a report
"""
