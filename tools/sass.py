"""What the machine code of the CUDA kernels must show, where there is no GPU to ask.

Every kernel, for every GPU that the file has code for, has few enough registers for the blocks that shall be
resident at once, and no hot loop accesses local memory. For sm_90 no kernel keeps more than 32 bytes on its
stack (of pairs 256), and the hot loops of every dtype read (and write) 16 bytes a thread at a time, several
before the first is used. What a kernel writes it does not read through the read-only cache.

    python -m tools.sass FILE sm_90 [sm_75 ...]

FILE is an object file, a library, or the module; what it has code for follows.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from importlib.metadata import files

DTYPES = 4  # float16, bfloat16, float32, float64: complex numbers are pairs
# The list's table in memory; of the 2-norm and what follows it also inside of the argument, in two sizes.
KINDS = {"measure_kernelILNS0_7MeasureE0": 3, "change_kernel": 3}
THREADS = 256
REGISTERS = 65536  # of a multiprocessor
# Blocks at once on a multiprocessor, as in csrc/cuda/tuning.hpp.
LOOPS_OF = "sm_90"  # whose loops are counted
MOST_STACK = 32  # of sm_90: a few addresses, which are looked at once for each tensor
MOST_STACK_OF_PAIRS = 256  # where the two arrays lie, which what is called for a tile gets
BLOCKS = 3
BLOCKS_OF_LARGE_KERNELS = 2
LARGE_KERNELS = ("measure_kernelILNS0_7MeasureE3", "clip_by_value_kernel", "_pairs_kernel")
WRITING_KERNELS = ("change_kernel", "clip_by_value_kernel", "change_pairs_kernel")
PAIR_KERNELS = ("_pairs_kernel", "OfPairs")
KERNELS = 19
# Kernel, how many hot loops it has at least, and what each of them holds at least. nvcc unrolls loops over
# what is left of a tile into such loops too: fewer than today mean that some dtype has lost its own.
HOT_LOOPS = (
    ("measure_kernelILNS0_7MeasureE0", DTYPES, {"LDG.E.128": 8, "SHFL": 32}),  # squares
    ("measure_kernelILNS0_7MeasureE1", DTYPES, {"LDG.E.128": 8, "SHFL": 32}),  # magnitudes
    ("measure_kernelILNS0_7MeasureE2", DTYPES, {"LDG.E.128": 8}),  # largest
    ("change_kernel", 7, {"LDG.E.128": 4, "STG.E.128": 4}),  # by a float, and but for float64 by a double
    ("change_kernel", DTYPES, {"STG.E.128": 16}),  # zero
    ("clip_by_value_kernel", DTYPES, {"LDG.E.128": 8}),
    ("clip_by_value_kernel", DTYPES, {"LDG.E.128": 4, "STG.E.128": 4}),
)
INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]+)\*/\s+(.*?);")
BACK = re.compile(r"BRA.*0x([0-9a-f]+)")
USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)")


def cuobjdump(*arguments: str) -> str:
    """What cuobjdump prints, from the path or from its package."""
    tool = shutil.which("cuobjdump")
    if tool is None:
        tool = next(str(f.locate()) for f in files("nvidia-cuda-cuobjdump") or [] if f.name == "cuobjdump")
    return subprocess.run([tool, *arguments], check=True, capture_output=True, text=True).stdout


def architectures(file: str) -> list[str]:
    """Those that the file has machine code for."""
    return sorted(set(re.findall(r"\.(sm_\d+)\.cubin", cuobjdump("-lelf", file))))


def functions(file: str, architecture: str) -> dict[str, list[tuple[int, str]]]:
    """The instructions of every kernel: address and text."""
    result: dict[str, list[tuple[int, str]]] = {}
    for line in cuobjdump("-arch", architecture, "-sass", file).splitlines():
        if "Function :" in line:
            current = result.setdefault(line.split(":")[1].strip(), [])
        elif match := INSTRUCTION.match(line):
            current.append((int(match[1], 16), match[2]))
    return result


def usage(file: str, architecture: str) -> dict[str, tuple[int, int, int]]:
    """Registers of a thread, bytes of stack and of local memory of every kernel."""
    result = {}
    name = ""
    for line in cuobjdump("-arch", architecture, "-res-usage", file).splitlines():
        if "Function " in line:
            name = line.split("Function ")[1].rstrip(":")
        elif (match := USAGE.search(line)) and name.startswith("_Z"):
            result[name] = (int(match[1]), int(match[2]), int(match[3]))
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


def hot_loops(code: list[tuple[int, str]], least: dict[str, int]) -> list[list[str]]:
    """The inner loops that hold so many of each instruction."""
    return [
        loop
        for loop in inner_loops(code)
        if all(sum(op in text for text in loop) >= n for op, n in least.items())
    ]


def check_usage(file: str, architecture: str) -> list[str]:
    """What is wrong with registers and memory."""
    kernels = usage(file, architecture)
    problems = [] if len(kernels) == KERNELS else [f"expected {KERNELS} kernels, got {len(kernels)}"]
    for name, (registers, stack, local) in kernels.items():
        print(f"{architecture}: {registers:4} registers, {stack} bytes of stack: {name[16:76]}")
        large = any(part in name for part in LARGE_KERNELS)
        blocks = BLOCKS_OF_LARGE_KERNELS if large else BLOCKS
        most = REGISTERS // (THREADS * blocks)
        most_stack = MOST_STACK_OF_PAIRS if any(part in name for part in PAIR_KERNELS) else MOST_STACK
        if registers > most or local or (stack > most_stack and architecture == LOOPS_OF):
            problems.append(
                f"{name}: expected at most {most_stack} bytes of stack, no local memory, at most {most} "
                f"registers, got {stack}, {local}, {registers}"
            )
    return problems


def check_memory(file: str, architecture: str) -> list[str]:
    """Where local memory is accessed, or the read-only cache by who writes."""
    problems = []
    for name, code in functions(file, architecture).items():
        # What is spilled around the loops costs nothing to speak of.
        loops = hot_loops(code, {"LDG.E.128": 4}) + hot_loops(code, {"STG.E.128": 4})
        local = [text for loop in loops for text in loop if re.search(r"\b(LDL|STL)", text)]
        if local:
            problems.append(f"{name}: expected no access to local memory in a hot loop, got {local}")
        # That cache need not see what the kernel itself writes.
        constant = [text for _, text in code if re.search(r"\bLDG.*CONSTANT", text)]
        if constant and any(part in name for part in WRITING_KERNELS):
            problems.append(f"{name}: expected no read-only loads where it writes, got {constant}")
    return problems


def check_loops(file: str, architecture: str) -> list[str]:
    """What is wrong with the loops."""
    problems = []
    kernels = functions(file, architecture)
    for part, count, least in HOT_LOOPS:
        names = [name for name in kernels if part in name]
        if len(names) != KINDS.get(part, 1):
            problems.append(f"{part}: expected {KINDS.get(part, 1)} kernels, got {len(names)}")
        for name in names:
            hot = hot_loops(kernels[name], least)
            if len(hot) < count:
                problems.append(f"{name}: expected {count} hot loops with {least}, got {len(hot)}")
            for loop in hot:
                narrow = [text for text in loop if re.search(r"\b(LDG|STG)(?!.*\.128)", text)]
                if narrow:
                    problems.append(f"{name}: expected 16-byte accesses, got {narrow}")
            print(f"{len(hot)} hot loops of {[len(loop) for loop in hot]} instructions: {name[16:76]}")
    return problems


def main(file: str, *expected: str) -> int:
    """Check every kernel for every GPU that is expected; 1 if one is not as it should be."""
    found_for = architectures(file)
    problems = [] if found_for == sorted(expected) else [f"expected code for {expected}, got {found_for}"]
    for architecture in found_for:
        found = check_usage(file, architecture) + check_memory(file, architecture)
        if architecture == LOOPS_OF:
            found += check_loops(file, architecture)
        problems += [f"{architecture}: {problem}" for problem in found]
    print("\n".join(problems))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
