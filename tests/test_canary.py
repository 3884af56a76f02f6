"""What `make canary` makes of versions and of a suite that failed."""

from pathlib import Path

import canary
import pytest


PINS = """# What was tested.
huggingface_hub==2.4.0  # a remark
torch==2.13.0
transformers==5.24.0
numpy==2.4.6
pandas==3.1.1

not a pin
"""


def test_pins_are_read_by_the_names_that_indexes_use() -> None:
    pins = {
        "huggingface-hub": "2.4.0",
        "torch": "2.13.0",
        "transformers": "5.24.0",
        "numpy": "2.4.6",
        "pandas": "3.1.1",
    }
    assert canary.read_pins(PINS) == pins
    everything = canary.read_pins((canary.ROOT / "constraints.txt").read_text())
    assert {*canary.WATCHED, "torch"} <= everything.keys()


@pytest.mark.parametrize(
    ("version", "other", "expected"),
    [
        ("5.9.1", "5.24.0", -1),
        ("5.24", "5.24.0", 0),
        ("2.13.0+cpu", "2.13.0", 0),
        ("2.14.0+cpu", "2.13.0", 1),
        ("6.0.0rc1", "6.0.0", -1),
        ("6.0.0.dev0", "5.24.0", 1),
    ],
)
def test_versions_are_compared_as_versions(version: str, other: str, expected: int) -> None:
    assert canary.compare(version, other) == expected


def test_the_table_shows_what_is_new_and_what_was_not_taken() -> None:
    installed = dict.fromkeys(canary.WATCHED, "1.0") | {
        "transformers": "5.25.0", "huggingface-hub": "2.9.1", "torch": "2.13.0+cpu", "numpy": "2.5.0", "other": "1",
        "pandas": "3.0.9",
    }  # fmt: skip
    newest = {"transformers": "5.25.0", "huggingface-hub": "3.0.0"}
    rows = canary.version_rows(canary.read_pins(PINS), installed, newest)
    assert [row[0] for row in rows] == [*canary.WATCHED, "numpy", "pandas"]  # torch is the one that is pinned
    assert ["transformers", "5.24.0", "5.25.0", ""] in rows
    assert ["huggingface-hub", "2.4.0", "2.9.1", "3.0.0"] in rows
    assert ["peft", "-", "1.0", ""] in rows
    assert ["pandas", "3.1.1", "3.0.9", ""] in rows
    assert canary.table([["a", "long"], ["longer", ""]]) == "a       long\nlonger"


def test_a_suite_that_fails_is_told_by_reasons(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    tests = tmp_path / "test_new_release.py"
    tests.write_text("""
import pytest
@pytest.fixture
def broken():
    raise OSError("no such name")
@pytest.mark.parametrize("number", range(5))
def test_many(number):
    raise TypeError(f"forward() got {number} arguments")
def test_setup(broken):
    pass
def test_good():
    pass
""")
    options = ["-c", "/dev/null", "-p", "no:cacheprovider"]
    returncode, failed = canary.run_suite([str(tests), *options])
    assert returncode == 1 and len(failed) == 6
    told = canary.grouped(failed).splitlines()
    assert told[0] == "5 × TypeError: forward() got 0 arguments"
    assert told[1].endswith("test_new_release::test_many[0]") and told[4] == "    and 2 more"
    assert told[5].startswith("1 × ") and "no such name" in told[5] and len(told) == 7
    assert canary.run_suite([f"{tests}::test_good", *options]) == (0, [])
    assert "5 failed" in capfd.readouterr().out


@pytest.mark.parametrize("returncode", [0, 1, 4])
def test_it_ends_as_the_suite_does(returncode: int, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    asked = []
    monkeypatch.setattr(canary, "install", lambda pins: asked.append(pins["torch"]))
    monkeypatch.setattr(canary, "newest_releases", lambda: {"trl": "999.0"})
    failed = [("test_forward::test_it", "TypeError: cache")] if returncode == 1 else []
    monkeypatch.setattr(canary, "run_suite", lambda arguments: (asked.append(arguments), (returncode, failed))[1])
    assert canary.main(["--jobs", "3", "-x"]) == returncode
    assert asked[1:] == [["--numprocesses", "3", "-x"]]
    said = capsys.readouterr().out
    assert said.count("999.0") == 2
    assert ("TypeError: cache" in said) is (returncode == 1) and ("exit code 4" in said) is (returncode == 4)


def test_the_system_s_own_python_is_left_alone(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(canary.sys, "prefix", canary.sys.base_prefix)
    monkeypatch.setattr(canary, "install", None)
    with pytest.raises(SystemExit):
        canary.main([])
    assert "make canary" in capsys.readouterr().err
