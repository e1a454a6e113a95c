"""The machine that writes a program of threads into a Mosaic GPU kernel."""

from __future__ import annotations

from collections.abc import Callable

from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, scf, vector

from jaxpar.pallas_kernels.lanes.memory import THREADS, Kind, place


class Word:
    """32 bits of a thread on the chip, or a predicate. Numbers in comparisons are signed; a shift to the right fills with 0."""

    def __init__(self, value):
        self.value = value

    def _with(self, other):
        if isinstance(other, Word):
            return other.value
        kind = self.value.type
        if isinstance(kind, ir.F32Type):
            return utils.c(float(other), kind)
        other = int(other)
        return utils.c(other - 2**32 if other >= 2**31 else other, kind)

    def _do(self, other, whole, real):
        other = self._with(other)
        return Word((real if isinstance(self.value.type, ir.F32Type) else whole)(self.value, other))

    def _compare(self, other, whole, real):
        other = self._with(other)
        if isinstance(self.value.type, ir.F32Type):
            return Word(arith.cmpf(real, self.value, other))
        return Word(arith.cmpi(whole, self.value, other))

    def __add__(self, other):
        return self._do(other, arith.addi, arith.addf)

    def __sub__(self, other):
        return self._do(other, arith.subi, arith.subf)

    def __mul__(self, other):
        return self._do(other, arith.muli, arith.mulf)

    def __and__(self, other):
        return self._do(other, arith.andi, None)

    def __or__(self, other):
        return self._do(other, arith.ori, None)

    def __xor__(self, other):
        return self._do(other, arith.xori, None)

    def __rshift__(self, other):
        return self._do(other, arith.shrui, None)

    def __floordiv__(self, other):
        return self._do(other, arith.divui, None)

    def __mod__(self, other):
        return self._do(other, arith.remui, None)

    def __lt__(self, other):
        return self._compare(other, arith.CmpIPredicate.slt, arith.CmpFPredicate.OLT)

    def __gt__(self, other):
        return self._compare(other, arith.CmpIPredicate.sgt, arith.CmpFPredicate.OGT)

    def __ge__(self, other):
        return self._compare(other, arith.CmpIPredicate.sge, arith.CmpFPredicate.OGE)


class Pointer:
    def __init__(self, ref, kind: Kind):
        memref = ir.MemRefType(ref.type)
        self.kind, self.element, self.pointer = kind, memref.element_type, utils.memref_ptr(ref)
        self.strides = memref.get_strides_and_offset()[0]

    def index(self, row, column):
        """Of a number in a matrix, whose rows may lie apart."""
        return row * self.strides[0] + column

    def at(self, offset: Word):
        return utils.getelementptr(self.pointer, [offset.value], ir.IntegerType.get_signless(8))


class Chip:
    """Writes a program into a Mosaic GPU kernel."""

    def thread(self) -> Word:
        """This thread's number in its warpgroup."""
        return Word(utils.thread_idx()) & (THREADS - 1)

    def number(self, value: float) -> Word:
        return Word(utils.c(float(value), ir.F32Type.get()))

    def bits(self, word) -> Word:
        """A float32 as bits."""
        return Word(arith.bitcast(_i32(), word.value))

    def load(self, memory, index) -> Word:
        """A number by its place."""
        return Word(llvm.load(memory.element, memory.at(index * 4)))

    def pair(self, memory, index) -> list[Word]:
        """Two numbers side by side, the first one's place an even one."""
        wide = ir.VectorType.get((2,), memory.element)
        both = llvm.load(wide, memory.at(index * 4), alignment=8)
        return [Word(vector.extract(both, dynamic_position=[], static_position=[n])) for n in (0, 1)]

    def store(self, memory, index, values, where=None) -> None:
        """Write 1, 2 or 4 numbers side by side, the first one's place a multiple of how many; where a predicate holds."""
        wide = ir.VectorType.get((len(values),), memory.element)
        values = [llvm.bitcast(memory.element, value.value) for value in values]
        whole = vector.from_elements(wide, values)
        self._where(where, lambda: llvm.store(whole, memory.at(index * 4), alignment=4 * len(values)))

    def send(self, memory, block, index, values, blocks: int) -> None:
        """Write 2 numbers to shared memory of a block of the cluster, to where this block has `memory`.

        Args:
          blocks: of the cluster.
        """
        here = llvm.ptrtoint(_i32(), memory.at(index * 4))
        there = here
        if blocks > 1:
            there = self._asm("mapa.shared::cluster.u32 $0, $1, $2;", "=r,r,r", here, block.value)[0].value
        text = "st.shared::cluster.v2.f32 [$0], {$1, $2};"
        pair = [value.value for value in values]
        llvm.inline_asm(
            ir.Type.parse("!llvm.void"), [there, *pair], text, "r,f,f,~{memory}", asm_dialect=0, has_side_effects=True
        )

    def matrices(self, tile, row, chunk, *, transposed=False) -> list[Word]:
        """Four matrices of 8 rows of 16 bytes: lanes 8 · n to 8 · n + 7 say where in the tile the rows of the n-th are, by row
        and by 16 bytes of it. `transposed`: of 2-byte elements."""
        start = llvm.ptrtoint(_i32(), tile.at(place(row, chunk, tile.kind.width)))
        trans = ".trans" if transposed else ""
        text = f"ldmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 {{$0, $1, $2, $3}}, [$4];"
        return self._asm(text, "=r,=r,=r,=r,r,~{memory}", start, effects=True)

    def fused(self, word, times: int, plus: int) -> Word:
        """`word · times + plus` of two bfloat16s each, rounded once; subnormal numbers are numbers."""
        times, plus = (word._with(one) for one in (times, plus))
        return self._asm("fma.rn.bf16x2 $0, $1, $2, $3;", "=r,r,r,r", word.value, times, plus)[0]

    def picked(self, a, b, selector: int) -> Word:
        """Four bytes of two words, by a digit each, the lowest first: 0 to 3 of a, 4 to 7 of b."""
        return self._asm("prmt.b32 $0, $1, $2, $3;", "=r,r,r,n", a.value, b.value, a._with(selector))[0]

    def packed(self, low, high) -> Word:
        """Two float32 as bfloat16."""
        return self._asm("cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", low.value, high.value)[0]

    def turned(self, word) -> Word:
        """A matrix of 8 rows of 8 2-byte elements, transposed."""
        return self._asm("movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;", "=r,r", word.value, effects=True)[0]

    def product(self, total, a, b) -> list[Word]:
        """`total + a b` of [16, 8], [16, 16] and [16, 8]: four float32 words, and four and two of bfloat16 pairs."""
        text = "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, "
        values = [word.value for word in (*a, *b, *total)]
        return self._asm(text + "{$10, $11, $12, $13};", "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f", *values, effects=True)

    def shuffled(self, word, mask: int) -> Word:
        """The word of the lane whose number differs by these bits."""
        text = f"shfl.sync.bfly.b32 $0, $1, {mask}, 0x1f, 0xffffffff;"
        return self._asm(text, "=f,f", word.value, effects=True)[0]

    def multiply_add(self, a, b, c) -> Word:
        """`a · b + c` of float32."""
        return self._asm("fma.rn.f32 $0, $1, $2, $3;", "=f,f,f,f", a.value, b.value, c.value)[0]

    def exp2(self, word) -> Word:
        return self._asm("ex2.approx.ftz.f32 $0, $1;", "=f,f", word.value)[0]

    def log2(self, word) -> Word:
        return self._asm("lg2.approx.ftz.f32 $0, $1;", "=f,f", word.value)[0]

    def inverse(self, word) -> Word:
        return self._asm("rcp.approx.ftz.f32 $0, $1;", "=f,f", word.value)[0]

    def maximum(self, a, b) -> Word:
        """The larger one; of a number and NaN, the number."""
        return self._asm("max.f32 $0, $1, $2;", "=f,f,f", a.value, a._with(b))[0]

    def where(self, predicate, a, b) -> Word:
        a, b = (a, a._with(b)) if isinstance(a, Word) else (Word(b._with(a)), b.value)
        return Word(arith.select(predicate.value, a.value, b))

    def unless(self, number, change: Callable, words: list) -> list:
        """Float32 words, changed where a number that all threads have is 0."""
        kinds = [word.value.type for word in words]
        branch = scf.IfOp((number < 1).value, kinds, has_else=True)
        with ir.InsertionPoint(branch.then_block):
            scf.yield_([word.value for word in change(words)])
        with ir.InsertionPoint(branch.else_block):
            scf.yield_([word.value for word in words])
        return [Word(value) for value in branch.results]

    def _where(self, predicate, do: Callable) -> None:
        if predicate is None:
            do()
            return
        branch = scf.IfOp(predicate.value)
        with ir.InsertionPoint(branch.then_block):
            do()
            scf.yield_([])

    def _asm(self, text: str, constraints: str, *operands, effects=False) -> list[Word]:
        # Effects: of what all lanes do together, too, or the compiler might move it to where not all of them come.
        kinds = [ir.F32Type.get() if out == "=f" else _i32() for out in constraints.split(",") if out.startswith("=")]
        result = kinds[0] if len(kinds) == 1 else llvm.StructType.get_literal(kinds)
        found = llvm.inline_asm(result, list(operands), text, constraints, asm_dialect=0, has_side_effects=effects)
        if len(kinds) == 1:
            return [Word(found)]
        return [Word(llvm.extractvalue(kind, found, [n])) for n, kind in enumerate(kinds)]


def _i32():
    return ir.IntegerType.get_signless(32)
