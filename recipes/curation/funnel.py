"""How many pictures are left after each step, and why the others are not."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from recipes_minigpt4.curation.rows import CuratedRow
from recipes_minigpt4.curation.rules import RULES
from recipes_minigpt4.utils.text import format_table, heading


@dataclass(frozen=True)
class Funnel:
    """
    Args:
        drawn: pictures that were looked at.
        left_out: reason → pictures that were not used, or are gone since.
        described: those that were described, of which `continued` were asked to go on.
        mended: those whose description came back from the mender.
        rules: rule → texts that it refuses, each counted under every rule.
        left: texts that no rule refuses.
    """

    drawn: int
    left_out: dict[str, int]
    described: int
    continued: int
    mended: int
    rules: dict[str, int]
    left: int

    @classmethod
    def of(cls, left_out: Mapping[str, int], rows: Sequence[CuratedRow]) -> "Funnel":
        """Count rows, and what was left out before, by reason."""
        refused = Counter(rule for row in rows for rule in row.verdicts)
        return cls(
            drawn=len(rows) + sum(left_out.values()),
            left_out=dict(left_out),
            described=len(rows),
            continued=sum(row.continued for row in rows),
            mended=sum(row.mended is not None for row in rows),
            rules={rule: refused[rule] for rule in RULES if refused[rule]},
            left=sum(not row.verdicts for row in rows),
        )


def tell_funnel(funnel: Funnel) -> None:
    """Print it."""
    heading(f"{funnel.drawn:,} → {funnel.described:,} → {funnel.mended:,} → {funnel.left:,}\n")
    rows = [
        ["pictures drawn", f"{funnel.drawn:,}"],
        *([f"  left out: {reason}", f"{count:,}"] for reason, count in funnel.left_out.items()),
        ["described", f"{funnel.described:,}"],
        ["  asked to go on", f"{funnel.continued:,}"],
        ["mended", f"{funnel.mended:,}"],
        *([f"  refused: {rule}", f"{count:,}"] for rule, count in funnel.rules.items()),
        ["refused by no rule", f"{funnel.left:,}"],
    ]
    print(format_table(["", "pictures"], rows), flush=True)
