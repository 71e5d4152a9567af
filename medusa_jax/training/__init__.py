"""Training Medusa heads, alone (Medusa-1) or with their backbone (Medusa-2).

Modules, in the order in which a run passes through them:

    settings, config_file   the dataclasses that `configs/*.py` fill in, and their overrides
    mesh, workdir           devices, and where the run is kept
    dataset                 sources -> rows of token ids (`medusa_jax.data`)
    weights                 files -> parameters, part by part
    hidden_states           what a frozen backbone says of the rows, kept in files
    optimizer               learning rates by parameter, schedules
    scanned_backbone, lora  the forward pass over stacked layers, adapters beside it
    losses, head_losses, selector_loss
                            logits -> losses, ranks and weights
    heads_objective, objective
                            hidden states -> the loss of a training mode
    step                    what a step advances, and the compiled step
    setup                   state and step of a run, put together on its mesh
    loop, trainer           the run
    divergence, clock       when it has gone wrong, and how fast it is
    checkpoints, metrics, export    what a run leaves behind
    checksums, orbax_noise  how checkpoints are verified, and what orbax prints beside its errors
    aot                     the same step, compiled for devices that are not here

Nothing that decodes imports this package.
"""
