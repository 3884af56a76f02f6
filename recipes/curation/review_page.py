"""The page on which people go through curated rows: keep, drop or edit each, with a key for everything."""

import base64
import difflib
import io
import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from recipes_minigpt4.curation.rows import CuratedRow
from recipes_minigpt4.evaluation.questions import Picture
from recipes_minigpt4.utils.decision_page import CASE, KEEPING, STYLE, Choice, hash_of, json_for_page, seals_of
from recipes_minigpt4.utils.html import render_page


KEEP, DROP, EDIT = "keep", "drop", "edit"
CHOICES = (Choice("k", KEEP, "Keep"), Choice("d", DROP, "Drop"), Choice("e", EDIT, "Edit"))
SIDE = 384  # pixels of a picture's longer side
ABOUT = (
    "k keeps a row, d drops it, e lets you write its text anew. n or → goes to the next row, p or ← to the one "
    "before, and u undoes what you decided last. Struck words of the draft are gone, underlined ones are new. "
)
KEPT_BY = {
    False: "This browser keeps your decisions, so you may close the page and go on later. Save the file at the end.",
    True: "Every decision is written into the command's file at once.",
}
WORD = re.compile(r"\s*(?:\w+(?:['’-]\w+)*|[^\w\s]+)|\s+$")  # a word or a mark, and the space before it
Parts = list[tuple[int, str]]  # pieces of a text, and whether each differs (1) or not (0)


def shown_of(row: CuratedRow) -> dict[str, str]:
    """What a decision is about: a picture and a text. Another text under the picture is another decision."""
    return {"picture": row.picture, "shown": row.text or ""}


def case_of(row: CuratedRow) -> str:
    """What a decision is about, as one word."""
    return hash_of(shown_of(row))


def changed_words(draft: str, text: str) -> tuple[Parts, Parts]:
    """The pieces of a draft, those that are gone marked; and those of what became of it, those that are new marked."""
    old, new = WORD.findall(draft), WORD.findall(text)
    bare = [[word.strip() for word in words] for words in (old, new)]
    gone: Parts = []
    came: Parts = []
    match = difflib.SequenceMatcher(a=bare[0], b=bare[1], autojunk=False)
    for kind, start, end, begin, stop in match.get_opcodes():
        differs = int(kind != "equal")
        gone += [(differs, "".join(old[start:end]))] if end > start else []
        came += [(differs, "".join(new[begin:stop]))] if stop > begin else []
    return gone, came


def picture_uri(path: Path) -> str | None:
    """A small copy of a picture as a data URI; None if it cannot be read."""
    try:
        small = Picture(path.name, path).open()
    except (ValueError, OSError):
        return None
    small.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, format="JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def render_review(
    title: str,
    rows: Sequence[CuratedRow],
    pictures: Mapping[str, str | None],
    file: str,
    *,
    kept: Mapping[str, str] | None = None,
    notes: Mapping[str, Sequence[str]] | None = None,
    served: bool = False,
) -> str:
    """
    The page.

    Args:
        title: of the page.
        rows: in the order in which they are shown at first.
        pictures: digest → address; None for one that is missing.
        file: name of the file that is saved; the browser keeps the decisions of each such name apart.
        kept: case → answer, with a space and the new text behind that of an edit: where the page begins.
        notes: case → what else is to be said about it, such as what others decided.
        served: send every decision to the command that serves the page.
    """
    deck = {
        "file": file,
        "served": served,
        "kept": dict(kept or {}),
        "pictures": dict(pictures),
        "rules": list(dict.fromkeys(rule for row in rows for rule in row.verdicts)),
        "scores": list(dict.fromkeys(name for row in rows for name in row.scores)),
        "cases": [_case(row, (notes or {}).get(case_of(row), ())) for row in rows],
    }
    buttons = "\n".join(
        f'<button data-answer="{one.answer}"><kbd>{one.key}</kbd> {one.title}</button>' for one in CHOICES
    )
    body = BODY.format(
        title=escape(title),
        about=escape(ABOUT + KEPT_BY[served]),
        buttons=buttons,
        save="Save a copy" if served else "Save",
        deck=json_for_page(deck),
        script=KEEPING + SCRIPT,
    )
    return render_page(title, body, STYLE + MORE_STYLE)


def _case(row: CuratedRow, notes: Sequence[str]) -> dict[str, Any]:
    gone, came = changed_words(row.draft, row.text or "")
    mended = (row.mended or "").strip()
    case = case_of(row)
    return {
        CASE: case,
        "shown": shown_of(row),
        "seals": seals_of(case, CHOICES),
        "draft": gone if row.text else [(0, row.draft)],
        "text": came,
        "written": row.draft if not row.text else "",  # what an edit begins with where there is no text
        "said": mended if mended and mended != row.text else "",
        "rules": dict(row.verdicts),
        "scores": dict(row.scores),
        "notes": list(notes),
    }


MORE_STYLE = """
body { max-width: 90rem; }
.deck main section { min-width: 0; } .deck .texts { display: grid; gap: 0 1.5rem; }
@media (min-width: 60rem) { .deck .texts { grid-template-columns: 1fr 1fr; } }
.deck del { color: var(--wrong); } .deck ins { color: var(--right); font-weight: 600; text-underline-offset: .2em; }
.deck .told { padding: 0; margin: .75rem 0 0; list-style: none; } .deck .told li { margin: .15rem 0; }
.deck #rules li { color: var(--warm); } .deck #rules.none li { color: var(--soft); }
.deck #rules b { color: var(--ink); }
.deck textarea { width: 100%; min-height: 14rem; font: inherit; color: inherit; background: var(--card);
  border: 1px solid var(--soft); border-radius: .35rem; padding: .5rem; }
.deck #filters { margin-bottom: .5rem; } .deck #filters > div { display: flex; flex-wrap: wrap; gap: .5rem 1rem; }
.deck label { display: inline-flex; gap: .4rem; align-items: center; color: var(--soft); font-size: .875rem; }
.deck select, .deck input { font: inherit; color: var(--ink); background: var(--card); border: 1px solid var(--soft);
  border-radius: .35rem; padding: .3rem; max-width: 15rem; } .deck input { width: 6rem; }
.deck #missing { color: var(--wrong); }
@media (max-width: 40rem) {
  .deck #mended { order: -1; } .deck header p { margin: 0 0 .25rem; }
  .deck footer button { flex: 1 1 22%; } .deck main h2 { margin-top: .25rem; }
}
"""

BODY = """<div class="deck">
<header>
<h1>{title}</h1>
<details id="help"><summary>How this works</summary><p>{about}</p></details>
<details id="filters"><summary id="chosen"></summary><div>
<label>verdict <select id="by-rule"></select></label>
<label>decision <select id="by-answer">
<option value="">any</option><option value="open">none yet</option><option value="keep">keep</option>
<option value="drop">drop</option><option value="edit">edit</option></select></label>
<label>score <select id="score"></select></label>
<label>from <input id="from" type="number" step="any"></label>
<label>to <input id="to" type="number" step="any"></label>
<label>order <select id="order"><option value="">as drawn</option>
<option value="up">lowest score first</option><option value="down">highest score first</option></select></label>
</div></details>
<progress id="bar" value="0"></progress>
<p class="soft" id="count" role="status"></p>
<p class="note" id="lost" hidden>This browser keeps nothing for this page. Save before you close it.</p>
<p class="note" id="unsent" hidden>The command that writes decisions does not answer. Save a copy before you close this
page; it has everything.</p>
</header>
<main id="case">
<div><img id="picture" alt="the picture"><p id="missing" hidden>The picture is not there any more.</p></div>
<div>
<div class="texts">
<section><h2>Draft</h2><p id="draft"></p></section>
<section id="mended"><h2 id="whose">Mended</h2><p id="text"></p><textarea id="new" hidden></textarea></section>
</div>
<p class="soft" id="said"></p>
<ul class="told" id="notes"></ul>
<ul class="told" id="rules"></ul>
<p class="soft" id="scores"></p>
</div>
</main>
<p id="end" hidden></p>
<footer>
<button id="use" hidden><kbd>Ctrl Enter</kbd> Use this text</button>
<button id="cancel" hidden><kbd>Esc</kbd> Leave it</button>
{buttons}
<button id="back"><kbd>p</kbd> Back</button>
<button id="next"><kbd>n</kbd> Next</button>
<button id="undo"><kbd>u</kbd> Undo</button>
<button id="save">{save}</button>
</footer>
</div>
<script type="application/json" id="deck">{deck}</script>
<script>{script}</script>"""

SCRIPT = """
const past = [];  // what undo takes back: [the case, its answer before]
const unsent = new Set();
let view = [], place = 0, editing = false, sending = Promise.resolve();
const current = () => view[place];

// ---- which rows, in which order

function option(value, text) {
  const made = document.createElement("option");
  made.value = value; made.textContent = text;
  return made;
}

function offer() {
  const clean = deck.cases.filter((one) => !Object.keys(one.rules).length).length;
  at("by-rule").append(option("", "any"), option("-", "no rule (" + clean + ")"));
  for (const rule of deck.rules) {
    at("by-rule").append(option(rule, rule + " (" + deck.cases.filter((one) => rule in one.rules).length + ")"));
  }
  for (const score of deck.scores) at("score").append(option(score, score));
  for (const id of ["score", "from", "to", "order"]) at(id).parentElement.hidden = !deck.scores.length;
}

function fits(one) {
  const rule = at("by-rule").value, answer = at("by-answer").value, score = one.scores[at("score").value];
  const told = answers.has(one.case) ? answerOf(answers.get(one.case)) : "open";
  if (rule === "-" ? Object.keys(one.rules).length : rule && !(rule in one.rules)) return false;
  if (answer && answer !== told) return false;
  const from = at("from").valueAsNumber, to = at("to").valueAsNumber;
  return (isNaN(from) || score >= from) && (isNaN(to) || score <= to);
}

function choose() {  // anew when a filter changes, and not while one decides: rows do not run away
  const name = at("score").value, order = at("order").value;
  view = deck.cases.filter(fits);
  if (order) {
    const value = (one) => one.scores[name] ?? (order === "up" ? Infinity : -Infinity);  // rows without come last
    const sign = order === "up" ? 1 : -1;
    view.sort((one, other) => value(one) === value(other) ? 0 : value(one) < value(other) ? -sign : sign);
  }
  const open = view.findIndex((one) => !answers.has(one.case));
  place = open < 0 ? 0 : open;
}

// ---- what is seen

function write(element, parts, tag) {
  element.replaceChildren(...parts.flatMap(([differs, text]) => {
    if (!differs) return [text];
    const made = document.createElement(tag), words = text.trimStart();
    made.textContent = words;
    return [text.slice(0, text.length - words.length), made];  // the space before them is not marked
  }));
}

function list(element, lines) {
  element.replaceChildren(...lines.map(([name, text]) => {
    const line = document.createElement("li"), bold = document.createElement("b");
    bold.textContent = name;
    line.append(bold, " ", text);
    return line;
  }));
}

function tell() {
  const told = { keep: 0, drop: 0, edit: 0 };
  for (const value of answers.values()) told[answerOf(value)] += 1;
  at("bar").max = deck.cases.length; at("bar").value = answers.size;
  at("count").textContent = (current() ? "Row " + (place + 1) + " of " + view.length + " · " : "") +
    answers.size + " of " + deck.cases.length + " decided: " +
    told.keep + " kept, " + told.drop + " dropped, " + told.edit + " edited";
  const few = view.length === deck.cases.length ? "all " : view.length + " of ";
  at("chosen").textContent = "Sort and filter: " + few + deck.cases.length + " rows";
}

function show() {
  const one = current(), value = one && answers.get(one.case);
  tell();
  at("case").hidden = !one; at("end").hidden = Boolean(one);
  at("back").disabled = place === 0; at("next").disabled = !one; at("undo").disabled = !past.length;
  for (const button of document.querySelectorAll("footer button")) {
    button.hidden = editing !== ["use", "cancel"].includes(button.id);
  }
  for (const button of document.querySelectorAll("[data-answer]")) {
    button.disabled = !one || (button.dataset.answer === "keep" && !one.text.length);
    button.setAttribute("aria-pressed", String(Boolean(value) && answerOf(value) === button.dataset.answer));
  }
  at("text").hidden = editing; at("new").hidden = !editing;
  if (!one) { at("end").textContent = ending(); return; }
  const edited = value ? textOf(value) : "";
  look(one);
  write(at("draft"), one.draft, "del");
  at("whose").textContent = editing || edited ? "Your text" : "Mended";
  if (edited) at("text").textContent = edited; else write(at("text"), one.text, "ins");
  if (!edited && !one.text.length) at("text").textContent = "(nothing)";
  at("said").textContent = one.said ? "The mender said: " + one.said : "";
  const rules = Object.entries(one.rules);
  at("rules").classList.toggle("none", !rules.length);
  list(at("rules"), rules.length ? rules : [["", "No rule says anything."]]);
  list(at("notes"), one.notes.map((note) => ["", note]));
  const scores = Object.entries(one.scores).map(([name, score]) => name + " " + Number(score.toFixed(3)));
  at("scores").textContent = scores.join(" · ");
}

function look(one) {
  const address = deck.pictures[one.shown.picture];
  if (at("picture").dataset.of !== one.case) {
    at("picture").dataset.of = one.case;
    at("picture").hidden = !address; at("missing").hidden = Boolean(address);
    if (address) at("picture").src = address; else at("picture").removeAttribute("src");
    scrollTo(0, 0);
  }
  const coming = view[place + 1] && deck.pictures[view[place + 1].shown.picture];
  if (deck.served && coming) new Image().src = coming;
}

function ending() {
  if (!view.length) return "No row fits what is chosen above.";
  const left = deck.cases.length - answers.size;
  if (left) return "These rows are decided. " + left + " others are not; they are behind “Sort and filter”.";
  return deck.served ? "All rows are decided, and the file has them. Ctrl-C ends the command."
    : "All rows are decided. Save the file, and name it to the command.";
}

// ---- what is decided

function put(one, value) {
  keep(one, value);
  if (!deck.served) return;
  unsent.add(one);
  sending = sending.then(send);
}

async function send() {
  for (const one of [...unsent]) {
    const line = answers.has(one.case) ? decision(one) : { case: one.case, answer: "open" };
    unsent.delete(one);
    try {
      const headers = { "content-type": "application/json" };
      const reply = await fetch("decision", { method: "POST", headers: headers, body: JSON.stringify(line) });
      if (!reply.ok) throw new Error(reply.status);
    } catch {
      unsent.add(one); at("unsent").hidden = false;
      return;
    }
  }
  at("unsent").hidden = true;
}

function decide(value) {
  const one = current();
  if (!one || (value === "keep" && !one.text.length)) return;
  at("help").open = false;
  past.push([one, answers.get(one.case) ?? null]);
  put(one, value);
  const open = (from) => view.findIndex((each, number) => number >= from && !answers.has(each.case));
  const next = open(place + 1) < 0 ? open(0) : open(place + 1);
  place = next < 0 ? view.length : next;
  show();
}

function undo() {
  const last = past.pop();
  if (!last) return;
  put(...last);
  if (!view.includes(last[0])) {
    for (const control of document.querySelectorAll("#filters select, #filters input")) {
      if (control.id !== "score") control.value = "";
    }
    choose();
  }
  place = view.indexOf(last[0]);
  show();
}

function step(by) {
  place = Math.max(0, Math.min(view.length, place + by));
  show();
}

function edit() {
  const one = current();
  if (!one) return;
  editing = true;
  const value = answers.get(one.case);
  at("new").value = (value && textOf(value)) || one.shown.shown || one.written;
  show();
  at("new").focus({ preventScroll: true });
  at("new").scrollIntoView({ block: "center" });
}

function use() {
  const text = at("new").value.trim(), one = current();
  if (!text) return;
  editing = false;
  at("new").blur();
  decide(text === one.shown.shown ? "keep" : "edit " + text);
}

function leave() { editing = false; at("new").blur(); show(); }

// ---- keys and buttons

const KEYS = { k: () => decide("keep"), d: () => decide("drop"), e: edit, n: () => step(1), p: () => step(-1), u: undo,
  ArrowRight: () => step(1), ArrowLeft: () => step(-1) };
document.addEventListener("keydown", (event) => {
  if (editing) {
    if (event.key === "Escape") leave();
    else if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) use();
    return;
  }
  const held = event.ctrlKey || event.metaKey || event.altKey || event.repeat;
  if (held || event.target.matches?.("select, input")) return;
  const act = KEYS[event.key.length === 1 ? event.key.toLowerCase() : event.key];
  if (!act) return;
  event.preventDefault();
  act();
});
const BUTTONS = { use: use, cancel: leave, back: KEYS.p, next: KEYS.n, undo: undo, save: save };
for (const [id, act] of Object.entries(BUTTONS)) {
  at(id).addEventListener("click", act);
}
for (const button of document.querySelectorAll("[data-answer]")) {
  button.addEventListener("click", KEYS[button.dataset.answer[0]]);
}
at("new").addEventListener("input", () => { at("use").disabled = !at("new").value.trim(); });
for (const control of document.querySelectorAll("#filters select, #filters input")) {
  control.addEventListener("change", () => { choose(); show(); if (control.matches("select")) control.blur(); });
}
at("picture").addEventListener("error", () => { at("picture").hidden = true; at("missing").hidden = false; });
addEventListener("beforeunload", (event) => { if (unsent.size) event.preventDefault(); });

recall();
offer();
choose();
at("help").open = answers.size === 0;
if (view.length && view.every((one) => answers.has(one.case))) place = view.length;
show();
"""
