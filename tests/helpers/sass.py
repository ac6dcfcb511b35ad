"""A look at machine code for sm_90: does anything overwrite what a matrix product in flight still reads?

An HGMMA runs asynchronously. Where its operand A lies in registers, they must stay as they are until the product's
group has been waited for; Triton 3.6 to 3.8 wrote code that reuses them too early (triton-lang/triton#9433).
No numeric test finds that reliably.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

_LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([\w.]+)\s*(.*?)\s*;", re.MULTILINE)
_REGISTER = re.compile(r"R(\d+)\b")

# Operand A of one product: 64 rows of 32 bytes over 128 threads.
_REGISTERS_OF_A = 4


@dataclass(frozen=True)
class Instruction:
    """One line of a listing."""

    address: int
    opcode: str
    operands: tuple[str, ...]

    def __str__(self) -> str:
        return f"/*{self.address:04x}*/ {self.opcode} {', '.join(self.operands)}"


def parse(listing: str) -> list[Instruction]:
    """The instructions of a cuobjdump -sass listing, in order."""
    return [
        Instruction(int(address, 16), opcode, tuple(part.strip() for part in operands.split(",") if part.strip()))
        for address, opcode, operands in _LINE.findall(listing)
    ]


def loops_with_products(instructions: list[Instruction]) -> Iterator[list[Instruction]]:
    """Bodies of the loops that contain matrix products: from the target of a backward branch to the branch."""
    for branch in instructions:
        target = re.search(r"0x([0-9a-f]+)", branch.operands[-1]) if branch.opcode.startswith("BRA") else None
        if target is None or int(target[1], 16) >= branch.address:
            continue
        body = [i for i in instructions if int(target[1], 16) <= i.address <= branch.address]
        if any(i.opcode.startswith("HGMMA") for i in body):
            yield body


def written_registers(instruction: Instruction) -> range:
    """The registers that an instruction writes, by its first operand that is no predicate."""
    name = instruction.opcode
    if "SETP" in name or name.startswith(("PLOP", "BRA", "R2P")):
        return range(0)
    targets = [operand for operand in instruction.operands if not re.match(r"U?P(T|\d)", operand)]
    match = _REGISTER.match(targets[0]) if targets else None
    if match is None:
        return range(0)
    wide = ".128" in name or name.endswith(".M88.4")
    double = ".64" in name or ".WIDE" in name or name.endswith(".M88.2") or name[0] == "D"
    return range(int(match[1]), int(match[1]) + (4 if wide else 2 if double else 1))


def registers_of_a(instruction: Instruction) -> set[int]:
    """The registers that a matrix product reads as operand A; none if it lies in shared memory."""
    if not instruction.opcode.startswith("HGMMA"):
        return set()
    match = _REGISTER.match(instruction.operands[1])
    return set(range(int(match[1]), int(match[1]) + _REGISTERS_OF_A)) if match else set()


def hazards(listing: str) -> list[str]:
    """Instructions that write a register which a matrix product in flight still reads as operand A."""
    found = []
    for body in loops_with_products(parse(listing)):
        in_flight: list[set[int]] = []
        group: set[int] = set()
        # A product of one round is still in flight in the next one, and the one after.
        for instruction in body * 3:
            if instruction.opcode.startswith("HGMMA"):
                group = group | registers_of_a(instruction)
                if any(operand.startswith("gsb") for operand in instruction.operands):
                    in_flight.append(group)
                    group = set()
            elif instruction.opcode.startswith("WARPGROUP.DEPBAR"):
                pending = int(instruction.operands[-1], 16)
                in_flight = in_flight[max(0, len(in_flight) - pending) :]
            elif set(written_registers(instruction)) & set().union(group, *in_flight):
                found.append(str(instruction))
    return sorted(set(found))
