"""The living copy of a data-parallel replica."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from jaxpar.errors import UserError
from jaxpar.models.lazy import jax, jnp
from jaxpar.recovery import lost
from jaxpar.recovery.base import Recovered, Recovery, Stages, state_bytes

Tree = Any


@dataclass(frozen=True)
class ReplicaPeer(Recovery):
    """Bring a stage back, bitwise, from the same stage of another data-parallel replica.

    The mesh's data axis has R replicas, whose states are equal. A failure here takes a stage of one of them: that of
    replica (step + stage) mod R. It is destroyed on that replica's devices alone, and each leaf is fetched from the next
    replica along the axis, one permute. The state of all other strategies is lost on every replica at once.
    """

    exact: ClassVar[bool] = True
    ends: ClassVar[bool] = True

    def recoverable(self, failed_S):
        return failed_S

    def check_mesh(self, stages: Stages) -> None:
        """Raises UserError where no replica has a peer."""
        if _replicas(stages) < 2:
            raise UserError(
                "replica-peer needs a data-parallel replica to copy from, and the mesh's data axis has 1; give --mesh "
                "data=2 or more, or choose another strategy"
            )

    def destroy(self, state, failed_S, stages: Stages):
        return self._on_each(state, failed_S, stages, lambda x, gone: jnp.where(gone, lost.poison(x), x))

    def recover(self, rec: Tree, state, failed_S, stages: Stages) -> Recovered:
        count = _replicas(stages)
        ring = [((r + 1) % count, r) for r in range(count)]
        fetch = lambda x, gone: jnp.where(gone, jax.lax.ppermute(x, "data", ring), x)
        state = self._on_each(state, failed_S, stages, fetch)
        return self.found(state, failed_S, stages)

    def _on_each(self, state, failed_S, stages: Stages, change):
        """`change(leaf, lost)` on each device, for leaves that live on stages; `lost` broadcasts to the device's shard."""
        from jax.sharding import PartitionSpec

        from jaxpar.parallel.rules import shardings
        from jaxpar.state import state_specs

        self.check_mesh(stages)
        tree, count = lost.parts(state), _replicas(stages)
        where = lost.labels(tree, stages.specs)
        places = jax.tree.map(lambda s: s.spec, shardings(state_specs(tree, stages.specs), stages.mesh, stages.rules))
        stage_S = jnp.arange(stages.count)
        # float32 [R, L] and [R, 2]: a row for each replica.
        mine = lambda r: failed_S & ((state.step + stage_S) % count == r)
        lost_RxL = jnp.stack([stages.spread(mine(r)) for r in range(count)])
        ends_Rx2 = jnp.stack([mine(r)[jnp.array([0, stages.count - 1])] for r in range(count)])

        def one(x, label, place):
            if label == "":
                return x
            # A layer's flag is cut like the layer, so that each device has the flags of what it holds.
            flags, spec = (
                (lost_RxL, PartitionSpec("data", place[0]))
                if label == "layers"
                else (ends_Rx2[:, 0 if label == "first" else 1], PartitionSpec("data"))
            )

            @partial(jax.shard_map, mesh=stages.mesh, in_specs=(place, spec), out_specs=place, check_vma=False)
            def local(x, flag):
                gone = lost.by_layer(flag[0], x) if label == "layers" else flag[0]
                return change(x, gone)

            return local(x, flags)

        return state.replace(**jax.tree.map(one, tree, where, places))

    def moved(self, stages: Stages, state) -> list[float]:
        from jaxpar.recovery.replicas import end_bytes

        moved = [state_bytes(state, stages) / stages.count] * stages.count
        moved[0] += end_bytes(state, "first", stages)
        moved[-1] += end_bytes(state, "last", stages)
        return moved


def _replicas(stages: Stages) -> int:
    return 1 if stages.mesh is None else stages.mesh.shape["data"]
