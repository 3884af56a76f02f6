"""
Run the numeric tests with the kernels that other processors choose: `make test-kernels`, about an hour on two cores.

MKL, oneDNN and PyTorch choose kernels by what a processor can do, and share sums out among threads. Another choice
adds in another order, and gives other last digits. Here they are made to choose otherwise, and every test has to pass.
What runs in a process of its own, such as the ranks of a run, inherits the kernels and keeps its one thread.
"""

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

import torch


TESTS = Path(__file__).resolve().parent
NUMERIC = re.compile(r"^from (closeness|parity_case) import|\btorch\.equal\(", re.MULTILINE)
KERNELS = {
    "default": {},
    "oldest": {"MKL_CBWR": "COMPATIBLE", "ONEDNN_MAX_CPU_ISA": "SSE41", "ATEN_CPU_CAPABILITY": "default"},
    "avx2": {"MKL_CBWR": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"},
    "avx512": {"MKL_CBWR": "AVX512", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE", "ATEN_CPU_CAPABILITY": "avx512"},
    # Half of one and half of another, as on processors that the libraries judge differently.
    "MKL oldest": {"MKL_CBWR": "COMPATIBLE"},
    "MKL avx2": {"MKL_CBWR": "AVX2"},
    "PyTorch avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
    # As `make test` has it on four cores: one thread where the tests say so, and four where they start threads.
    "four cores": {"OMP_NUM_THREADS": "4", "MKL_NUM_THREADS": "4"},
}
THREADS = (1, 2, 4)


def settings(kernels: str, threads: int) -> dict[str, str]:
    """The environment of a run."""
    number = str(threads)
    return {"OMP_NUM_THREADS": number, "MKL_NUM_THREADS": number, "TEST_THREADS": number, **KERNELS[kernels]}


def combinations(capability: str) -> list[tuple[str, int]]:
    """Kernels and numbers of threads; what a processor of this capability lacks is left out."""
    return [
        (kernels, threads)
        for kernels in KERNELS
        for threads in (THREADS if " " not in kernels else THREADS[:1])
        if kernels != "avx512" or capability == "AVX512"
    ]


def numeric_tests() -> list[str]:
    """The files that compare tensors."""
    return [str(path) for path in sorted(TESTS.rglob("test_*.py")) if NUMERIC.search(path.read_text(encoding="utf-8"))]


def run(kernels: str, threads: int, arguments: list[str]) -> bool:
    """Run the tests once, and print what has failed."""
    command = [sys.executable, "-m", "pytest", "--no-header", "--show-capture=no", "--tb=line", "--disable-warnings"]
    done = subprocess.run(
        [*command, *arguments], cwd=TESTS.parent, env={**os.environ, **settings(kernels, threads)},
        capture_output=True, text=True,
    )  # fmt: skip
    lines = done.stdout.splitlines() or done.stderr.splitlines() or ["nothing was printed"]
    print(f"{kernels:<13} {threads} threads  {lines[-1]}", flush=True)
    for line in lines:
        if line.startswith(("FAILED", "ERROR", "E  ")):
            print(f"    {line}", flush=True)
    return done.returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=list(KERNELS))
    parser.add_argument("--threads", nargs="+", type=int, choices=THREADS, default=list(THREADS))
    known, others = parser.parse_known_args()
    tests = [] if any(Path(each.split("::")[0]).exists() for each in others) else numeric_tests()
    chosen = [
        (kernels, threads)
        for kernels, threads in combinations(torch.backends.cpu.get_cpu_capability())
        if kernels in known.kernels and threads in known.threads
    ]
    passed = [run(kernels, threads, [*others, *tests]) for kernels, threads in chosen]
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
