"""Compiles the Triton kernels to Hopper's machine code, which needs no GPU, and names each."""

from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from polyhead.adapters import triton_ops

HOPPER = GPUTarget("cuda", 90, 32)
NUMBERS, PARTS, INDICES = "*bf16", "*fp32", "*i64"
SKILLS = {"HEADS": 8, "SKILLS": 8, "RANK": 16, "SIZE": 3, "BLOCK_S": 8, "BLOCK_R": 16}
FACTORED = {
    **dict.fromkeys(("x", "a", "y0", "y1", "y2", "b0", "b1", "b2"), NUMBERS),
    **dict.fromkeys(("weights", "mixed"), PARTS),
    **dict.fromkeys(("positions", "rows"), INDICES),
}
COMBINED = {
    **dict.fromkeys(("x", "y"), NUMBERS),
    **dict.fromkeys(("a", "b", "ranks", "offsets", "positions", "items"), INDICES),
    "hidden": PARTS,
}


def compile_it(name: str, pointers: dict[str, str], **tiles: int) -> None:
    kernel: Any = getattr(triton_ops, name)
    kinds = {n: "constexpr" if n in tiles else pointers.get(n, "i32") for n in kernel.arg_names}
    constants = {(kernel.arg_names.index(n),): value for n, value in tiles.items()}
    found = triton.compile(ASTSource(kernel, kinds, constants), target=HOPPER)
    assert found.asm["cubin"]
    print(name, tiles["BLOCK_N"])


if __name__ == "__main__":
    shrink = {"HEADS_EACH": 2, "INNER_SPLITS": 2, "BLOCK_K": 64}
    compile_it("factored_shrink", FACTORED, **SKILLS, **shrink, BLOCK_N=16)
    compile_it(
        "factored_expand",
        FACTORED,
        **{k: v for k, v in SKILLS.items() if k != "HEADS"},
        MODULES=3,
        BLOCK_O=64,
        BLOCK_N=16,
    )
    for block in (1, 16):
        compile_it("combined_shrink", COMBINED, BLOCK_K=128, BLOCK_R=64, BLOCK_N=block)
        compile_it("combined_expand", COMBINED, BLOCK_O=128, BLOCK_R=64, BLOCK_N=block)
