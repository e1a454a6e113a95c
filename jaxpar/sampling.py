"""How the next token is chosen from the logits."""

from __future__ import annotations

from dataclasses import dataclass

from jaxpar.errors import UserError
from jaxpar.models.lazy import jax, jnp


@dataclass(frozen=True)
class Sampler:
    """Temperature, then top-k, top-p and min-p, each on what the one before left (the order of `transformers`).

    Attributes:
      temperature: divides the logits; 0 takes the most probable token (greedy).
      top_k: keep the k most probable tokens. None: all.
      top_p: keep the smallest set of most probable tokens whose probabilities sum to at least p (Holtzman et al.
        2019). None: all.
      min_p: keep tokens at least this times as probable as the most probable one (Nguyen et al. 2024). None: all.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None

    def __post_init__(self):
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"temperature = {self.temperature} must be a finite number of at least 0 (0 is greedy)")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k = {self.top_k} must be at least 1; leave it out to keep all tokens")
        for name in ("top_p", "min_p"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise UserError(f"{name} = {value} is outside (0, 1]; leave it out to keep all tokens")
        if self.temperature == 0 and (self.top_k or self.top_p or self.min_p):
            raise UserError(
                "top_k, top_p and min_p choose among tokens that are drawn at random, but temperature = 0 is greedy; "
                "set a temperature, for example 0.8"
            )

    def filtered(self, logits_BxV):
        """float32 logits after temperature and cuts; tokens that were cut are -inf. Needs temperature > 0."""
        logits = logits_BxV.astype(jnp.float32) / self.temperature
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            kth = jax.lax.top_k(logits, self.top_k)[0][:, -1:]
            logits = jnp.where(logits < kth, -jnp.inf, logits)
        if self.top_p is not None and self.top_p < 1:
            order = jnp.argsort(-logits, axis=-1)
            probs = jax.nn.softmax(jnp.take_along_axis(logits, order, axis=-1), axis=-1)
            # A token stays while those before it have less than p together: the first one always does.
            keep_sorted = jnp.cumsum(probs, axis=-1) - probs < self.top_p
            keep = jnp.take_along_axis(keep_sorted, jnp.argsort(order, axis=-1), axis=-1)
            logits = jnp.where(keep, logits, -jnp.inf)
        if self.min_p is not None:
            probs = jax.nn.softmax(logits, axis=-1)
            logits = jnp.where(probs < self.min_p * probs.max(-1, keepdims=True), -jnp.inf, logits)
        return logits

    def __call__(self, keys_B, logits_BxV):
        """One key a row, logits [B, V] -> int32 [B]."""
        if self.temperature == 0:
            return jnp.argmax(logits_BxV, axis=-1).astype(jnp.int32)
        return jax.vmap(jax.random.categorical)(keys_B, self.filtered(logits_BxV)).astype(jnp.int32)
