"""Where a stack of all layers holds the parameters of each."""

from medusa_jax.model.layer_stack import members, place


def test_places_of_layers_in_the_stack():
    assert place("layer_3/mlp/up/weight") == ("layers/mlp/up/weight", 3)
    assert place("lm_head") == ("lm_head", None)
    assert members("layers/mlp/up/weight", 2) == [
        "layer_0/mlp/up/weight",
        "layer_1/mlp/up/weight",
    ]
    assert members("embed/embedding", 2) == ["embed/embedding"]
