"""What each thread of a warpgroup does in `gpu_registers`, run by NumPy for all 128 at once: no interpreter has registers."""

import re
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from jaxpar.pallas_kernels.matmul import gpu_registers

pytestmark = pytest.mark.quick
THREADS = np.arange(128, dtype=np.int64)
WARP, GROUP, LANE = THREADS // 32, THREADS % 32 // 4, THREADS % 4
"""Where the matrix instruction's registers have a thread: rows 16 · WARP + GROUP (+ 8), columns 2 · LANE (+ 1)."""


class Machine:
    """Shared and global memory, and the operations on numbers that `gpu_registers` writes into a kernel.

    Attributes:
      reads: addresses of words, of each instruction that reads them.
      sent: numbers by block · 2²⁰ + address.
    """

    def __init__(self, monkeypatch):
        self.memory, self.sent, self.reads = {}, {}, []
        pair = lambda operation: lambda a, b: operation(np.int64(a), np.int64(b)) & 0xFFFFFFFF
        arith = SimpleNamespace(
            **{
                name: pair(one)
                for name, one in dict(
                    addi=np.add, andi=np.bitwise_and, ori=np.bitwise_or, xori=np.bitwise_xor, muli=np.multiply,
                    shli=np.left_shift, shrui=np.right_shift, divui=np.floor_divide, remui=np.remainder,
                ).items()
            },
            extui=lambda kind, x: x,
        )  # fmt: skip
        utils = SimpleNamespace(
            c=lambda value, kind: value,
            thread_idx=lambda: THREADS,
            memref_ptr=lambda ref: ref.name,
            getelementptr=lambda name, offsets, kind: (name, offsets[0]),
            bitcast=lambda x, kind: SimpleNamespace(threads=x),
            vector_slice=lambda x, some: SimpleNamespace(threads=x[:, some]),
        )
        llvm = SimpleNamespace(load=self.load, ptrtoint=lambda kind, name: 0, extractelement=lambda x, e: x[:, e])
        one = lambda *_: None
        ir = SimpleNamespace(
            IntegerType=SimpleNamespace(get_signless=lambda bits: bits),
            VectorType=SimpleNamespace(get=lambda shape, kind: ("vector", shape[0])),
            BF16Type=SimpleNamespace(get=one),
            F32Type=SimpleNamespace(get=one),
            MemRefType=lambda kind: SimpleNamespace(get_strides_and_offset=lambda: (kind, 0)),
        )
        for name, fake in dict(arith=arith, utils=utils, llvm=llvm, ir=ir, _asm=self.asm).items():
            monkeypatch.setattr(gpu_registers, name, fake)
        array = lambda _registers, _layout, _is_signed: _registers
        monkeypatch.setattr(gpu_registers, "mgpu", SimpleNamespace(FragmentedArray=array))
        run = lambda **_: lambda function: lambda *refs: function(None, *refs)
        fake = SimpleNamespace(
            **{n: getattr(gpu_registers.plgpu, n) for n in ("Layout", "ShapeDtypeStruct", "RefType")}
        )
        fake.inline_mgpu = run
        monkeypatch.setattr(gpu_registers, "plgpu", fake)

    def ref(self, name: str, array, **more):
        self.memory[name] = np.ascontiguousarray(array).view(np.uint8).reshape(-1)
        return SimpleNamespace(name=name, **more)

    def load(self, kind, where):
        name, start = where
        self.reads.append(start)
        size = 4 if kind == 32 else 16
        got = self.memory[name][start[:, None] + np.arange(size)]
        return got.view(np.uint32)[:, 0].astype(np.int64) if kind == 32 else got.view(np.float32)

    def asm(self, text, constraints, *args, effects=False):
        del constraints, effects
        if text.startswith("prmt"):
            a, b, selector = args
            both = np.stack([np.asarray(x) >> 8 * n & 255 for x in (a, b) for n in range(4)])
            digits = [selector >> 4 * n & 15 for n in range(4)]
            byte = lambda digit: (both[digit & 7] >> 7) * 255 if digit & 8 else both[digit]
            return sum(byte(digit) << 8 * n for n, digit in enumerate(digits))
        if text.startswith("fma.rn.bf16x2"):
            part = lambda x, n: ((np.asarray(x) >> 16 * n & 0xFFFF) << 16).astype(np.uint32).view(np.float32)
            exact = lambda a, b, c: a.astype(np.float64) * b + c
            return np.stack(np.broadcast_arrays(*(exact(*(part(x, n) for x in args)) for n in (0, 1))), -1)
        if text.startswith("mapa"):
            return args[1] * 2**20 + args[0]
        if text.startswith("st.shared::cluster"):
            for n, value in enumerate(args[1:]):
                self.sent.update(zip((args[0] + 4 * n).tolist(), value.tolist(), strict=True))
            return None
        assert re.search("cp.async.cg.shared.global", text)
        to, start, row, there = args
        for a, b, here in zip(to, start, row < there, strict=True):
            if here:
                self.memory["tile"][a : a + 16] = self.memory["x"][b : b + 16]
        return None


def swizzled(rows):
    """[..., rows, 128 bytes] as they lie in the pattern of 128 bytes."""
    out = np.empty_like(rows)
    for row in range(rows.shape[-2]):
        for chunk in range(8):
            place = chunk ^ row % 8
            out[..., row, 16 * place : 16 * place + 16] = rows[..., row, 16 * chunk : 16 * chunk + 16]
    return out


@pytest.mark.parametrize("bits", [4, 8])
def test_threads_have_the_weights_that_the_matrix_unit_takes_for_theirs(bits, monkeypatch):
    codes = np.random.default_rng(0).integers(0, 256, (128 * bits // 8, 128)).astype(np.uint8)
    said = [gpu_registers.operand(bits, n, jnp.asarray(codes.view(np.int8)), interpret=True) for n in (0, 1)]
    machine = Machine(monkeypatch)
    ref = machine.ref("codes", swizzled(codes))
    for half in (0, 1):
        for registers, expected in zip(gpu_registers.operand(bits, half, ref), said[half], strict=True):
            # In the order that the instruction takes them: along K eight by eight, then the rows below.
            found = registers.reshape(8, 2)
            for piece in range(8):
                for below in range(2):
                    for e in range(2):
                        wanted = np.asarray(expected, np.float32)[
                            16 * WARP + 8 * below + GROUP, 8 * piece + 2 * LANE + e
                        ]
                        np.testing.assert_array_equal(found[piece, below].threads[:, e], wanted)
    for start in machine.reads:
        for warp in range(4):
            assert len(set((start[warp == WARP] // 4 % 32).tolist())) == 32


@pytest.mark.parametrize("bits", [4, 8])
def test_scales_and_sums_belong_to_the_same_columns(bits, monkeypatch):
    rng = np.random.default_rng(0)
    scales, sums = rng.standard_normal(128).astype(np.float32), rng.standard_normal((16, 128)).astype(np.float32)
    rows = np.asarray(gpu_registers._products(bits, jnp.asarray(scales)))
    products = np.asarray(gpu_registers._products(bits, jnp.asarray(sums.T)))
    machine = Machine(monkeypatch)
    for found, expected in zip(gpu_registers.scales(bits, machine.ref("scales", scales)), rows, strict=True):
        for below, register in enumerate(found.flat):
            np.testing.assert_array_equal(register.threads[:, 0], expected[16 * WARP + 8 * below + GROUP])
    parts = []
    for one in products:
        registers = np.empty((2, 2), object)
        for eight, below in np.ndindex(2, 2):
            row = 16 * WARP + 8 * below + GROUP
            registers[eight, below] = np.stack([one[row, 8 * eight + 2 * LANE + e] for e in (0, 1)], -1)
        parts.append(SimpleNamespace(registers=registers))
    # A cluster of two: eight rows each.
    gpu_registers.send(bits, parts, machine.ref("sums", np.zeros((8, 128), np.float32)), 8)
    found = [[machine.sent[block * 2**20 + 4 * n] for n in range(8 * 128)] for block in (0, 1)]
    np.testing.assert_array_equal(np.array(found, np.float32).reshape(16, 128), sums)
    assert len(machine.sent) == 16 * 128


@pytest.mark.parametrize(("there", "rows"), [(1, 8), (9, 16), (16, 16)])
def test_rows_of_x_that_there_are_lie_as_the_matrix_unit_reads(there, rows, monkeypatch):
    x = np.random.default_rng(0).integers(0, 2**16, (there, 512)).astype(np.uint16)
    machine = Machine(monkeypatch)
    source = machine.ref("x", x, shape=(there, 128), type=(512, 1))
    # Threads of NumPy's machine copy what is behind the start of the reference: the first step.
    gpu_registers.begin(source, machine.ref("tile", np.zeros((2, rows, 64), np.uint16), shape=(2, rows, 64), type=None))
    expected = np.zeros((2, rows, 64), np.uint16)
    expected[:, :there] = x[:, :128].reshape(there, 2, 64).swapaxes(0, 1)
    np.testing.assert_array_equal(machine.memory["tile"], swizzled(expected.view(np.uint8)).reshape(-1))
