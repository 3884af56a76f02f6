"""
Run the test suite on the newest releases there are, whatever the pins say: `make canary`.

It installs them into the environment of the Python that runs it, all but torch, which stays at its pin because another
one means gigabytes. Deprecations of our own making are errors (see `deprecations.py`). In the end it prints what is
newer than the pins and what that breaks; the exit code is that of the suite.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Mapping
from importlib.metadata import distributions
from pathlib import Path
from xml.etree import ElementTree


ROOT = Path(__file__).resolve().parents[1]
WATCHED = ("transformers", "trl", "peft", "accelerate", "datasets", "huggingface-hub")
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check")
SHOWN = 3  # tests of a group that are named


# ---- versions -------------------------------------------------------------------------------------------------------


def normalized(name: str) -> str:
    """A package's name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def read_pins(constraints: str) -> dict[str, str]:
    """Package → version, of the lines `name==version` of a constraints file."""
    lines = (line.split("#")[0].strip().partition("==") for line in constraints.splitlines())
    return {normalized(name): version.strip() for name, equal, version in lines if equal}


def compare(version: str, other: str) -> int:
    """1 for a later version, -1 for an earlier one, 0 for the same; a local part, as in torch's `+cpu`, is nothing."""
    from packaging.version import Version  # in a fresh environment, it comes with the newest releases

    one, two = (Version(each.split("+")[0]) for each in (version, other))
    return (one > two) - (one < two)


def version_rows(pins: Mapping[str, str], installed: Mapping[str, str], newest: Mapping[str, str]) -> list[list[str]]:
    """
    Rows of package, pin, installed version and what pip did not take: those watched, then others that differ.

    Args:
        pins: package → version that the constraints name.
        installed: package → version that is tested.
        newest: package → newest version that exists; of those watched only.
    """
    others = (name for name in sorted(pins) if name not in WATCHED and name in installed)
    rows = []
    for name in (*WATCHED, *(name for name in others if compare(installed[name], pins[name]))):
        here, latest = installed[name], newest.get(name, installed[name])
        rows.append([name, pins.get(name, "-"), here, latest if compare(latest, here) > 0 else ""])
    return rows


def table(rows: list[list[str]]) -> str:
    """Columns as wide as their widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


# ---- what breaks ----------------------------------------------------------------------------------------------------


def failures(report: Path) -> list[tuple[str, str]]:
    """Test and reason of everything that failed, from pytest's report in JUnit's format."""
    found = []
    for case in ElementTree.parse(report).iter("testcase"):
        for result in (*case.iter("failure"), *case.iter("error")):
            reason = next(filter(None, map(str.strip, result.get("message", "").splitlines())), "no reason given")
            found.append((f"{case.get('classname')}::{case.get('name')}", reason))
    return found


def grouped(failed: Iterable[tuple[str, str]]) -> str:
    """What failed for the same reason together, the largest group first; numbers and addresses make no difference."""
    groups: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for test, reason in failed:
        groups[re.sub(r"0x[0-9a-f]+|\d+", "#", reason)].append((test, reason))
    lines = []
    for group in sorted(groups.values(), key=len, reverse=True):
        lines.append(f"{len(group)} × {group[0][1][:200]}")
        lines += [f"    {test}" for test, _ in group[:SHOWN]]
        if len(group) > SHOWN:
            lines.append(f"    and {len(group) - SHOWN} more")
    return "\n".join(lines)


# ---- installing and running -----------------------------------------------------------------------------------------


def install(pins: Mapping[str, str]) -> None:
    """The newest releases that fit together, around the pinned torch."""
    torch = f"torch=={pins['torch']}"
    subprocess.run([*PIP, "install", "--quiet", torch], check=True)
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as constraint:
        constraint.write(torch)
        constraint.flush()
        newest = ["--upgrade", "--upgrade-strategy", "eager", "--constraint", constraint.name]
        subprocess.run([*PIP, "install", "--quiet", *newest, *WATCHED, "--editable", f"{ROOT}[test]"], check=True)
    subprocess.run([sys.executable, ROOT / "tests/common/fetch.py"])  # without it, transformers' own tests are skipped


def newest_releases() -> dict[str, str]:
    """What pip would take of each watched package if it needed no other; nothing where pip cannot say."""
    command = [*PIP, "install", "--dry-run", "--ignore-installed", "--no-deps", "--quiet", "--report", "-", *WATCHED]
    done = subprocess.run(command, capture_output=True, text=True)
    found = json.loads(done.stdout)["install"] if done.returncode == 0 else []
    return {normalized(each["metadata"]["name"]): each["metadata"]["version"] for each in found}


def run_suite(arguments: list[str]) -> tuple[int, list[tuple[str, str]]]:
    """Run the tests where one can watch them; pytest's exit code and what has failed."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "--tb=short", f"--junitxml={report}", *arguments]
        suite = subprocess.run(command, cwd=ROOT, env={**os.environ, "DEPRECATIONS": "error"})
        return suite.returncode, failures(report) if report.exists() else []


def main(given: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", default="2", help="processes that run tests")
    options, arguments = parser.parse_known_args(given)  # what is unknown goes to pytest
    if sys.prefix == sys.base_prefix:
        parser.error("this would change the system's own Python; run it by `make canary`, or in a virtual environment")
    pins = read_pins((ROOT / "constraints.txt").read_text(encoding="utf-8"))
    print("Installing the newest releases, which takes minutes.", flush=True)
    install(pins)
    installed = {normalized(each.metadata["Name"]): each.version for each in distributions()}
    rows = [["package", "pin", "installed", "newer, not taken"], *version_rows(pins, installed, newest_releases())]
    print(f"\n{table(rows)}\n", flush=True)
    returncode, failed = run_suite(["--numprocesses", options.jobs, *arguments])
    print(f"\n{table(rows)}\n\n{grouped(failed) or f'No test failed; pytest ended with exit code {returncode}.'}")
    return returncode


if __name__ == "__main__":
    sys.exit(main())
