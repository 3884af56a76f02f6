"""The page's chat in a real browser: upload, a reply that grows, stop, more turns, and the way back."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from app_server import Served, alone, serve, slow, wait_until
from browser import Browser
from PIL import Image

from recipes_minigpt4.serving.app_chat import JOINER
from recipes_minigpt4.serving.models import Talker


FIRST, SECOND, THIRD = "Describe the image in detail.", "Is there a star?", "What do you see?"
SEND, STOP = "#chat-box [data-testid=submit-button]", "#chat-box .stop-button"
# Gradio makes the page twice while it loads; this is true once the text box has stayed the same for 15 looks at it.
SETTLED = (
    f"(window.looks = window.box === (window.box = document.querySelector('{SEND}')) && !!window.box"
    " ? (window.looks || 0) + 1 : 0) > 15"
)
ODD = "And <b>this</b> &lt; <image> <img src=http://192.0.2.1/a.png> ![one](http://192.0.2.1/b.png)?"
TEXTS = "[...document.querySelectorAll('#chat-log .message-content')].map(one => one.textContent)"


@pytest.fixture(scope="module")
def picture(scenes: list[Image.Image], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("example") / "A scene.png"
    scenes[0].save(path)
    return path


@pytest.fixture(scope="module")
def served(talkers: dict[str, Talker], picture: Path) -> Iterator[Served]:
    """A page with two models and an example."""
    models = {"ours": talkers["ours"], "llava": talkers["llava"]}
    with serve(models, "--examples", str(picture.parent)) as page:
        yield page


class Visitor:
    """Somebody at the page."""

    def __init__(self, browser: Browser, url: str) -> None:
        self.browser = browser
        browser.resize(1200, 800)
        browser.open(url)
        browser.wait_for(SETTLED)

    def write(self, text: str, selector: str = "#chat-box textarea") -> None:
        self.browser.wait_for(f"!!document.querySelector('{selector}')")
        self.browser.evaluate(f"document.querySelector('{selector}').select()")
        self.browser.evaluate(f"document.querySelector('{selector}').focus()")
        self.browser.write(text)

    def add(self, picture: Path) -> None:
        self.browser.choose_file("#chat-box input[type=file]", picture)
        self.browser.wait_for("!!document.querySelector('#chat-box img')")

    def send(self) -> None:
        self.browser.wait_for(f"!!document.querySelector('{SEND}')")
        self.browser.click(SEND)

    def ask(self, text: str) -> None:
        self.write(text)
        self.send()

    def press(self, name: str) -> None:
        """Press the button of a message."""
        button = f"document.querySelector('#chat-log [aria-label={name}]')"
        self.browser.wait_for(f"!!{button} && !{button}.disabled && !!document.querySelector('{SEND}')")
        self.browser.evaluate(f"{button}.click()")

    def texts(self) -> list[str]:
        return self.browser.evaluate(TEXTS)

    def shows(self, texts: list[str]) -> None:
        """See that the chat comes to be so."""
        with contextlib.suppress(AssertionError):
            wait_until(lambda: self.texts() == texts)
        assert self.texts() == texts


@pytest.mark.browser
def test_a_chat_from_upload_to_restart(served: Served, picture: Path, scenes, browser: Browser) -> None:
    ours = served.talkers["ours"]
    whole = alone(ours, (FIRST, scenes[:1]), (SECOND, ()))
    person = Visitor(browser, served.url)
    person.add(picture)
    person.write(FIRST)
    with slow(ours, 0.3):
        person.send()
        wait_until(lambda: len(person.texts()) == 2 and person.texts()[1])
        assert browser.evaluate("document.querySelector('#chat-log .user img').naturalWidth") == scenes[0].width
        browser.click(STOP)
        browser.wait_for(f"!!document.querySelector('{SEND}')")
        said = person.texts()[1]
    assert said != whole[1] and whole[1].startswith(said)
    person.press("Retry")
    person.shows(whole[:2])
    person.ask(SECOND)
    person.shows(whole)
    person.press("Undo")
    person.shows(whole[:2])
    assert browser.evaluate("document.querySelector('#chat-box textarea').value") == SECOND
    person.ask(THIRD)
    person.shows(alone(ours, (FIRST, scenes[:1]), (THIRD, ())))
    person.press("Edit")  # the first question's
    person.write(SECOND, "#chat-log textarea")
    person.press("Submit")
    person.shows(alone(ours, (SECOND, scenes[:1])))
    browser.click("#chat-restart")
    person.shows([])
    assert [chat.exchanges() for chat in served.page.chats] == [[]]


@pytest.mark.browser
def test_the_page_fits_asks_this_machine_alone_and_tells_errors(served: Served, browser: Browser, tmp_path) -> None:
    (tmp_path / "fake.png").write_text("no picture")
    person = Visitor(browser, served.url)
    browser.click("#chat-log .example")
    browser.wait_for("document.querySelector('#chat-box textarea').value.startsWith('Describe')")
    browser.wait_for("document.querySelector('#chat-box img')?.naturalWidth > 0")
    person.send()
    # A reply that has begun, and a button to send: until then, the text box is still to be emptied.
    browser.wait_for(f"{TEXTS}.length === 2 && {TEXTS}[1] !== '' && !!document.querySelector('{SEND}')")
    person.add(tmp_path / "fake.png")
    person.ask(ODD)
    browser.wait_for("!!document.querySelector('.toast-body')")
    told = browser.evaluate("document.querySelector('.toast-body').textContent")
    assert "fake.png is in no format that is known here (JPEG, MPO, PNG," in told
    browser.wait_for("document.querySelector('#chat-box textarea').value.startsWith('And')")
    assert len(person.texts()) == 2
    browser.evaluate("document.querySelector('#chat-box .delete-button').click()")
    browser.wait_for("!document.querySelector('#chat-box img')")
    person.send()
    browser.wait_for(f"{TEXTS}.length === 4 && {TEXTS}[3] !== ''")
    assert person.texts()[2].replace(JOINER, "") == ODD
    assert browser.evaluate("document.querySelectorAll('#chat-log .message-content :is(b, img)').length") == 0
    for width in (1200, 400):
        for dark in (False, True):
            browser.resize(width, 800, dark)
            assert browser.evaluate("document.documentElement.scrollWidth") <= width
    asked = browser.evaluate("performance.getEntriesByType('resource').map(one => new URL(one.name).origin)")
    assert len(asked) > 10 and set(asked) == {served.url.rstrip("/")}
