"""Samples that cannot be trained on: they are skipped and counted by cause, and too many of them stop the run."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import PIL.Image
from accelerate.utils import gather_object

from recipes_minigpt4.utils.errors import RecipeError, one_line
from recipes_minigpt4.utils.redaction import redact


# Why a sample is skipped. Everything that Pillow says beside these is an "unreadable picture".
NO_PICTURE = "no picture"
EMPTY_FILE = "empty file"
MISSING_FILE = "missing file"
HTML = "HTML instead of a picture"
NO_IMAGE = "no known image format"
TRUNCATED = "truncated picture"
BOMB = "decompression bomb"
UNREADABLE = "unreadable picture"
NO_CAPTION = "no caption"
NO_ANSWER = "no answer"
BROKEN_CHAT = "broken chat"
BROKEN_ARCHIVE = "broken archive"
BROKEN_JSON = "broken JSON"

EXAMPLES = 3  # of every cause are named
ENOUGH = 200  # samples before a share of them means something


class BadSampleError(Exception):
    """
    A sample that cannot be trained on.

    Args:
        cause: one of the causes above.
        detail: what a library said about it.
    """

    def __init__(self, cause: str, detail: str = "") -> None:
        super().__init__(cause, detail)
        self.cause, self.detail = cause, detail

    def record(self, name: str) -> dict[str, str]:
        """What travels with the batch, so that the main process can count it."""
        return {"cause": self.cause, "name": redact(f"{name} ({self.detail})" if self.detail else name)}


def picture_error(error: BaseException, content: bytes | None) -> BadSampleError:
    """
    Tell why a picture cannot be decoded.

    Args:
        error: what Pillow or the file system raised.
        content: the picture's bytes, if they could be read.
    """
    if isinstance(error, FileNotFoundError):
        return BadSampleError(MISSING_FILE)
    if content is not None and not content:
        return BadSampleError(EMPTY_FILE)
    if isinstance(error, PIL.Image.DecompressionBombError):
        return BadSampleError(BOMB, one_line(error))
    if isinstance(error, PIL.UnidentifiedImageError):
        return BadSampleError(HTML if (content or b"")[:512].lstrip()[:1] == b"<" else NO_IMAGE)
    text = (isinstance(error, OSError) and error.strerror) or one_line(error)  # an OSError repeats the path as well
    if any(word in text.lower() for word in ("truncat", "broken", "not enough", "unexpected end", "incomplete")):
        return BadSampleError(TRUNCATED, text)
    return BadSampleError(UNREADABLE, text)


@dataclass
class SampleCounts:
    """
    Samples that a run has drawn, those among them that it skipped, and how much of its batches were pads.

    Args:
        limit: share of skipped samples, 0 to 1, above which the run stops.
        enough: drawn samples before the share counts.
    """

    limit: float
    enough: int = ENOUGH
    drawn: int = 0
    causes: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    ahead: int = 0  # skipped before training, so not among the drawn ones
    tokens: int = 0  # in batches, pads not counted
    places: int = 0  # in batches, pads counted

    @property
    def skipped(self) -> int:
        return sum(self.causes.values())

    @property
    def pads(self) -> float:
        """Share of pads in batches, 0 to 1."""
        return 1 - self.tokens / self.places if self.places else 0.0

    def add(self, drawn: int, skipped: Sequence[Mapping[str, str]], tokens: int = 0, places: int = 0) -> None:
        """Count the samples of a batch, skipped ones included in `drawn`, its tokens, and its places with pads."""
        self.drawn += drawn
        self.tokens += tokens
        self.places += places
        self._name(skipped)

    def leave_out(self, skipped: Sequence[Mapping[str, str]]) -> None:
        """Count samples that are left out before training; they are reported, and no part of the share."""
        self.ahead += len(skipped)
        self._name(skipped)

    def _name(self, skipped: Sequence[Mapping[str, str]]) -> None:
        for record in skipped:
            self.causes[record["cause"]] += 1
            named = self.examples.setdefault(record["cause"], [])
            if len(named) < EXAMPLES and record["name"] not in named:
                named.append(record["name"])

    def state(self) -> dict[str, Any]:
        """The counts as plain values, for a checkpoint."""
        plain = {"drawn": self.drawn, "ahead": self.ahead, "causes": dict(self.causes)}
        return {**plain, "examples": self.examples, "tokens": self.tokens, "places": self.places}

    def take_up(self, state: Mapping[str, Any]) -> None:
        """Go on counting where a checkpoint was, which knew what was left out before training as well."""
        self.drawn, self.ahead, self.causes = state["drawn"], state["ahead"], Counter(state["causes"])
        self.examples = {cause: list(names) for cause, names in state["examples"].items()}
        self.tokens, self.places = state.get("tokens", 0), state.get("places", 0)  # checkpoints of before have none

    def over_all_processes(self, accelerator: Any) -> "SampleCounts":
        """The counts of all processes together; every process has to ask at the same time."""
        if accelerator.num_processes == 1:
            return self
        total = SampleCounts(self.limit, self.enough)
        for other in gather_object([self]):
            total.drawn += other.drawn
            total.ahead += other.ahead
            total.tokens += other.tokens
            total.places += other.places
            total.causes += other.causes
            for cause, names in other.examples.items():
                named = total.examples.setdefault(cause, [])
                named += [name for name in names if name not in named][: EXAMPLES - len(named)]
        return total

    def check(self, enough: int | None = None) -> None:
        """
        Stop a run of which too much is skipped, or all.

        Raises:
            RecipeError: with examples, if the share is above the limit and enough samples were drawn.
        """
        skipped, enough = self.skipped - self.ahead, self.enough if enough is None else enough
        if self.drawn >= enough and skipped and skipped == self.drawn:
            raise RecipeError(f"None of {self.drawn:,} samples can be used: {self.by_cause()}; fix the data.")
        if self.drawn >= enough and skipped > self.limit * self.drawn:
            raise RecipeError(
                f"{skipped:,} of {self.drawn:,} samples cannot be used, more than max_bad_share "
                f"({self.limit:.0%}): {self.by_cause()}; fix the data, or raise --max_bad_share."
            )

    def by_cause(self) -> str:
        """Causes with their counts and examples, the most frequent first."""
        return "; ".join(
            f"{count:,} × {cause}, such as {', '.join(self.examples[cause])}"
            for cause, count in self.causes.most_common()
        )

    def report(self) -> str:
        """A line for the end of a run."""
        if not self.skipped:
            return f"samples: {self.drawn:,} drawn, none skipped"
        when = f" ({self.ahead:,} before training)" if self.ahead else ""
        return f"samples: {self.drawn:,} drawn, {self.skipped:,} skipped{when}: {self.by_cause()}"
