"""What others have for the ops of `bench/kernels.py`: JAX's TPU kernels, tokamax, PyTorch on the same device."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from jaxpar.pallas_kernels.tuning.timing import MOST_TURNS


def attention(*, heads: int, tokens: int, scale: float, causal: bool, window: int | None) -> dict[str, Callable | str]:
    """Functions of q [B, T, H, K], k and v [B, T, G, K], by name; or why there is none here."""
    if jax.default_backend() == "tpu":
        first = splash(heads=heads, tokens=tokens, scale=scale, causal=causal, window=window)
    else:
        first = f"runs on TPUs, and here is a {jax.devices()[0].device_kind}"
    if importlib.util.find_spec("tokamax") is None:
        second = "tokamax is not installed"
    else:

        def second(q, k, v):
            import tokamax

            more = {} if window is None else {"local_window_size": (window - 1, 0)}
            return tokamax.dot_product_attention(q, k, v, scale=scale, is_causal=causal, **more)

    return {"JAX splash": first, "tokamax": second}


def decode(dtype: str, *, scale: float) -> dict[str, Callable | Torch | str]:
    """Functions of q [B, 1, H, K], k and v [B, S, G, K] and lengths, which are S: others take whole caches best."""
    if jax.default_backend() == "gpu":
        cudnn = lambda q, k, v, lens: jax.nn.dot_product_attention(q, k, v, scale=scale, implementation="cudnn")
    else:
        cudnn = f"runs on NVIDIA GPUs, and here is a {jax.devices()[0].device_kind}"
    sdpa = torch_attention(dtype, scale=scale, causal=False, window=None, back=False)
    if isinstance(sdpa, Torch):
        build = sdpa.build
        sdpa = Torch(lambda arrays: build(arrays[:3]))
    return {"cudnn": cudnn, "torch SDPA": sdpa}


def splash(*, heads: int, tokens: int, scale: float, causal: bool, window: int | None, interpret=False) -> Callable:
    """`jax.experimental.pallas.ops.tpu.splash_attention`, with the block sizes that it takes itself."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    shape = tokens, tokens
    if window is not None:
        one = masks.LocalMask(shape, (window - 1, 0), 0)
    else:
        one = masks.CausalMask(shape) if causal else masks.FullMask(shape)

    def run(q, k, v):
        call = kernel.make_splash_mha(
            mask=masks.MultiHeadMask([one] * heads), head_shards=1, q_seq_shards=1, interpret=interpret
        )
        q = (q.astype(jnp.float32) * scale).astype(q.dtype)  # it scales nothing
        turned = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
        return jnp.swapaxes(jax.vmap(call)(*turned), 1, 2)

    return run


@dataclass(frozen=True)
class Torch:
    """A function of PyTorch, which has a clock of its own.

    Attributes:
      build: `(arrays) -> function without arguments`, which gives its outputs.
    """

    build: Callable[[tuple], Callable]


class TorchSampler:
    """As `tuning.timing.Sampler`, of a function without arguments.

    Args:
      shortest: seconds that a sample shall take at least.
    """

    method = "torch"

    def __init__(self, run: Callable, *, shortest: float):
        import torch

        self._run, self._cuda = run, torch.cuda.is_available()
        self.turns = 1
        start = time.perf_counter()
        self._outs = run()
        self._several()
        self.compile_s = time.perf_counter() - start
        while self.turns < MOST_TURNS and self._several() < shortest:
            self.turns *= 2

    def sample(self) -> float:
        return self._several() / self.turns

    def output(self):
        outs = self._outs if isinstance(self._outs, tuple) else (self._outs,)
        found = tuple(x.detach().float().cpu().numpy() for x in outs)
        return found if isinstance(self._outs, tuple) else found[0]

    def _several(self) -> float:
        import torch

        if not self._cuda:
            start = time.perf_counter()
            for _ in range(self.turns):
                self._run()
            return time.perf_counter() - start
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(self.turns):
            self._run()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) * 1e-3


def torch_attention(dtype: str, *, scale: float, causal: bool, window: int | None, back: bool) -> Torch | str:
    """`scaled_dot_product_attention` of the same arrays, heads in front as it wants them."""
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed (extra bench)"
    if window is not None:
        return "takes a window as a dense mask only"
    import torch

    here = jax.default_backend()
    if here not in ("cpu", "gpu") or (here == "gpu") != torch.cuda.is_available():
        return f"PyTorch does not use the {jax.devices()[0].device_kind} that JAX uses"

    def build(arrays):
        device = "cuda" if here == "gpu" else "cpu"
        turn = lambda x: torch.tensor(np.asarray(x, np.float32)).to(device, getattr(torch, dtype)).transpose(1, 2)
        q, k, v, *rest = (turn(x).contiguous() for x in arrays)
        grouped = {} if q.shape[1] == k.shape[1] else {"enable_gqa": True}
        call = lambda: torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=causal, scale=scale, **grouped
        )
        if not back:
            return lambda: call().transpose(1, 2)
        for x in (q, k, v):
            x.requires_grad_()

        def both():
            out = call()
            found = (out, *torch.autograd.grad(out, (q, k, v), rest[0]))
            return tuple(x.transpose(1, 2) for x in found)

        return both

    return Torch(build)
