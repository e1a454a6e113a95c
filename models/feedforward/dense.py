"""Dense feed-forward layers: gated (SwiGLU, GeGLU) and plain (GELU)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jaxpar.models.feedforward.base import FeedForwardLayer
from jaxpar.models.lazy import jax
from jaxpar.models.spec import Constant, Normal, ParamSpec

Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]


def activate(name: Activation, x):
    """An activation by its name. The backward pass keeps its input alone, and does what follows from it again: that fuses with
    what reads it, and a place to keep it would be as large as the hidden layer."""
    return jax.checkpoint(_activate, static_argnums=0, prevent_cse=False)(name, x)


def _activate(name: Activation, x):
    match name:
        case "silu":
            return jax.nn.silu(x)
        case "gelu":
            return jax.nn.gelu(x, approximate=False)
        case "gelu_tanh":
            return jax.nn.gelu(x, approximate=True)
        case "relu":
            return jax.nn.relu(x)


def _linear(cfg, inputs: int, outputs: int, axes: tuple[str, str], std: float, bias: bool) -> dict:
    specs = {"kernel": ParamSpec((inputs, outputs), axes, Normal(std))}
    if bias:
        specs["bias"] = ParamSpec((outputs,), (axes[1] if axes[1] == "mlp" else "norm",), Constant(0.0), decay=False)
    return specs


def _columns(ops, params: dict, names: tuple[str, ...], x) -> list:
    products = ops.columns(x, [params[name]["kernel"] for name in names])
    return [_biased(params[name], y) for name, y in zip(names, products, strict=True)]


def _biased(params: dict, y):
    return y + params["bias"].astype(y.dtype)[None, None] if "bias" in params else y


@dataclass(frozen=True)
class GatedMLP(FeedForwardLayer):
    """`down(activation(gate(x)) · up(x))`: SwiGLU with "silu", GeGLU with a "gelu" (Shazeer 2020, eq. 6).

    Attributes:
      activation: the gate's non-linearity.
      bias: whether the three projections have biases.
    """

    activation: Activation = "silu"
    bias: bool = False

    def spec(self, cfg) -> dict:
        out_std = cfg.init_std / (2 * cfg.layers) ** 0.5
        return {
            "gate": _linear(cfg, cfg.width, cfg.hidden, ("embed", "mlp"), cfg.init_std, self.bias),
            "up": _linear(cfg, cfg.width, cfg.hidden, ("embed", "mlp"), cfg.init_std, self.bias),
            "down": _linear(cfg, cfg.hidden, cfg.width, ("mlp", "embed"), out_std, self.bias),
        }

    def apply(self, cfg, params: dict, x_BxSxD, ops):
        gate_BxTxF, up_BxTxF = _columns(ops, params, ("gate", "up"), x_BxSxD)
        gated = jax.checkpoint(lambda gate, up: _activate(self.activation, gate) * up, prevent_cse=False)
        h_BxTxF = gated(gate_BxTxF, up_BxTxF)
        h_BxTxF = ops.constrain(h_BxTxF, ("batch", "length", "mlp"))
        return _biased(params["down"], ops.row(h_BxTxF, params["down"]["kernel"]))

    def flops(self, cfg) -> int:
        """Forward matmul FLOPs for one token of one layer."""
        return 2 * 3 * cfg.width * cfg.hidden


@dataclass(frozen=True)
class MLP(FeedForwardLayer):
    """`down(activation(up(x)))` (GPT-2).

    Attributes:
      activation: the non-linearity.
      bias: whether the two projections have biases.
    """

    activation: Activation = "gelu_tanh"
    bias: bool = True

    def spec(self, cfg) -> dict:
        out_std = cfg.init_std / (2 * cfg.layers) ** 0.5
        return {
            "up": _linear(cfg, cfg.width, cfg.hidden, ("embed", "mlp"), cfg.init_std, self.bias),
            "down": _linear(cfg, cfg.hidden, cfg.width, ("mlp", "embed"), out_std, self.bias),
        }

    def apply(self, cfg, params: dict, x_BxSxD, ops):
        (up_BxTxF,) = _columns(ops, params, ("up",), x_BxSxD)
        h_BxTxF = activate(self.activation, up_BxTxF)
        h_BxTxF = ops.constrain(h_BxTxF, ("batch", "length", "mlp"))
        return _biased(params["down"], ops.row(h_BxTxF, params["down"]["kernel"]))

    def flops(self, cfg) -> int:
        """Forward matmul FLOPs for one token of one layer."""
        return 2 * 2 * cfg.width * cfg.hidden
