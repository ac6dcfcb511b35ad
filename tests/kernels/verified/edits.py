"""Edits of PTX that let the verifier see through what it does not know, each with why little is lost by it.

What is proved of an edited kernel holds for the kernel itself as far as the reason goes, and no further.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Edit:
    """A change of the text of a kernel.

    Attributes:
        letter: that tables name it by.
        apply: returns the changed text, and fails where there is nothing to change.
    """

    letter: str
    apply: Callable[[str], str]


REASONS = {
    "a": "two 16-bit numbers are selected as float32 values instead of as bits: every one of them is a float32 number",
    "b": "addresses of tensors come from parameters instead of from a table in memory",
    "c": "a comparison of what lies in memory is decided in the text (α = 0; the label lies in this chunk), and both "
    "cases are run",
    "d": "of the lanes of a warp that store one sum, or α, to one address, one stores it; that all hold the same "
    "number is an argument (each adds the same numbers in the same tree, or reads the same α) and not proved",
    "e": "square roots are of absolute values, in the formula too: a mean of squares and a variance are not negative",
    "f": "the halves of a float64 number are put together by one move instead of a shift and an or",
    "g": "√(1 − β₂ᵗ) is one fixed number, 1/32, in the formula too",
}


def replaced(pattern: str, new: str, ptx: str, count: int = 0) -> str:
    """The text with a pattern replaced, which must be there."""
    ptx, found = re.subn(pattern, new, ptx, count=count)
    assert found, f"{pattern} is not in the PTX"
    return ptx


def declared(registers: dict[str, str], ptx: str) -> str:
    """The text with registers of ours beside those of the kernel."""
    lines = "".join(f"\t.reg .{kind} {name};\n" for name, kind in registers.items())
    return replaced(r"\{\n(?=\t\.reg )", "{\n" + lines, ptx, count=1)


def select_in_fp32(kind: str) -> Edit:
    """Selections among numbers of 16 bits, "bf16" or "f16", as selections among float32 ones."""

    def apply(ptx: str) -> str:
        new = (
            rf"\tcvt.f32.{kind} %a_one, \2;\n\tcvt.f32.{kind} %a_two, \3;\n\tselp.f32 %a_out, %a_one, %a_two, \4;\n"
            rf"\tcvt.rn.{kind}.f32 \1, %a_out;"
        )
        ptx = replaced(r"\tselp\.b16\s+(\S+), (\S+), (\S+), (\S+);", new, ptx)
        return declared(dict.fromkeys(("%a_one", "%a_two", "%a_out"), "b32"), ptx)

    return Edit("a", apply)


def addresses_from_parameters(roles: Sequence[int]) -> Edit:
    """Of a kernel that reads addresses of tensors from a table: parameters behind its own, one for each role."""

    def apply(ptx: str) -> str:
        (entry,) = re.findall(r"\.entry (\w+)\(", ptx)
        count = len(re.findall(rf"\.param [^\n]*{entry}_param_\d+", ptx.split("\n)\n")[0]))
        row = re.findall(r"mad\.wide\.s32\s+(%rd\d+), %r\d+, 8, %rd\d+;", ptx)[0]
        for index, role in enumerate(roles):
            address = row if role == 0 else re.findall(rf"add\.s64\s+(%rd\d+), {row}, {8 * role};", ptx)[0]
            load = rf"ld\.global\.b64 \{{ (%rd\d+) \}}, \[ {address} \+ 0 \];"
            ptx = replaced(load, rf"ld.param.b64 \1, [{entry}_param_{count + index}];", ptx)
        parameters = [f",\n\t.param .u64 .ptr .global .align 16 {entry}_param_{count + i}" for i in range(len(roles))]
        return ptx.replace("\n)\n", "".join(parameters) + "\n)\n", 1)

    return Edit("b", apply)


def alpha_is(zero: bool) -> Edit:
    """Every comparison of α with 0 as if it had been made."""

    def apply(ptx: str) -> str:
        value = -1 if zero else 0
        ptx, found = re.subn(r"setp\.eq\.f32\s+(%p\d+), %r\d+, 0f00000000;", rf"mov.pred \t\1, {value};", ptx)
        for register in re.findall(r"and\.b32\s+(%r\d+), %r\d+, 2147483647;", ptx):
            ptx, more = re.subn(rf"setp\.eq\.b32\s+(%p\d+), {register}, 0;", rf"mov.pred \t\1, {value};", ptx)
            found += more
        assert found, "nothing is compared with 0 in the PTX"
        return ptx

    return Edit("c", apply)


def label_is_here(here: bool) -> Edit:
    """The one branch that depends on the label as if it had been taken, or not."""

    def apply(ptx: str) -> str:
        return replaced(r"\t@%p\d+ bra\s+(\S+);", "" if here else r"\tbra.uni \1;", ptx, count=1)

    return Edit("c", apply)


def _one_lane_stores(ptx: str, lanes: int = 32, stores: str = r"st\.shared\.[^\n]*") -> str:
    new = (
        f"\n\tmov.u32 %d_thread, %tid.x;\n\tand.b32 %d_lane, %d_thread, {lanes - 1};\n"
        "\tsetp.eq.s32 %d_first, %d_lane, 0;\n"
        r"\t@%d_first \1"
    )
    ptx = replaced(rf"\n\t({stores})", new, ptx)
    return declared({"%d_first": "pred", "%d_thread": "b32", "%d_lane": "b32"}, ptx)


def _one_lane_stores_alpha(ptx: str) -> str:
    # Elsewhere no two lanes store it to one address.
    return _one_lane_stores(ptx, 8, r"st\.shared\.b32[^\n]*") if ".target sm_80" in ptx else ptx


def _halves_by_one_move(ptx: str) -> str:
    # PTX for newer architectures has it so from the start.
    joined = (
        r"\tcvt\.u64\.u32 \t(%rd\d+), (%r\d+);\n\tcvt\.u64\.u32 \t(%rd\d+), (%r\d+);\n"
        r"\tshl\.b64 \t(%rd\d+), \3, 32;\n\tor\.b64 \t(%rd\d+), \1, \5;"
    )
    return re.sub(joined, r"\tmov.b64 \t\6, {\2, \4};", ptx)


def _number_is_fixed(ptx: str) -> str:
    for address in re.findall(r"add\.s64\s+(%rd\d+), %rd\d+, 28;", ptx):
        load = rf"mov\.u32 (%r\d+), 0x0;\n\tld\.global\.b32 \{{ \1 \}}, \[ {address} \+ 0 \];"
        ptx = replaced(load, r"mov.b32 \1, 0f3D000000;", ptx)
    assert "0f3D000000" in ptx
    return ptx


def _roots_of_absolute_values(ptx: str) -> str:
    ptx = replaced(r"\tsqrt\.rn\.f32\s+(\S+), (\S+);", r"\tabs.f32 %e_value, \2;\n\tsqrt.rn.f32 \1, %e_value;", ptx)
    return declared({"%e_value": "b32"}, ptx)


ONE_LANE_STORES = Edit("d", _one_lane_stores)
ONE_LANE_STORES_ALPHA = Edit("d", _one_lane_stores_alpha)
ROOTS_OF_ABSOLUTE_VALUES = Edit("e", _roots_of_absolute_values)
HALVES_BY_ONE_MOVE = Edit("f", _halves_by_one_move)
ROOT_OF_CORRECTION_IS_FIXED = Edit("g", _number_is_fixed)
