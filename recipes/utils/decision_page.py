"""A page on which a person decides one case after the other with single keys, and the file of decisions it saves.

The page loads nothing from elsewhere. The browser keeps every decision at once, so closing the page loses none; a
button saves them as JSON lines. A line holds all that was shown and two hashes: one of what was shown, one of that and
the answer. Whoever reads the file so sees what belongs to other cases, and what was changed after it was saved.

Such pages share `KEEPING`, which keeps decisions in the browser and saves them. What a page looks like is its own.
"""

import hashlib
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from recipes_minigpt4.utils.errors import RecipeError, one_line
from recipes_minigpt4.utils.html import render_page


CASE, ANSWER, SEAL = "case", "answer", "seal"  # what a line has beside what was shown
TEXT, TIME = "text", "time"  # and may have: the text that belongs to the answer; when it was written into a journal
BESIDE = (CASE, ANSWER, SEAL, TEXT, TIME)
SKIP = "skip"  # the answer of who does not know, or not yet: the page shows such cases again if asked to


@dataclass(frozen=True)
class Choice:
    """An answer: its key on the keyboard, its word in the file, and what its button says."""

    key: str
    answer: str
    title: str


@dataclass(frozen=True)
class DecisionCase:
    """
    One thing to decide.

    Args:
        shown: name → text, all that makes this case what it is. It is written into the file and hashed.
        picture: which of the page's pictures stands beside it.
    """

    shown: Mapping[str, str]
    picture: str

    @property
    def id(self) -> str:
        return hash_of(self.shown)


@dataclass(frozen=True)
class DecisionPage:
    """
    What a page says around its cases.

    Args:
        title: of the page.
        about: what a person has to know before the first case.
        texts: title → name in `shown` of the texts that stand beside the picture.
        question: name in `shown` of what is asked.
        choices: the answers.
        file: name of the file that is saved; the browser keeps the decisions of each such name apart.
    """

    title: str
    about: str
    texts: Mapping[str, str]
    question: str
    choices: Sequence[Choice]
    file: str


def hash_of(shown: Mapping[str, str]) -> str:
    """What was shown, as one word."""
    return hashlib.sha256(json.dumps(dict(shown), sort_keys=True).encode()).hexdigest()[:32]


def seal_of(case: str, answer: str, text: str | None = None) -> str:
    """A case and the answer to it, as one word; with the sum of the text that belongs to the answer, if one does."""
    seal = hashlib.sha256(f"{case} {answer}".encode()).hexdigest()[:16]
    return seal if text is None else f"{seal}{zlib.crc32(text.encode('utf-8', 'replace')):08x}"


def seals_of(case: str, choices: Sequence[Choice]) -> dict[str, str]:
    """Answer → its seal, of all answers that there are."""
    return {choice.answer: seal_of(case, choice.answer) for choice in choices}


def json_for_page(content: Any) -> str:
    """JSON that no text in it can end the script around it."""
    return json.dumps(content).replace("<", "\\u003c")


# ---- the page -------------------------------------------------------------------------------------------------------


def render_decisions(page: DecisionPage, cases: Sequence[DecisionCase], pictures: Mapping[str, str]) -> str:
    """
    The page.

    Args:
        page: what stands around the cases.
        cases: in the order in which they are shown.
        pictures: name → data URI; each is in the page once.
    """
    deck = {
        "file": page.file,
        "skip": SKIP,
        "question": page.question,
        "choices": [[choice.key, choice.answer] for choice in page.choices],
        "pictures": dict(pictures),
        "cases": [
            {
                CASE: case.id,
                "picture": case.picture,
                "shown": dict(case.shown),
                "seals": seals_of(case.id, page.choices),
            }
            for case in cases
        ],
    }
    texts = "\n".join(
        f'<section><h2>{escape(title)}</h2><p data-text="{escape(name)}"></p></section>'
        for title, name in page.texts.items()
    )
    buttons = "\n".join(
        f'<button data-answer="{escape(one.answer)}"><kbd>{escape(one.key)}</kbd> {escape(one.title)}</button>'
        for one in page.choices
    )
    body = BODY.format(
        title=escape(page.title),
        about=escape(page.about),
        texts=texts,
        buttons=buttons,
        deck=json_for_page(deck),
        script=KEEPING + SCRIPT,
    )
    return render_page(page.title, body, STYLE)


STYLE = """
body { padding: 1rem 1.25rem 0; }
.deck h1 { font-size: 1.2rem; } .deck h2 { font-size: .8rem; font-weight: 400; color: var(--soft); margin: 1rem 0 0; }
.deck header p { margin: 0 0 .5rem; } .deck header details { color: var(--soft); margin-bottom: .5rem; }
.deck progress { width: 100%; accent-color: var(--curve); }
.deck main { display: grid; grid-template-columns: minmax(12rem, 24rem) 1fr; gap: 1.5rem; align-items: start; }
.deck main img { display: block; width: 100%; max-height: 70vh; object-fit: contain; }
.deck main p { margin: .1rem 0; white-space: pre-line; overflow-wrap: anywhere; }
.deck #question { margin-top: 1.25rem; font-size: 1.15rem; font-weight: 600; }
.deck footer { position: sticky; bottom: 0; display: flex; flex-wrap: wrap; gap: .5rem; padding: .75rem 0;
  margin-top: 1rem; background: var(--paper); border-top: 1px solid var(--line); }
.deck button { font: inherit; color: inherit; background: var(--card); border: 1px solid var(--soft);
  border-radius: .4rem; padding: .55rem .9rem; min-height: 2.75rem; cursor: pointer; }
.deck button[aria-pressed="true"] { border-color: var(--curve); box-shadow: inset 0 0 0 1px var(--curve); }
.deck button:disabled { opacity: .4; cursor: default; }
.deck #save { margin-left: auto; }
.deck kbd { font: .8rem ui-monospace, monospace; color: var(--soft); }
.deck [hidden] { display: none; }
@media (max-width: 40rem) {
  .deck h1 { font-size: 1rem; margin: 0 0 .25rem; } .deck h2 { margin-top: .5rem; }
  .deck main { grid-template-columns: 1fr; gap: .25rem; } .deck main img { max-height: 32vh; }
  .deck footer button { flex: 1 1 15%; padding: .4rem .1rem; } .deck footer kbd { display: none; }
  .deck #save { margin-left: 0; } .deck #question { margin-top: .75rem; font-size: 1rem; }
}
"""

BODY = """<div class="deck">
<header>
<h1>{title}</h1>
<details id="help"><summary>How this works</summary><p>{about}</p></details>
<progress id="bar" value="0"></progress>
<p class="soft" id="count" role="status"></p>
<p class="note" id="lost" hidden>This browser keeps nothing for this page. Save before you close it.</p>
</header>
<main id="case">
<img id="picture" alt="the picture">
<div>
{texts}
<p id="question"></p>
</div>
</main>
<p id="end" hidden></p>
<footer>
{buttons}
<button id="back"><kbd>←</kbd> Back</button>
<button id="again" hidden>Show skipped ones again</button>
<button id="save">Save</button>
</footer>
</div>
<script type="application/json" id="deck">{deck}</script>
<script>{script}</script>"""

KEEPING = """
"use strict";
const deck = JSON.parse(document.getElementById("deck").textContent);
const at = (id) => document.getElementById(id);
const answers = new Map();  // case → its answer; where a text belongs to it, a space and the text behind it
const slot = (one) => deck.file + " " + one.case;
const answerOf = (value) => value.split(" ", 1)[0];
const textOf = (value) => value.slice(answerOf(value).length + 1);

function keep(one, value) {
  if (value === null) answers.delete(one.case); else answers.set(one.case, value);
  if (deck.served) return;  // the command keeps it
  try {
    // "open" where the page began with a decision, which would come back otherwise
    const kept = value === null && deck.kept?.[one.case] ? "open" : value;
    if (kept === null) localStorage.removeItem(slot(one)); else localStorage.setItem(slot(one), kept);
  } catch { at("lost").hidden = false; }
}

function recall() {
  for (const one of deck.cases) {
    let kept = deck.kept?.[one.case] ?? null;
    if (!deck.served) {
      try { kept = localStorage.getItem(slot(one)) ?? kept; } catch { at("lost").hidden = false; }
    }
    if (kept !== null && answerOf(kept) in one.seals) answers.set(one.case, kept);
  }
}

function sum(text) {  // CRC-32
  let rest = -1;
  for (const byte of new TextEncoder().encode(text)) {
    rest ^= byte;
    for (let bit = 0; bit < 8; bit++) rest = (rest >>> 1) ^ (rest & 1 ? 0xedb88320 : 0);
  }
  return (~rest >>> 0).toString(16).padStart(8, "0");
}

function decision(one) {
  const answer = answerOf(answers.get(one.case)), text = textOf(answers.get(one.case));
  const line = { ...one.shown, case: one.case, answer: answer, seal: one.seals[answer] };
  return text ? { ...line, text: text, seal: line.seal + sum(text) } : line;
}

function save() {
  const lines = deck.cases.filter((one) => answers.has(one.case)).map((one) => JSON.stringify(decision(one)) + "\\n");
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob(lines, { type: "application/jsonl" }));
  link.download = deck.file;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
}
"""

SCRIPT = """
let place = 0;

function next(from) {
  const found = deck.cases.findIndex((one, number) => number >= from && !answers.has(one.case));
  return found >= 0 ? found : deck.cases.findIndex((one) => !answers.has(one.case));
}

function show() {
  const all = deck.cases.length, one = deck.cases[place];
  const skipped = deck.cases.filter((each) => answers.get(each.case) === deck.skip).length;
  at("bar").max = all; at("bar").value = answers.size;
  const told = skipped ? ", " + skipped + " of them skipped" : "";
  at("count").textContent = answers.size + " of " + all + " decided" + told;
  at("case").hidden = !one; at("end").hidden = Boolean(one); at("back").disabled = place === 0;
  at("again").hidden = Boolean(one) || !skipped;
  for (const button of document.querySelectorAll("[data-answer]")) {
    button.hidden = !one;
    button.setAttribute("aria-pressed", String(Boolean(one) && answers.get(one.case) === button.dataset.answer));
  }
  if (!one) { at("end").textContent = "That was the last one. Save the file, and name it to the command."; return; }
  at("picture").src = deck.pictures[one.picture] || "";
  for (const text of document.querySelectorAll("[data-text]")) {
    text.textContent = one.shown[text.dataset.text] || "(nothing)";
  }
  at("question").textContent = one.shown[deck.question];
  scrollTo(0, 0);
}

function decide(answer) {
  if (place >= deck.cases.length) return;
  at("help").open = false;
  keep(deck.cases[place], answer);
  const open = next(place + 1);
  place = open < 0 ? deck.cases.length : open;
  show();
}

function back() { if (place > 0) { place -= 1; show(); } }

function again() {
  for (const one of deck.cases) if (answers.get(one.case) === deck.skip) keep(one, null);
  place = next(0); show();
}

recall();
for (const button of document.querySelectorAll("[data-answer]")) {
  button.addEventListener("click", () => decide(button.dataset.answer));
}
at("back").addEventListener("click", back);
at("again").addEventListener("click", again);
at("save").addEventListener("click", save);
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
  const choice = deck.choices.find(([key]) => key === event.key.toLowerCase());
  if (choice) decide(choice[1]);
  else if (event.key === "ArrowLeft" || event.key === "Backspace") back();
  else return;
  event.preventDefault();
});
at("help").open = answers.size === 0;
place = next(0) < 0 ? deck.cases.length : next(0);
show();
"""


# ---- the file -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Decisions:
    """
    What a file says.

    Args:
        answers: case → answer.
        shown: case → what was shown.
        changed: how many lines are not as the page saved them.
        texts: case → the text that belongs to its answer, where one does.
    """

    answers: Mapping[str, str]
    shown: Mapping[str, Mapping[str, Any]]
    changed: int
    texts: Mapping[str, str]


def read_decisions(path: Path) -> Decisions:
    """
    Read a file that a page has saved, or a journal of decisions, in which the last line about a case counts.

    Raises:
        RecipeError: if it is no such file, or answers a case in two ways and is no journal.
    """
    told: dict[str, tuple[str, str | None]] = {}
    shown: dict[str, Mapping[str, Any]] = {}
    changed, torn = 0, set()
    for row in _rows(path):
        parts = {name: part for name, part in row.items() if name not in BESIDE}
        case, answer, text = str(row[CASE]), str(row[ANSWER]), row.get(TEXT)
        if case != hash_of(parts) or row[SEAL] != seal_of(case, answer, None if text is None else str(text)):
            changed += 1
            continue
        if told.get(case, (answer, text)) != (answer, text) and TIME not in row:
            torn.add(case)
        told[case], shown[case] = (answer, text), parts
    if torn:
        raise RecipeError(
            f"{path} decides {len(torn)} cases in two ways; keep what each person has saved in a file of its own."
        )
    answers = {case: answer for case, (answer, _) in told.items()}
    texts = {case: str(text) for case, (_, text) in told.items() if text is not None}
    return Decisions(answers, shown, changed, texts)


def _rows(path: Path) -> list[Mapping[str, Any]]:
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"The decisions {path} cannot be read ({one_line(error)}).") from error
    rows: list[Mapping[str, Any]] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            if rows and number == len(lines):  # half a line, which a kill leaves at the end of a journal
                break
            row = None
        if not isinstance(row, dict) or not {CASE, ANSWER, SEAL} <= set(row):
            raise RecipeError(f"Line {number} of {path} is no decision; name the file that the page has saved.")
        rows.append(row)
    if not rows:
        raise RecipeError(f"{path} holds no decisions; decide some on the page and save them.")
    return rows
