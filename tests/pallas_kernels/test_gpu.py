"""How Mosaic GPU kernels are called (`jaxpar.pallas_kernels.gpu`), apart from what the kernels' own tests see of it."""

import jax
import jax.numpy as jnp
import pytest

from jaxpar.pallas_kernels import gpu

pytestmark = pytest.mark.quick


def test_more_warpgroups_than_the_interpreter_has_threads_are_refused():
    """It would hang, not fail: before anything is traced there is a sentence."""

    def body(*_):
        raise AssertionError("traced")

    outs = [jax.ShapeDtypeStruct((128,), jnp.float32)]
    call = dict(grid={"block": 1}, interpret=True, name="many")
    with pytest.raises(ValueError, match=r"many has 1000000 warpgroups in .*device_count=1000000") as found:
        gpu.kernel(body, outs, warpgroups=10**6, **call)
    assert "\n" not in str(found.value)
