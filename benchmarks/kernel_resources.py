"""Compile the fused kernels for a GPU and print the registers and the shared memory they use. No GPU is needed.

    python benchmarks/kernel_resources.py                        # Hopper: H100, H200
    python benchmarks/kernel_resources.py --capability 80 --widths 64 128 --dtypes bfloat16 float32
    python benchmarks/kernel_resources.py --local --widths 64 128      # the kernels of local attention instead

The table lists registers per thread (at most 255; the rest is spilled to memory and counted as stack), shared memory
per block, and the number of tensor core instructions. The launches of a forward and a backward pass are recorded, not
run. The compiler comes with Triton.
"""

import argparse
import contextlib
import re
import subprocess
import tempfile
from pathlib import Path

import torch
import triton
from common import print_table
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lion_hf.ops.triton import band_launch
from lion_hf.ops.triton import launch as lion_triton


POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.uint8: "*u8",
    torch.int32: "*i32",
}
OPTIONS = ("num_warps", "num_stages", "maxnreg")


class Recorder:
    """Replace a kernel and record its launches."""

    def __init__(self, kernel, launches):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        def record(*arguments, **named):
            options = {name: named.pop(name) for name in OPTIONS if name in named}
            named |= dict(zip(self.kernel.arg_names, arguments, strict=False))
            self.launches.append((self.kernel, named, options))

        return record


@contextlib.contextmanager
def recorded(module):
    """Record the launches of the kernels of a module, in place of running them."""
    launches = []
    kernels = {name: x for name, x in vars(module).items() if name.endswith("_kernel")}
    for name, kernel in kernels.items():
        setattr(module, name, Recorder(kernel, launches))
    try:
        yield launches
    finally:
        for name, kernel in kernels.items():
            setattr(module, name, kernel)


def record(dtype, width, decay, normalized, packed):
    """Return the launches of a forward and a backward pass in chunks."""
    with recorded(lion_triton) as launches:
        x = torch.zeros(2 - packed, 4, 1024, width, dtype=dtype)
        gates = {"none": None, "head": torch.zeros(4), "token": torch.zeros(x.shape[:3])}[decay]
        bounds = torch.tensor([0, 500, 1024]) if packed else None
        result = lion_triton.NORMALIZED if normalized else lion_triton.NUMERATOR
        out, sums = lion_triton._mix(x, x, x, gates, None, bounds, None, 0.125, 1e-6, result)
        kept = (out, sums) if normalized else (None, None)
        lion_triton._mix_backward(x, x, x, gates, None, bounds, None, *kept, out, None, 0.125)
    return launches


def record_local(dtype, width, masked, packed):
    """Return the launches of a forward and a backward pass of local attention."""
    with recorded(band_launch) as launches:
        x = torch.zeros(2 - packed, 4, 1024, width, dtype=dtype)
        mask = torch.ones(len(x), 1024, dtype=torch.bool) if masked else None
        bounds = torch.zeros(2, 1024, dtype=torch.int32) if packed else None
        out, lse = band_launch._band(x, x, x, mask, bounds, 64)
        band_launch._band_backward(x, x, x, mask, bounds, out, lse, out, 64)
    return launches


def record_all(arguments, dtype, width):
    """Return all launches for one dtype and width, and the kind of decay or of mask of each."""
    if arguments.local:
        kinds = {"masked": True, "no mask": False}
        return [(kind, x) for kind in kinds for x in record_local(dtype, width, kinds[kind], arguments.packed)]
    launches = []
    for decay in arguments.decays:
        for lion_triton._WALKS in (0, 1 << 30):  # with and without the kernel for many sequences
            launches += [(decay, x) for x in record(dtype, width, decay, True, arguments.packed)]
    return launches


def compile_launch(kernel, arguments, options, capability):
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        if parameter.is_constexpr or value is None:
            signature[parameter.name], constants[(index,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name], attributes[(index,)] = POINTERS[value.dtype], [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
            if not isinstance(value, float) and value % 16 == 0 and not parameter.do_not_specialize:
                attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def resources(compiled):
    """Return the registers and the bytes of stack, as the binary states them."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], check=True, capture_output=True, text=True).stdout
    return {name: int(re.search(rf"\b{name}:(\d+)", text)[1]) for name in ("REG", "STACK")}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capability", type=int, default=90, help="compute capability times 10")
    parser.add_argument("--widths", type=int, nargs="+", default=[64], help="features of a head")
    parser.add_argument(
        "--dtypes", nargs="+", default=["bfloat16"], choices=["bfloat16", "float16", "float32"], help="of the inputs"
    )
    parser.add_argument(
        "--decays",
        nargs="+",
        default=["none", "head", "token"],
        choices=["none", "head", "token"],
        help="kinds of decay",
    )
    parser.add_argument("--local", action="store_true", help="compile the kernels of local attention")
    parser.add_argument("--packed", action="store_true", help="compile for packed texts")
    parser.add_argument("--tf32", action="store_true", help="allow TF32 in float32 products")
    for name in ("forward", "backward"):
        default = getattr(lion_triton, f"_{name.upper()}")
        parser.add_argument(f"--{name}", type=int, nargs=2, default=default, metavar=("TILE", "WARPS"))
    arguments = parser.parse_args()
    lion_triton._FORWARD, lion_triton._BACKWARD = arguments.forward, arguments.backward
    torch.set_float32_matmul_precision("high" if arguments.tf32 else "highest")
    rows = []
    for dtype in arguments.dtypes:
        for width in arguments.widths:
            for kind, (kernel, launch, options) in record_all(arguments, getattr(torch, dtype), width):
                compiled = compile_launch(kernel, launch, options, arguments.capability)
                used = resources(compiled)
                code = compiled.asm["ptx"]
                rows.append(
                    {
                        "kernel": kernel.__name__.strip("_").removesuffix("_kernel"),
                        "dtype": dtype,
                        "width": width,
                        "mask" if arguments.local else "decay": kind,
                        "tile": launch.get("TILE", ""),
                        "warps": options.get("num_warps", ""),
                        "registers": used["REG"],
                        "stack (bytes)": used["STACK"],
                        "shared (KiB)": compiled.metadata.shared / 1024,
                        "tensor core": code.count("wgmma.mma") + code.count("mma.sync"),
                    }
                )
    print_table(list({tuple(row.items()): row for row in rows}.values()))


if __name__ == "__main__":
    main()
