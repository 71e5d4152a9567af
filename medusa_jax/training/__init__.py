"""Training Medusa heads, alone (Medusa-1) or with their backbone (Medusa-2).

Modules, in the order in which a conversation passes through them:

    settings, config_file   what a run is: dataclasses that `configs/*.py` fill in
    corpus      files and hub datasets -> documents
    encoding    documents -> token ids, and which of them are learnt
    packing     many documents -> rows of one length
    batches     rows -> global batches, step by step
    rows        all of that for one run
    stack       the backbone as a loop over stacked layers
    lora        low-rank adapters beside its projections
    losses      hidden states -> cross-entropies, KL, accuracies, in chunks
    objective   one batch -> the loss of a training mode
    optimizer   which parameter learns at which rate
    sharding    which device holds what
    weights     files -> parameters, part by part
    state       what a step advances, and the step
    program     both of a run, put together on its mesh
    checkpoints, metrics, export    what a run leaves behind
    loop, trainer                   the run
    compile_only                    the same step for a TPU that is not here

Nothing that decodes imports this package.
"""
