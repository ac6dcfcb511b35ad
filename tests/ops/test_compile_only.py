"""Compile every kernel for GPUs that are not there, and look at the machine code.

Holds for the Triton that is installed; bench/static_table.py says how to check another version.
"""

from dataclasses import replace

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is a Linux package")

import triton.language as tl  # noqa: E402

from tests.helpers import sass  # noqa: E402
from tests.helpers.compiled import SHARED_LIMIT, TARGETS, compile_launch, fingerprint_of, launches_of, sass_of  # noqa: E402
from tests.helpers.launches import ALWAYS, CASES, RULES, SMALLEST, case_facts, committed_facts, form_state  # noqa: E402

# Three programs of 256 threads fit the registers of a multiprocessor, four waves those of a CDNA SIMD.
MAX_REGISTERS = {**dict.fromkeys(TARGETS, 80), "gfx942": 128}

# A kernel that does not fit an architecture can compile without an error to a few instructions that trap.
MIN_INSTRUCTIONS = 40


@pytest.mark.parametrize("architecture", TARGETS)
@pytest.mark.parametrize("name", CASES)
def test_machine_code(name, architecture):
    committed = committed_facts(name, architecture)
    kernels = case_facts(name, architecture, committed or ())
    assert {facts.kernel for facts in kernels} >= set(CASES[name].wide)
    for facts in kernels:
        loads, stores = CASES[name].wide.get(facts.kernel, (0, 0))
        assert facts.stack == facts.spills == 0
        assert facts.shared <= SHARED_LIMIT[architecture]
        assert facts.instructions > MIN_INSTRUCTIONS
        assert facts.wide_loads >= loads
        assert facts.wide_stores >= stores
        products = CASES[name].products
        if products is not None and products.kernel == facts.kernel:
            assert facts.registers <= (256 if architecture == "gfx942" else products.registers)
            assert_rounds_of(facts.matrix, products.matrix.get(architecture))
        else:
            assert facts.registers <= MAX_REGISTERS[architecture]
            # A matrix instruction in a streaming kernel would mean that something else was compiled.
            assert facts.matrix == {}

    assert committed in (None, kernels), (
        "the machine code is another than the committed one: look at the change, then python -m bench.static_table"
    )


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100"])
def test_only_facts_of_the_same_code_are_taken_over(architecture):
    (counted,) = case_facts("axpy bf16", architecture)
    wrong = replace(counted, source="another", instructions=0)
    assert case_facts("axpy bf16", architecture, [wrong])[0].instructions == 0
    assert case_facts("axpy bf16", architecture, [replace(wrong, code="another")]) == [counted]


@pytest.mark.parametrize("architecture", TARGETS)
def test_only_facts_of_the_same_source_are_taken_over(architecture):
    (counted,) = case_facts("axpy bf16", architecture)
    wrong = replace(counted, code="another", registers=0)
    # Everything is compiled for one architecture at least.
    assert case_facts("axpy bf16", architecture, [wrong])[0].registers == (
        counted.registers if architecture == ALWAYS else 0
    )
    assert case_facts("axpy bf16", architecture, [replace(wrong, source="another")]) == [counted]


def test_the_mark_of_a_source_is_of_all_that_is_compiled():
    (launch,) = launches_of(CASES["axpy bf16"].call, "sm_90")
    (other,) = launches_of(CASES["axpy fp32, bf16 direction"].call, "sm_90")
    others = [
        other,
        replace(launch, options={**launch.options, "num_warps": 16}),
        replace(launch, arguments={**launch.arguments, "BLOCK": 512}),
        replace(launch, arguments={**launch.arguments, "chunks": launch.arguments["chunks"][1:]}),
        replace(launch, kernel=_formed_product_kernel, arguments=dict.fromkeys(_formed_product_kernel.arg_names)),
    ]
    marks = [
        fingerprint_of(launch, "sm_90"),
        fingerprint_of(launch, "sm_80"),
        *(fingerprint_of(other, "sm_90") for other in others),
    ]
    assert len(set(marks)) == len(marks)
    assert fingerprint_of(launch, "sm_90") == marks[0]


def assert_rounds_of(found, expected):
    """The matrix instructions are those of whole rounds of the loop, of which the compiler may have peeled some off."""
    if expected is None:
        assert found == {}
        return
    opcode, count = expected
    assert set(found) == {opcode}
    assert found[opcode] % count == 0


@pytest.mark.parametrize("name", SMALLEST)
def test_sizes_of_one_compile(name):
    # Triton makes constants of them, on which not every operation of a tensor is defined; the interpreter does not.
    for launch in launches_of(SMALLEST[name], "sm_90"):
        assert compile_launch(launch, "sm_90").asm["cubin"]


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("rule", RULES)
def test_the_update_alone_reads_the_weights_for_their_decay_only(rule, weight_decay):
    (launch,) = launches_of(form_state(rule, 0, weight_decay), "sm_90")
    assert (launch.arguments["theta"] is not None) == (weight_decay > 0)


@triton.jit
def _formed_product_kernel(out, x, w, d, alpha, depth, BLOCK: tl.constexpr, DEPTH: tl.constexpr):
    rows = tl.arange(0, BLOCK)
    tile = rows[:, None] * depth + tl.arange(0, DEPTH)[None, :]
    alpha = tl.load(alpha)
    total = tl.zeros([BLOCK, BLOCK], tl.float32)
    for first in tl.range(0, depth, DEPTH, num_stages=3):
        formed = tl.fma(tl.load(d + tile + first).to(tl.float32), alpha, tl.load(w + tile + first).to(tl.float32))
        total = tl.dot(formed.to(tl.bfloat16), tl.trans(tl.load(x + tile + first)), total)
    tl.store(out + rows[:, None] * BLOCK + rows[None, :], total)


@pytest.fixture(scope="module")
def listing():
    """Machine code of a product whose operand A is formed in registers."""
    operands = [torch.zeros(128, 4096, dtype=torch.bfloat16) for _ in range(3)]
    sizes = {"depth": 4096, "BLOCK": 128, "DEPTH": 64, "num_warps": 8, "enable_fp_fusion": False}
    (launch,) = launches_of(
        lambda: _formed_product_kernel[(1,)](torch.zeros(128, 128), *operands, torch.zeros(1), **sizes), "sm_90"
    )
    return sass_of(compile_launch(launch, "sm_90"))


# The load at 0x50 fills what the product of the previous round, one group back, may still be reading.
PLANTED = """
        /*0040*/                   WARPGROUP.ARRIVE ;
        /*0050*/                   LDS.128 R4, [R40] ;
        /*0060*/                   HGMMA.64x128x16.F32.BF16 R24, R4, gdesc[UR8], R24, gsb0 ;
        /*0070*/                   WARPGROUP.DEPBAR.LE gsb0, 0x1 ;
        /*0080*/              @!P0 BRA 0x40 ;
"""


def product_on_hopper(name, **constants):
    """Machine code for sm_90 of the kernel of a case that multiplies matrices, with other constants if given."""
    kernel = CASES[name].products.kernel
    (launch,) = (launch for launch in launches_of(CASES[name].call, "sm_90") if launch.kernel.__name__ == kernel)
    launch.arguments.update(constants)
    return sass_of(compile_launch(launch, "sm_90"))


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.products is not None])
def test_nothing_overwrites_what_a_product_in_flight_reads(name):
    assert sass.hazards(product_on_hopper(name)) == []


@pytest.mark.skipif(not triton.__version__.startswith(("3.6.", "3.7.", "3.8.")), reason="this Triton waits by itself")
@pytest.mark.parametrize("name", ["linear bf16 K=8 M=128", "linear bf16 K=8 M=256"])
def test_without_the_fence_something_does(name):
    assert sass.hazards(product_on_hopper(name, FENCED=False))


class TestHazardCheck:
    """It finds planted faults and only those."""

    def test_products_read_operand_a_from_registers(self, listing):
        (body,) = sass.loops_with_products(sass.parse(listing))
        products = [instruction for instruction in body if instruction.opcode.startswith("HGMMA")]
        assert len(products) == 4
        assert all(len(sass.registers_of_a(product)) == 4 for product in products)

    def test_sound_code_passes(self, listing):
        assert sass.hazards(listing) == []

    def test_a_wait_that_leaves_one_product_in_flight_is_found(self, listing):
        assert "gsb0, 0x0" in listing
        assert sass.hazards(listing.replace("gsb0, 0x0", "gsb0, 0x1"))

    def test_a_write_in_the_next_round_is_found(self):
        assert sass.hazards(PLANTED) == ["/*0050*/ LDS.128 R4, [R40]"]

    def test_a_write_after_the_wait_passes(self):
        assert sass.hazards(PLANTED.replace("gsb0, 0x1", "gsb0, 0x0")) == []

    def test_operand_a_in_shared_memory_passes(self):
        assert sass.hazards(PLANTED.replace("R24, R4, gdesc", "R24, gdesc")) == []
