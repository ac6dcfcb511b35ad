"""Runs the core of the suite with another torch and Python, in an environment of its own that it deletes afterwards.

    python tests/versions.py --torch 2.6.0 --python python3.10 --json bench/results/versions.json

The core is what measures: no command line, no frameworks, no benchmarks, no shards. What an older torch or Triton
cannot do is left out by name, with the reason.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

# The checkout, also where the package is not installed.
sys.path.insert(0, str(Path(__file__).parents[1]))

from sharpkern._support.files import replacing

ROOT = Path(__file__).parents[1]

CORE = [f"tests/{room}" for room in ("search", "ops", "directions", "engines", "measures", "monitoring")]
PACKAGES = (
    "numpy typing-extensions typer rich scipy scikit-learn pandas matplotlib transformers accelerate lion-pytorch "
    "pytest pytest-xdist hypothesis setuptools"
).split()

# Facts of one Triton's compiler, and its interpreter with several of our kernels.
_TRITON = ["tests/ops/test_compile_only.py"]
LEFT_OUT: dict[tuple[int, int], dict[str, list[str]]] = {
    (99, 0): {"facts of the one Triton that constraints.txt pins": _TRITON},
    (2, 7): {
        "kernels need Triton 3.6; without it plain torch computes, with a warning": [
            "tests/ops/test_kernels.py",
            "tests/ops/test_ops.py::test_auto_takes_the_kernel_and_torch_for_what_the_kernel_refuses",
            "tests/ops/test_ops.py::test_auto_does_not_hide_what_goes_wrong_in_a_launch",
            "tests/ops/test_ops.py::test_a_triton_that_does_not_work_is_said_once",
            "tests/ops/test_ops.py::test_a_kernel_that_gives_wrong_numbers_is_not_used",
        ],
        "experts of transformers read data_ptr there, so that the in-place engine measures them": [
            f"tests/engines/test_engines.py::{test}[{engine}{model}]"
            for test, engines in {
                "test_losses_equal_those_of_deep_copies": ["virtual-", "batched-"],
                "test_any_number_of_step_sizes_is_batched": [""],
                "test_the_storage_oracle_agrees_with_the_virtual_engine": [""],
            }.items()
            for engine in engines
            for model in ("mixtral", "olmoe")
        ],
        "higher-order operators cannot be looked into, so that the in-place engine measures them": [
            "tests/engines/test_higher_order.py::test_functions_that_read_no_parameter[virtual]",
            "tests/engines/test_higher_order.py::test_functions_that_read_a_parameter_lead_to_the_engine_that_writes",
            "tests/engines/test_higher_order.py::test_the_storage_oracle_sees_what_the_functions_read",
        ],
        "torch.func.vmap has no rule for these": [
            "tests/engines/test_batched_closures.py::test_closures_that_are_batched[largest]",
            "tests/engines/test_batched_closures.py::test_other_closures_that_are_batched[checkpointed]",
            "tests/engines/test_batched_closures.py::test_other_closures_that_are_batched[with_gradients_on]",
            "tests/engines/test_bits.py::test_bits_are_those_of_the_weight_that_moved[batched]",
            "tests/engines/test_tail.py::test_anything_else_gives_the_bits_that_it_gave[batched-other_bits]",
        ],
        "torch's own: capturable AdamW fails, schedulers replace tensors or warn, instance_norm writes statistics": [
            "tests/directions/test_direction_optimizers.py::test_capturable_adam_is_within_ulps_of_what_the_step_writes",
            "tests/measures/test_fuzz.py::test_random_case[13]",
            "tests/measures/test_fuzz.py::test_random_case[14]",
            *(
                f"tests/monitoring/test_lr_cap.py::test_schedulers_never_see_the_cap[{name}]"
                for name in (
                    "CosineAnnealingWarmRestarts-tensor",
                    "ReduceLROnPlateau-tensor",
                    "SequentialLR-number",
                    "SequentialLR-tensor",
                )
            ),
            *(
                f"tests/engines/test_stepped.py::test_norms_over_the_batch[instance_norm-{several}-False"
                for several in ("x", "xw", "wb", "w")
            ),
        ],
        "the test asks for names or random numbers of a later torch or transformers": [
            "tests/engines/test_checkpointing.py",
            "tests/engines/test_closures.py::test_a_base_loss_of_another_dropout_mask_is_compared_and_not_used",
            "tests/engines/test_compiled_models.py::test_a_run_keeps_all_of_dynamos_graphs_to_itself",
        ],
    },
}
"""What is left out where torch is older than the version, by reason."""


def left_out(torch: str) -> dict[str, list[str]]:
    """What a torch cannot run, by reason."""
    version = tuple(map(int, torch.split(".")[:2]))
    return {reason: tests for below, table in LEFT_OUT.items() if version < below for reason, tests in table.items()}


def made(torch: str, python: str, environment: Path) -> Path:
    """Make an environment, and return it."""
    subprocess.run([python, "-m", "venv", environment], check=True)
    install = ["-m", "pip", "install", "-q", "--no-cache-dir", f"torch=={torch}", *PACKAGES]
    subprocess.run([environment / "bin" / "python", *install], check=True)
    return environment


def run(torch: str, environment: Path, report: Path, extra: Sequence[str]) -> dict[str, Any]:
    """Run the core, and return what came of it."""
    inside = environment / "bin" / "python"
    reasons = left_out(torch)
    without = [f"--deselect={test}" for tests in reasons.values() for test in tests]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [inside, "-m", "pytest", "-q", f"--junitxml={report}", *without, *extra, *CORE]
    done = subprocess.run(command, cwd=ROOT, env=variables, check=False)
    if done.returncode not in (0, 1):
        raise SystemExit(f"pytest ended with {done.returncode}")
    (suite,) = ElementTree.parse(report).getroot().iter("testsuite")
    count = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    look = "import json; from sharpkern.bench.environment import look; print(json.dumps(look()))"
    seen = subprocess.run([inside, "-c", look], cwd=ROOT, env=variables, check=True, capture_output=True, text=True)
    return {
        "environment": json.loads(seen.stdout.splitlines()[-1]),
        "passed": count["tests"] - count["failures"] - count["errors"] - count["skipped"],
        "failed": count["failures"] + count["errors"],
        "skipped": count["skipped"],
        "left_out": sorted(reasons),
    }


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch", required=True, help="a version of torch, such as 2.6.0")
    parser.add_argument("--python", default=sys.executable, help="an interpreter")
    parser.add_argument("--folder", type=Path, help="where the environment is made; several GB are needed")
    parser.add_argument("--environment", type=Path, help="one that is there already, in place of making one")
    parser.add_argument("--json", type=Path, help="add the record to this file")
    arguments, extra = parser.parse_known_args()
    folder = Path(tempfile.mkdtemp(dir=arguments.folder))
    try:
        environment = arguments.environment or made(arguments.torch, arguments.python, folder / "environment")
        record = run(arguments.torch, environment, folder / "report.xml", extra)
    finally:
        shutil.rmtree(folder)
    print(json.dumps(record, indent=1))
    if arguments.json:
        records = json.loads(arguments.json.read_text(encoding="utf-8")) if arguments.json.exists() else []
        with replacing(arguments.json) as beside:
            beside.write_text(json.dumps([*records, record], indent=1) + "\n", encoding="utf-8")
    sys.exit(record["failed"] > 0)


if __name__ == "__main__":
    main()
