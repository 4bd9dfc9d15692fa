"""What the machine code of the CUDA kernels must show, where there is no GPU to ask.

The hot loops of every dtype read (and write) 16 bytes a thread at a time, several before the first is
used, and touch no local memory: nothing that is spilled lies inside them.

    python .ci/sass.py LIBRARY
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from importlib.metadata import files
from pathlib import Path

DTYPES = 4  # float16, bfloat16, float32, float64: complex numbers are pairs
# Kernel, and what a hot loop of it holds at least.
EXPECTED = {
    "measure_kernelILNS0_7MeasureE0": {"LDG.E.128": 8, "SHFL": 32},  # squares
    "measure_kernelILNS0_7MeasureE1": {"LDG.E.128": 8, "SHFL": 32},  # magnitudes
    "measure_kernelILNS0_7MeasureE2": {"LDG.E.128": 8},  # largest
    "change_kernel": {"LDG.E.128": 4, "STG.E.128": 4},
}
INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]+)\*/\s+(.*?);")
BACK = re.compile(r"BRA.*0x([0-9a-f]+)")


def tool() -> str:
    """cuobjdump, from the path or from its package."""
    found = shutil.which("cuobjdump")
    if found is None:
        found = next(str(f.locate()) for f in files("nvidia-cuda-cuobjdump") or [] if f.name == "cuobjdump")
    return found


def functions(library: str) -> dict[str, list[tuple[int, str]]]:
    """The instructions of every kernel: address and text."""
    listing = subprocess.run([tool(), "-sass", library], check=True, capture_output=True, text=True).stdout
    result: dict[str, list[tuple[int, str]]] = {}
    for line in listing.splitlines():
        if "Function :" in line:
            current = result.setdefault(line.split(":")[1].strip(), [])
        elif match := INSTRUCTION.match(line):
            current.append((int(match[1], 16), match[2]))
    return result


def inner_loops(code: list[tuple[int, str]]) -> list[list[str]]:
    """The bodies of loops that hold no other loop and no call."""
    spans = [
        (int(match[1], 16), address)
        for address, text in code
        if (match := BACK.search(text)) and int(match[1], 16) < address
    ]
    inner = [s for s in spans if not any(o != s and s[0] <= o[0] and o[1] <= s[1] for o in spans)]
    return [[text for address, text in code if low <= address <= high] for low, high in inner]


def main(library: str) -> int:
    """Check every kernel; 1 if one is not as expected."""
    problems = []
    kernels = functions(library)
    for part, least in EXPECTED.items():
        names = [name for name in kernels if part in name]
        if len(names) != 2:  # the table in memory, and inside the argument
            problems.append(f"{part}: expected 2 kernels, got {len(names)}")
        for name in names:
            hot = [
                loop
                for loop in inner_loops(kernels[name])
                if all(sum(op in text for text in loop) >= n for op, n in least.items())
            ]
            if len(hot) < DTYPES:
                problems.append(f"{name}: expected {DTYPES} hot loops with {least}, got {len(hot)}")
            for loop in hot:
                local = [text for text in loop if re.search(r"\b(LDL|STL)", text)]
                narrow = [text for text in loop if re.search(r"\b(LDG|STG)(?!.*\.128)", text)]
                if local or narrow:
                    problems.append(
                        f"{name}: expected no local memory and 16-byte accesses, got {local + narrow}"
                    )
            print(f"{len(hot)} hot loops of {[len(loop) for loop in hot]} instructions: {name[:60]}")
    print("\n".join(problems))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(str(Path(sys.argv[1]))))
