"""Counts the instructions of NVIDIA's compiled programs, as its disassembler prints them."""

import re
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

# Kinds by the beginning of an instruction's name, the first that fits; what no line names is arithmetic on addresses.
_KINDS = {
    "multiply-add": ("FFMA", "DFMA"),
    "add, multiply": ("FADD", "FMUL", "DADD", "DMUL"),
    "matrix": ("HMMA", "WGMMA", "HGMMA", "IMMA"),
    "convert": ("HADD2.F32", "F2F", "I2F", "PRMT"),
    "load": ("LDG", "LD."),
    "store": ("STG", "ST."),
    "shared": ("LDS", "STS", "LDSM", "STSM"),
    "shuffle": ("SHFL",),
    "synchronise": ("BAR", "WARPSYNC", "DEPBAR", "BSSY", "BSYNC", "BMOV"),
    "branch": ("BRA", "EXIT", "RET", "CALL", "NOP"),
    "predicate": ("ISETP", "PLOP3", "LOP3", "P2R", "R2P", "FSETP", "SEL", "FSEL", "UISETP", "UPLOP3", "ULOP3", "VOTE"),
    "move": ("MOV", "IMAD.MOV", "CS2R", "UMOV", "HFMA2", "R2UR"),
}
_LINE = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*?);")
_LABEL = re.compile(r"^(\.L\w+):")
_TARGET = re.compile(r"\((\.L\w+)\)")


class Counts(NamedTuple):
    """What one warp of a program executes."""

    kinds: Counter[str]  # instructions
    bytes: float  # that its 32 lanes ask memory for, where none is masked

    @property
    def instructions(self) -> float:
        """All of them."""
        return float(sum(self.kinds.values()))


def count(assembly: str, trips: Sequence[float]) -> Counts:
    """The instructions of a program whose loops, from the outermost in, run so many times each.

    Everything is taken as executed: a branch that skips a part is not believed.

    Raises:
        ValueError: the loops are nested more deeply than `trips` says.
    """
    names: list[str] = []
    labels: dict[str, int] = {}
    branches: list[tuple[int, str]] = []
    for line in assembly.splitlines():
        if label := _LABEL.match(line.strip()):
            labels[label[1]] = len(names)
        elif instruction := _LINE.match(line):
            if instruction[1].startswith("BRA") and (to := _TARGET.search(instruction[2])):
                branches.append((len(names), to[1]))
            names.append(instruction[1])
    # A branch to itself ends a program; any other that goes back ends a loop.
    loops = [(labels[to], end) for end, to in branches if to in labels and labels[to] < end]
    kinds: Counter[str] = Counter()
    size = 0.0
    for index, name in enumerate(names):
        if name.startswith("NOP"):  # after the end
            continue
        depth = sum(first <= index <= last for first, last in loops)
        if depth > len(trips):
            raise ValueError(f"trips must be given for {depth} nested loops, got {list(trips)}")
        times = 1.0
        for trip in trips[:depth]:
            times *= trip
        kind = kind_of(name)
        kinds[kind] += times  # type: ignore[assignment]
        if kind in ("load", "store"):
            size += times * 32 * _bytes(name)
    return Counts(kinds, size)


def kind_of(name: str) -> str:
    """The kind of an instruction."""
    return next((kind for kind, starts in _KINDS.items() if name.startswith(starts)), "address")


def _bytes(name: str) -> int:
    """What one lane loads or stores."""
    sizes = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
    return next((sizes[part] for part in name.split(".") if part in sizes), 4)
