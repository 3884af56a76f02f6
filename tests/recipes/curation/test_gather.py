"""Pictures that are curated: from everything the recipes read, a seeded sample, without damage and without doubles."""

import base64
import http.server
import io
import json
import os
import shutil
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import pytest
from curation_runs import noise, noises
from damaged import PICTURES as DAMAGED
from damaged import jpeg, write_tar
from hub_server import HubServer

from recipes_minigpt4.curation import gather as gather_module
from recipes_minigpt4.curation.gather import Gathered, gather
from recipes_minigpt4.curation.picture_hash import BITS, MOST_BITS, SeenHashes, picture_hash
from recipes_minigpt4.curation.source import Source
from recipes_minigpt4.evaluation.questions import Picture
from recipes_minigpt4.utils.errors import RecipeError


pytestmark = pytest.mark.usefixtures("own_cache")
COUNT = 5


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of five pictures."""
    return noises(tmp_path_factory.mktemp("sources") / "pictures", COUNT)


@pytest.fixture
def look(tmp_path: Path) -> Callable[..., Gathered]:
    """`look(place, count, distance, **fields of Source)`: what is gathered from there."""

    def gather_(place: object, count: int | None = None, distance: int = 6, **fields: object) -> Gathered:
        (folder := tmp_path / "out").mkdir(exist_ok=True)
        return gather(folder, Source(str(place), **fields), count, distance)

    return gather_


def digests(folder: Path) -> set[str]:
    return {Picture(path.name, path).digest for path in folder.glob("*.png")}


def encoded(folder: Path, number: int) -> bytes:
    return (folder / f"{number}.png").read_bytes()


# ---- where they come from -------------------------------------------------------------------------------------------


def as_nested(pictures: Path, place: Path) -> Path:
    """Class folders, captions beside some, and files that are no pictures."""
    for number in range(COUNT):
        (place / f"kind {number % 2}").mkdir(parents=True, exist_ok=True)
        shutil.copy(pictures / f"{number}.png", place / f"kind {number % 2}")
    (place / "kind 0" / "0.txt").write_text("A caption.")
    (place / "notes.md").write_text("Not a picture.")
    return place


def as_table(ending: str, name: Callable[[Path, int], object]) -> Callable[[Path, Path], Path]:
    def write(pictures: Path, place: Path) -> Path:
        rows = [{"file_name": name(pictures, number), "width": 48} for number in range(COUNT)]
        file = place.with_suffix(ending)
        if ending == ".csv":
            file.write_text("file_name,width\n" + "".join(f"{row['file_name']},48\n" for row in rows))
        elif ending == ".json":
            file.write_text(json.dumps(rows))
        else:
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return file

    return write


def as_coco(pictures: Path, place: Path) -> Path:
    images = [{"id": number, "file_name": f"{number}.png"} for number in range(COUNT)]
    notes = [{"image_id": number, "caption": "A caption."} for number in range(COUNT)]
    (file := place.with_suffix(".json")).write_text(json.dumps({"images": images, "annotations": notes}))
    return file


def rows_of(pictures: Path) -> datasets.Dataset:
    """Rows as `datasets` stores pictures; all have the same name."""
    rows = [{"image": {"bytes": encoded(pictures, number), "path": "a.png"}, "text": "x"} for number in range(COUNT)]
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    return datasets.Dataset.from_list(rows, features=features)


def as_parquet(pictures: Path, place: Path) -> Path:
    rows_of(pictures).to_parquet(file := place.with_suffix(".parquet"))
    return file


def as_parquet_folder(pictures: Path, place: Path) -> Path:
    rows_of(pictures).to_parquet(place / "data" / "train-00000-of-00001.parquet")
    return place


def as_saved(pictures: Path, place: Path) -> Path:
    rows_of(pictures).save_to_disk(place)
    return place


def as_several(pictures: Path, place: Path) -> Path:
    """A row with two pictures, one with three."""
    images = [[{"bytes": encoded(pictures, number), "path": None} for number in part] for part in ([0, 1], [2, 3, 4])]
    features = datasets.Features({"images": datasets.List(datasets.Image())})
    datasets.Dataset.from_dict({"images": images}, features=features).to_parquet(file := place.with_suffix(".parquet"))
    return file


def as_tars(pictures: Path, place: Path) -> Path:
    for tar in range(2):
        numbers = range(tar, COUNT, 2)
        write_tar(place / f"{tar}.tar", [(f"{n:03d}", {"png": encoded(pictures, n), "txt": b"x"}) for n in numbers])
    return place


SOURCES = {
    "a folder": lambda pictures, place: pictures,
    "class folders": as_nested,
    "jsonl": as_table(".jsonl", lambda pictures, number: f"pictures/{number}.png"),
    "csv with whole paths": as_table(".csv", lambda pictures, number: pictures / f"{number}.png"),
    "json": as_table(".json", lambda pictures, number: f"pictures/{number}.png"),
    "base64": as_table(".jsonl", lambda pictures, number: base64.b64encode(encoded(pictures, number)).decode()),
    "coco": as_coco,
    "parquet": as_parquet,
    "a folder of parquet": as_parquet_folder,
    "a saved dataset": as_saved,
    "several in a row": as_several,
    "tars": as_tars,
}


@pytest.mark.parametrize("kind", SOURCES)
def test_pictures_come_from_everything(kind: str, pictures: Path, look: Callable) -> None:
    place = SOURCES[kind](pictures, pictures.parent / kind.replace(" ", "-"))
    fields = {"images": pictures if kind == "coco" else pictures.parent} if kind in ("jsonl", "json", "coco") else {}
    found = look(place, **fields)
    assert {row["picture"] for row in found.rows} == digests(pictures)
    assert found.left_out == [] and found.total in (COUNT, 2 if kind == "several in a row" else None)
    assert str(pictures.parent) not in json.dumps(found.rows), "folders of this machine are nobody's business"


def test_a_stream_of_rows_gives_the_same(pictures: Path, look: Callable) -> None:
    place = as_parquet_folder(pictures, pictures.parent / "streamed")
    assert {row["picture"] for row in look(place, streaming=True).rows} == digests(pictures)


def test_scenes_of_the_embedded_world_are_pictures_too(look: Callable) -> None:
    found = look("tiny", 4, -1, scenes=300)
    assert [row["name"] for row in found.rows] == [f"scene {number}" for number in range(4)] and found.total == 300


def test_datasets_of_the_hub_are_read_whole_and_streamed(pictures: Path, tmp_path: Path) -> None:
    """In a process of its own, because huggingface_hub reads the address of the Hub when it is imported."""
    rows_of(pictures).to_parquet(tmp_path / "rows.parquet")
    code = """
import sys
from pathlib import Path
from recipes_minigpt4.curation.gather import gather
from recipes_minigpt4.curation.source import Source
for streaming in (False, True):
    folder = Path(sys.argv[1]) / str(streaming)
    folder.mkdir()
    found = gather(folder, Source("someone/squares", streaming=streaming), None, 6)
    print(*sorted(row["picture"] for row in found.rows))
"""
    with HubServer() as hub:
        content = (tmp_path / "rows.parquet").read_bytes()
        hub.add_repo("someone/squares", {"data/train-00000-of-00001.parquet": content}, kind="dataset")
        settings = {**os.environ, **hub.environment(tmp_path / "home")}
        command = [sys.executable, "-c", code, str(tmp_path)]
        done = subprocess.run(command, env=settings, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    told = [line for line in done.stdout.splitlines() if not line.startswith("Look")]
    assert told == [" ".join(sorted(digests(pictures)))] * 2


@pytest.fixture
def address(pictures: Path) -> Iterator[str]:
    """Where the pictures can be fetched."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args: object) -> None:
            super().__init__(*args, directory=str(pictures))

        def log_message(self, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_pictures_are_fetched_from_addresses(address: str, pictures: Path, look: Callable, tmp_path: Path) -> None:
    """What cannot be fetched is counted, and asked for again by the next start."""
    names = [f"{address}/{number}.png?signature=abcdef123456" for number in range(COUNT)]
    (file := tmp_path / "list.jsonl").write_text(
        "".join(json.dumps({"url": url}) + "\n" for url in [*names, f"{address}/late.png"])
    )
    found = look(file)
    assert {row["picture"] for row in found.rows} == digests(pictures)
    assert [(one["name"], one["reason"]) for one in found.left_out] == [(f"{address}/late.png", "cannot be read")]
    assert "abcdef123456" not in json.dumps(found.rows)
    noise(99).save(pictures / "late.png")
    try:
        assert len(look(file).rows) == COUNT + 1
    finally:
        (pictures / "late.png").unlink()


def test_what_holds_no_pictures_is_told(tmp_path: Path, look: Callable) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "a", "number": 1}\n')
    with pytest.raises(RecipeError, match=r"has no column of pictures; it has text, number, and needs `image`"):
        look(tmp_path / "rows.jsonl")
    (tmp_path / "gone.jsonl").write_text('{"image": "1.png"}\n{"image": "2.png"}\n')
    told = (
        r"None of 2 pictures of .*gone\.jsonl can be used \(2 cannot be read; [12]\.png: No such file or directory\)"
    )
    with pytest.raises(RecipeError, match=told + ".*--images tells where they are"):
        look(tmp_path / "gone.jsonl")


# ---- which of them --------------------------------------------------------------------------------------------------


def test_a_sample_hangs_on_the_seed_and_the_first_of_a_larger_one(pictures: Path, look: Callable) -> None:
    orders = {seed: [row["name"] for row in look(pictures, seed=seed).rows] for seed in range(4)}
    assert len({tuple(order) for order in orders.values()}) > 1
    assert [row["name"] for row in look(pictures, 2, seed=3).rows] == orders[3][:2]


def test_pictures_that_come_later_leave_the_order_of_the_others(tmp_path: Path, look: Callable) -> None:
    before = [row["name"] for row in look(noises(tmp_path / "more", 6)).rows]
    noise(77).save(tmp_path / "more" / "77.png")
    after = [row["name"] for row in look(tmp_path / "more").rows]
    assert "77.png" in after and [name for name in after if name != "77.png"] == before


def test_damaged_pictures_are_counted(tmp_path: Path, look: Callable) -> None:
    noises(tmp_path / "web", 2)
    for number, (content, _) in enumerate(DAMAGED.values()):
        (tmp_path / "web" / f"damaged {number}.jpg").write_bytes(content)
    found = look(tmp_path / "web")
    assert len(found.rows) == 2 and found.drawn == 2 + len(DAMAGED)
    assert Counter(one["reason"] for one in found.left_out) == {"cannot be read": len(DAMAGED)}
    assert all(one["detail"] and str(tmp_path) not in one["detail"] for one in found.left_out)


def test_doubles_are_counted_and_named(tmp_path: Path, look: Callable) -> None:
    """The same file under two names, and the same picture smaller and compressed."""
    folder = noises(tmp_path / "doubled", 3, side=320)
    shutil.copy(folder / "0.png", folder / "copy.png")
    noise(1, 320).resize((200, 180)).save(folder / "smaller.jpg", quality=70)
    found = look(folder)
    assert len(found.rows) == 3
    pairs = {frozenset((one["name"], one["detail"])): one["reason"] for one in found.left_out}
    assert pairs == {
        frozenset(("0.png", "copy.png")): "the same file",
        frozenset(("1.png", "smaller.jpg")): "looks like another",
    }
    assert len(look(folder, distance=-1).rows) == 4


def test_pictures_look_alike_whatever_their_size_and_compression() -> None:
    for number in range(20):
        picture = noise(number, 320)
        for changed in (
            jpeg_of(picture, 40),
            picture.resize((117, 99)),
            picture.point(lambda value: value * 0.97 + 2),
        ):
            assert (picture_hash(picture) ^ picture_hash(changed)).bit_count() <= 6


def jpeg_of(picture: PIL.Image.Image, quality: int) -> PIL.Image.Image:
    picture.save(file := io.BytesIO(), "JPEG", quality=quality)
    return PIL.Image.open(file)


def test_other_pictures_do_not_look_alike() -> None:
    plain = [PIL.Image.new("RGB", (30, 30), colour) for colour in ("white", "black", "grey", "red", "green", "blue")]
    hashes = [picture_hash(picture) for picture in [*plain, *(noise(number) for number in range(30))]]
    pairs = [(one ^ other).bit_count() for place, one in enumerate(hashes) for other in hashes[:place]]
    assert min(pairs) > 6


def test_the_search_finds_all_that_differ_in_so_few_bits() -> None:
    """Beside a comparison with everything."""
    rng = np.random.default_rng(0)
    known = [int.from_bytes(rng.bytes(BITS // 8), "big") for _ in range(50)]
    for distance in (0, 6, MOST_BITS):
        seen = SeenHashes(distance)
        for value in known:
            seen.add(value, str(value))
        for differ in range(MOST_BITS + 5):
            places = rng.choice(BITS, differ, replace=False)
            wanted = known[differ] ^ sum(1 << int(place) for place in places)
            assert (seen.find(wanted) == str(known[differ])) == (differ <= distance)


# ---- copies, and going on -------------------------------------------------------------------------------------------


def test_files_stay_as_they_are_and_others_become_png(tmp_path: Path, look: Callable) -> None:
    noises(folder := tmp_path / "kinds", 1)
    (folder / "a.jpg").write_bytes(jpeg(7))
    noise(8).save(folder / "b.bmp")
    found = {row["name"]: tmp_path / "out" / row["file"] for row in look(folder).rows}
    assert found["a.jpg"].read_bytes() == jpeg(7) and found["a.jpg"].suffix == ".jpg"
    assert PIL.Image.open(found["b.bmp"]).format == "PNG" and found["b.bmp"].suffix == ".png"
    assert np.array_equal(PIL.Image.open(found["b.bmp"]), noise(8))


@pytest.fixture
def looked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of pictures that are opened."""
    names: list[str] = []
    look = gather_module._look
    monkeypatch.setattr(
        gather_module, "_look", lambda picture, folder: names.append(picture.name) or look(picture, folder)
    )
    return names


def test_nothing_is_looked_at_twice(pictures: Path, look: Callable, looked: list, tmp_path: Path) -> None:
    few = look(pictures, 2)
    assert look(pictures).rows[:2] == few.rows and len(looked) == COUNT
    assert look(pictures).rows == look(pictures, distance=-1).rows and len(looked) == COUNT
    look(pictures, seed=1)
    assert len(looked) == 2 * COUNT


def test_a_copy_that_is_gone_is_made_again(pictures: Path, look: Callable, looked: list, tmp_path: Path) -> None:
    before = look(pictures).rows
    (tmp_path / "out" / before[1]["file"]).unlink()
    assert look(pictures).rows == before and looked == [*(row["name"] for row in before), before[1]["name"]]


def test_what_becomes_of_the_source_does_not_matter(tmp_path: Path, look: Callable) -> None:
    """A copy is there; only those that are drawn anew need the source."""
    before = look(noises(tmp_path / "source", 4)).rows
    noise(50).save(tmp_path / "source" / "0.png")
    assert look(tmp_path / "source").rows == before


def test_a_stream_that_was_read_is_not_fetched_again(pictures: Path, look: Callable, tmp_path: Path) -> None:
    tars = as_tars(pictures, tmp_path / "stream")
    before = look(tars, 3).rows
    shutil.move(tars / "0.tar", tars / "0.gone")
    shutil.move(tars / "1.tar", tars / "1.gone")
    (tars / "0.tar").write_bytes(b"")
    assert look(tars, 3).rows == before and look(tars, 2).rows == before[:2]
    shutil.move(tars / "0.gone", tars / "0.tar")
    shutil.move(tars / "1.gone", tars / "1.tar")
    assert len(look(tars).rows) == COUNT and look(tars).rows[:3] == before
    shutil.rmtree(tars)
    tars.mkdir()
    (tars / "0.tar").write_bytes(b"")
    assert len(look(tars, 100).rows) == COUNT, "a stream that ended has no more"


def test_tars_that_break_off_cost_what_is_behind(pictures: Path, look: Callable, tmp_path: Path) -> None:
    tars = as_tars(pictures, tmp_path / "broken")
    content = (tars / "0.tar").read_bytes()
    (tars / "0.tar").write_bytes(content[: len(content) // 2])
    found = look(tars)
    assert 2 <= len(found.rows) < COUNT
    assert ("0.tar, where it breaks off", "cannot be read") in [(one["name"], one["reason"]) for one in found.left_out]


def test_a_full_disk_is_told_and_nothing_is_half_there(
    pictures: Path, look: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, written = Path.write_bytes, []

    def fill(path: Path, content: bytes) -> int:
        written.append(path)
        if len(written) == 3:
            write(path, content[:100])
            raise OSError(28, "No space left on device")
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", fill)
    told = (
        r"picture/\w+\.png cannot be written \(No space left on device\); make room and run the command again, which"
    )
    with pytest.raises(RecipeError, match=told):
        look(pictures)
    assert len(list((tmp_path / "out" / "picture").iterdir())) == 2
    assert len(look(pictures).rows) == COUNT and len(written) == COUNT + 1
