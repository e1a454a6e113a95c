"""A tree with every kind of parameter that a decoder has, small and built by hand: the tests here are about rules."""

from jaxpar.models.spec import Constant, Normal, ParamSpec, stack


def tree(layers=2, width=32, heads=4, kv_heads=2, head_size=5, hidden=24, vocabulary=40, context=7):
    """Odd sizes (head size, context) where nothing is sharded."""

    def kernel(shape, axes):
        return ParamSpec(shape, axes, Normal(0.02))

    def norm(size, value=1.0):
        return ParamSpec((size,), ("norm",), Constant(value), decay=False)

    layer = {
        "attention": {
            "norm": {"scale": norm(width), "bias": norm(width, 0.0)},
            "query": {
                "kernel": kernel((width, heads, head_size), ("embed", "heads", "head_size")),
                "bias": ParamSpec((heads, head_size), ("heads", "head_size"), Constant(0.0), decay=False),
            },
            "key": {"kernel": kernel((width, kv_heads, head_size), ("embed", "kv_heads", "head_size"))},
            "value": {"kernel": kernel((width, kv_heads, head_size), ("embed", "kv_heads", "head_size"))},
            "query_norm": {"scale": norm(head_size)},
            "out": {"kernel": kernel((heads, head_size, width), ("heads", "head_size", "embed"))},
        },
        "feedforward": {
            "norm": {"scale": norm(width)},
            "gate": {"kernel": kernel((width, hidden), ("embed", "mlp"))},
            "up": {"kernel": kernel((width, hidden), ("embed", "mlp"))},
            "down": {"kernel": kernel((hidden, width), ("mlp", "embed"))},
        },
    }
    return {
        "embedding": {
            "tokens": kernel((vocabulary, width), ("vocabulary", "embed")),
            "positions": kernel((context, width), (None, "embed")),
        },
        "layers": stack(layer, layers),
        "head": {
            "norm": {"scale": norm(width)},
            "unembed": {"kernel": kernel((width, vocabulary), ("embed", "vocabulary"))},
        },
    }
