"""
Fetch the common tests of the installed transformers, which its wheel leaves out and its source distribution holds.

Run as `python tests/common/fetch.py`. They go to `.cache/transformers-tests/<version>/tests`; a second run finds them
there and returns at once. Nothing of them becomes part of this repository.
"""

import contextlib
import os
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path, PurePosixPath


CACHE = Path(__file__).resolve().parents[2] / ".cache" / "transformers-tests"


def cached_tests() -> Path:
    """Where the tests of the installed transformers are, or will be once they are fetched."""
    return CACHE / version("transformers") / "tests"


def fetch(release: str) -> None:
    """Download the source distribution of a release and keep its `tests/*.py`; the folder appears when complete."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as folder:
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
        command += ["--no-binary", "transformers", "--retries", "2", "--timeout", "20", "--dest", folder]
        result = subprocess.run([*command, f"transformers=={release}"], capture_output=True, text=True)
        archive = next(Path(folder).glob("transformers-*.tar.gz"), None)
        if archive is None:
            raise SystemExit(
                f"pip could not download the source distribution of transformers {release} (exit code "
                f"{result.returncode}), whose common tests this suite runs; connect to a package index and repeat."
            )
        unpacked = Path(folder) / release
        unpack(archive, unpacked / "tests")
        with contextlib.suppress(OSError):  # another process was quicker and left the same files
            os.replace(unpacked, CACHE / release)


def unpack(archive: Path, folder: Path) -> None:
    """Write the files `transformers-*/tests/*.py` of a source distribution into `folder`."""
    folder.mkdir(parents=True)
    (folder / "__init__.py").touch()  # one of the tests executes it to import transformers
    with tarfile.open(archive) as files:
        for member in files:
            parts = PurePosixPath(member.name).parts
            if len(parts) == 3 and parts[1] == "tests" and parts[2].endswith(".py") and member.isfile():
                (folder / parts[2]).write_bytes(files.extractfile(member).read())


if __name__ == "__main__":
    if not cached_tests().is_dir():
        fetch(version("transformers"))
    print(f"Common tests of transformers {version('transformers')}: {cached_tests()}")
