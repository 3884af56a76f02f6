"""Pairs streamed from tar files: layouts, mixtures, damage, and every sample once over processes and workers."""

import functools
import http.server
import itertools
import json
import os
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from accelerate.data_loader import prepare_data_loader
from damaged import CAPTIONS, PICTURES, jpeg, sample, write_tar
from datasets import Dataset, Features, Image, Value
from hub_server import HubServer
from torch.utils.data import DataLoader

from recipes_minigpt4 import cli, stage1_pretrain
from recipes_minigpt4.data import bad_samples
from recipes_minigpt4.data.arguments import DataArguments
from recipes_minigpt4.data.collator import COUNTS, StageCollator
from recipes_minigpt4.data.formatting import stage1_rows, stage2_rows
from recipes_minigpt4.data.sources import load_pairs, open_source
from recipes_minigpt4.data.webdataset import expand, expand_braces
from recipes_minigpt4.utils.errors import RecipeError


COUNT, PER_TAR = 40, 10


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    """Four tar files with ten samples each."""
    numbers = list(range(COUNT))
    for tar in range(0, COUNT, PER_TAR):
        samples = [sample(number) for number in numbers[tar : tar + PER_TAR]]
        write_tar(tmp_path / "tars" / f"{tar // PER_TAR:05d}.tar", samples)
    return tmp_path / "tars"


def one_pass(name: object, **fields) -> list[dict]:
    return list(open_source(str(name), DataArguments(dataset_name=[str(name)], **fields), stage=1))


def numbers_of(pairs) -> list[int]:
    return [int(pair["text"].split()[1]) for pair in pairs]


# ---- layouts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["*.tar", "{00000..00003}.tar", "0000[0-3].tar", "{00000,00001}.tar", ""])
def test_tars_are_named_by_patterns_and_folders(name: str, tars: Path) -> None:
    wanted = range(20 if "," in name else COUNT)
    assert numbers_of(one_pass(f"{tars}/{name}" if name else tars)) == list(wanted)


@pytest.mark.parametrize(
    "pattern, names",
    [
        ("{08..11}.tar", ["08.tar", "09.tar", "10.tar", "11.tar"]),
        ("{8..11}.tar", ["8.tar", "9.tar", "10.tar", "11.tar"]),
        ("{a,b}/{0..1}.tar", ["a/0.tar", "a/1.tar", "b/0.tar", "b/1.tar"]),
        ("plain.tar", ["plain.tar"]),
    ],
)
def test_braces_are_those_of_shells(pattern: str, names: list[str]) -> None:
    assert expand_braces(pattern) == names


def test_addresses_are_not_asked_for_one_by_one() -> None:
    assert expand("https://nowhere.invalid/{0..9999}.tar")[-1] == "https://nowhere.invalid/9999.tar"


@pytest.mark.parametrize(
    "members, columns",
    [
        ({"jpg": jpeg(), "txt": b"number 7"}, {}),
        ({"png": jpeg(), "json": b'{"caption": "number 7"}', "txt": b"another"}, {}),
        ({"JPEG": jpeg(), "caption": b"number 7"}, {}),
        ({"jpg": jpeg(), "json": b'{"alt": "number 7", "caption": "x"}'}, {"text_column": "alt"}),
        ({"jpg": jpeg(), "json": b'{"image": "x.jpg", "caption": "number 7"}'}, {}),
        ({"small.jpg": b"x", "large.jpg": jpeg(), "txt": b"number 7"}, {"image_column": "large.jpg"}),
    ],
)
def test_columns_are_endings_and_fields(members: dict, columns: dict, tmp_path: Path, compose: Callable) -> None:
    tar = write_tar(tmp_path / "a.tar", [("folder/0007", members)])
    (pair,) = one_pass(tar, **columns)
    assert pair["text"] == "number 7" and pair["image"]["bytes"] == jpeg()
    args = DataArguments(dataset_name=str(tar), **columns)
    row = next(iter(stage1_rows(load_pairs(args, stage=1), compose()[1], args)))
    assert row["skipped"] is None and row["completion"] == "number 7\n"
    assert row["images"][0].size == (64, 48)


def test_compressed_archives_and_other_members(tmp_path: Path) -> None:
    samples = [("readme", {"md": b"# About"}), *(sample(number) for number in range(3))]
    pairs = one_pass(write_tar(tmp_path / "a.tar.gz", samples, "w:gz"))
    assert numbers_of(pair for pair in pairs if pair["image"]) == [0, 1, 2]


@pytest.fixture
def address(tars: Path) -> Iterator[str]:
    """The tars behind HTTP on this machine."""
    serve = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tars))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), serve) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_tars_come_over_http(address: str) -> None:
    assert numbers_of(one_pass(f"{address}/{{00000..00003}}.tar")) == list(range(COUNT))


def test_tars_come_from_the_hub(tars: Path, tmp_path: Path) -> None:
    """In a process of its own, because huggingface_hub reads the address of the Hub when it is imported."""
    code = """
from recipes_minigpt4.data.sources import DataArguments, open_source
name = "hf://datasets/someone/pictures/tars/*.tar"
for pair in open_source(name, DataArguments(dataset_name=name), stage=1):
    print(pair["text"])
"""
    with HubServer() as hub:
        files = {f"tars/{path.name}": path.read_bytes() for path in tars.iterdir()}
        hub.add_repo("someone/pictures", files, kind="dataset")
        settings = {**os.environ, **hub.environment(tmp_path / "home")}
        done = subprocess.run([sys.executable, "-c", code], env=settings, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    told, *texts = done.stdout.split("\n")[:-1]
    assert told == "data: image and caption of hf://datasets/someone/pictures/tars/*.tar"
    assert texts == [f"number {number}" for number in range(COUNT)]


# ---- streams --------------------------------------------------------------------------------------------------------


def test_a_stream_has_no_end_and_every_pass_has_every_sample(tars: Path) -> None:
    args = DataArguments(dataset_name=str(tars), shuffle_buffer=1)  # a larger one lets passes run into each other
    seen = numbers_of(itertools.islice(load_pairs(args, stage=1, seed=3), 3 * COUNT))
    for start in range(0, 3 * COUNT, COUNT):
        assert sorted(seen[start : start + COUNT]) == list(range(COUNT))
    assert seen[:COUNT] != list(range(COUNT))  # the order of the tars is shuffled


def test_the_buffer_shuffles_from_the_seed(tars: Path) -> None:
    args = DataArguments(dataset_name=str(tars), shuffle_buffer=20)
    first, again, other = (
        numbers_of(itertools.islice(load_pairs(args, stage=1, seed=seed), 30)) for seed in (1, 1, 2)
    )
    assert first == again != other
    assert any(abs(a - b) > 1 for a, b in itertools.pairwise(first))


def test_sources_are_mixed_by_weight(tars: Path) -> None:
    names = [str(tars / "{00000..00001}.tar"), str(tars / "{00002..00003}.tar")]
    args = DataArguments(dataset_name=names, dataset_weights=[115, 14])
    drawn = Counter(number < 20 for number in numbers_of(itertools.islice(load_pairs(args, stage=1), 2000)))
    assert abs(drawn[True] / 2000 - 115 / 129) < 0.03


def test_tars_files_and_folders_can_be_mixed(tars: Path, pairs_file: Path, compose: Callable) -> None:
    args = DataArguments(dataset_name=[str(tars), str(pairs_file)])
    stream = stage1_rows(load_pairs(args, stage=1), compose()[1], args)
    rows = list(itertools.islice(stream, 200))
    assert not any(row["skipped"] for row in rows)
    kinds = Counter("square" in row["completion"] for row in rows)
    assert abs(kinds[True] - 100) < 40  # without weights, equally often


def test_data_on_disk_can_be_streamed(pairs_file: Path) -> None:
    args = DataArguments(dataset_name=str(pairs_file), streaming=True, shuffle_buffer=1)
    texts = [pair["text"] for pair in itertools.islice(load_pairs(args, stage=1), 16)]
    assert len(set(texts)) == 8


@pytest.mark.parametrize("layout", ["pictures with metadata", "parquet with bytes"])
def test_datasets_that_are_streamed_are_never_decoded_ahead(layout: str, tmp_path: Path, compose: Callable) -> None:
    contents = [jpeg(0), jpeg(1)[:-60], jpeg(2)]
    if layout == "parquet with bytes":
        rows = [{"picture": {"bytes": data, "path": None}, "words": f"number {n}"} for n, data in enumerate(contents)]
        features = Features({"picture": Image(), "words": Value("string")})
        Dataset.from_list(rows, features=features).to_parquet(tmp_path / "train.parquet")
        columns = {"image_column": "picture", "text_column": "words"}
    else:
        lines = [{"file_name": f"{n}.jpg", "caption": f"number {n}"} for n in range(3)]
        (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
        for number, content in enumerate(contents):
            (tmp_path / f"{number}.jpg").write_bytes(content)
        columns = {}
    args = DataArguments(dataset_name=str(tmp_path), streaming=True, shuffle_buffer=1, **columns)
    rows = list(itertools.islice(stage1_rows(load_pairs(args, stage=1), compose()[1], args), 3))
    assert [row["skipped"] and row["skipped"]["cause"] for row in rows] == [None, bad_samples.TRUNCATED, None]
    assert [row["completion"] for row in rows if not row["skipped"]] == ["number 0\n", "number 2\n"]


def test_num_samples_takes_the_first_of_every_source(tars: Path) -> None:
    assert numbers_of(one_pass(tars, num_samples=5)) == [0, 1, 2, 3, 4]


def test_instructions_of_a_stream_vary_and_stay_with_their_sample(tars: Path, compose: Callable) -> None:
    args, processor = DataArguments(dataset_name=str(tars)), compose()[1]
    first, again = (
        {row["completion"]: row["prompt"] for row in itertools.islice(rows, 120)}
        for rows in (stage2_rows(load_pairs(args, 2, seed=seed), processor, args) for seed in (1, 2))
    )
    assert len(set(first.values())) == 4
    shared = first.keys() & again.keys()
    assert len(shared) > 20 and all(first[text] == again[text] for text in shared)


# ---- damage ---------------------------------------------------------------------------------------------------------


def damaged_tars(folder: Path) -> tuple[set[int], Counter[str]]:
    """Tars of all that can be wrong; returns the numbers of the good samples and how often each cause is there."""
    causes = Counter(cause for _, cause in (*PICTURES.values(), *CAPTIONS.values()))
    samples = [sample(number) for number in range(30)]
    bad = [sample(100 + at, picture=content) for at, (content, _) in enumerate(PICTURES.values())]
    bad += [sample(200 + at, caption=text) for at, (text, _) in enumerate(CAPTIONS.values())]
    for at, each in enumerate(bad):
        samples.insert(3 * at + 1, each)
    name, members = sample(300)
    samples.insert(5, (name, {**members, "json": b"{no json"}))
    samples.append((sample(301)[0], {"json": members["json"]}))
    samples.append((sample(302)[0], {"jpg": members["jpg"]}))
    causes += Counter([bad_samples.BROKEN_JSON, bad_samples.NO_PICTURE, bad_samples.NO_CAPTION])
    for start in range(0, len(samples), 11):
        write_tar(folder / f"{start:03d}.tar", samples[start : start + 11])
    # Cut in the picture of its last sample, of which nothing is left then.
    tail = write_tar(folder / "tail.tar", [sample(number) for number in range(30, 36)])
    whole = tail.read_bytes()
    tail.write_bytes(whole[: whole.index(jpeg(35)) + 20])
    (folder / "web.tar").write_bytes(b"<html>not found</html>" * 100)
    causes[bad_samples.BROKEN_ARCHIVE] += 2
    return set(range(35)), causes


def test_damage_costs_its_own_samples_only(tmp_path: Path, compose: Callable) -> None:
    good, causes = damaged_tars(tmp_path)
    pairs = open_source(str(tmp_path), DataArguments(dataset_name=str(tmp_path)), stage=1)
    rows = list(stage1_rows(pairs, compose()[1], DataArguments()))
    found = [int(row["completion"].split()[1]) for row in rows if not row["skipped"]]
    assert sorted(found) == sorted(good)
    assert Counter(row["skipped"]["cause"] for row in rows if row["skipped"]) == causes
    assert all(str(tmp_path) in row["skipped"]["name"] for row in rows if row["skipped"])


@pytest.mark.parametrize("workers", [0, 2])
def test_every_good_sample_once_over_two_processes(workers: int, tmp_path: Path, compose: Callable) -> None:
    """accelerate shares the tars out among processes, and `datasets` among each one's workers."""
    good, causes = damaged_tars(tmp_path)
    processor = compose()[1]
    collate = StageCollator(processor, completion_only_loss=True)
    seen: list[str] = []
    drawn, missing = 0, Counter()
    for rank in range(2):
        pairs = open_source(str(tmp_path), DataArguments(dataset_name=str(tmp_path)), stage=1)
        rows = stage1_rows(pairs.shuffle(seed=0, buffer_size=7), processor, DataArguments())
        loader = DataLoader(rows, batch_size=3, collate_fn=collate, num_workers=workers)
        for batch in prepare_data_loader(loader, num_processes=2, process_index=rank, put_on_device=False,
                                         dispatch_batches=False):  # fmt: skip
            counts = batch[COUNTS]
            drawn += counts["drawn"]
            missing.update(record["cause"] for record in counts["skipped"])
            for labels in batch["labels"]:
                seen.append(processor.tokenizer.decode(labels[labels != -100]).strip())
    numbers = [int(text.split()[1]) for text in seen if text]  # of a batch of bad ones, a row without answer is left
    assert sorted(numbers) == sorted(good)
    assert missing == causes
    assert drawn == len(good) + sum(causes.values())


def test_a_broken_sample_at_the_head_stops_nothing(tmp_path: Path) -> None:
    samples = [("000000", {"jpg": jpeg(), "json": b"{no json"}), sample(1)]
    first, second = one_pass(write_tar(tmp_path / "a.tar", samples))
    assert first["cause"] == bad_samples.BROKEN_JSON and second["text"] == "number 1"


def test_odd_names_and_endless_json_cost_nothing_else(tmp_path: Path) -> None:
    samples = [sample(0), ("caf\udce9", sample(1)[1]), ("000002", {"jpg": jpeg(), "json": b"[" * 100_000}), sample(3)]
    pairs = one_pass(write_tar(tmp_path / "a.tar", samples))
    assert [pair["cause"] for pair in pairs] == [None, None, bad_samples.BROKEN_JSON, None]
    assert numbers_of([pairs[0], pairs[1], pairs[3]]) == [0, 1, 3]


# ---- training -------------------------------------------------------------------------------------------------------


def test_stage1_trains_from_tars(stage: Callable, tars: Path, capsys) -> None:
    write_tar(tars / "00004.tar", [sample(50, picture=b""), sample(51)])
    fields = {"dataset_name": tars, "max_steps": 21, "dataloader_num_workers": 2, "panel_steps": 10}
    trainer = stage1_pretrain.main(stage(**fields))
    assert trainer.samples.drawn == 42 and trainer.samples.skipped >= 1
    assert "samples: 42 drawn" in capsys.readouterr().out


def test_names_and_weights_on_the_command_line(stage: Callable, tars: Path) -> None:
    arguments = stage(dataset_name=None, max_steps=2)
    names = ["--dataset_name", str(tars / "00000.tar"), str(tars / "00001.tar"), "--dataset_weights", "115", "14"]
    assert stage1_pretrain.main([*arguments, *names]).samples.drawn == 4


@pytest.mark.slow
def test_two_processes_train_from_uneven_tars(stage: Callable, tars: Path, tmp_path: Path) -> None:
    write_tar(tars / "00004.tar", [sample(50), sample(51, picture=b"")])
    arguments = stage(dataset_name=tars, max_steps=30, gradient_accumulation_steps=2, dataloader_num_workers=2)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    launch += ["-m", "recipes_minigpt4.stage1_pretrain"]
    done = subprocess.run([*launch, *arguments], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "samples: 240 drawn" in done.stdout, done.stdout
    assert (tmp_path / "run" / "model.safetensors").is_file()


# ---- mistakes -------------------------------------------------------------------------------------------------------


def test_a_stream_needs_a_number_of_steps(stage: Callable, tars: Path, capsys) -> None:
    assert cli.main(["stage1", *stage(dataset_name=tars, max_steps=None, num_train_epochs=1)]) == 2
    assert "--max_steps" in capsys.readouterr().err.splitlines()[-1]


def empty_tar(folder: Path) -> Path:
    return write_tar(folder / "a.tar", [])


def web_page(folder: Path) -> Path:
    (folder / "a.tar").write_bytes(b"<html>" * 200)
    return folder / "a.tar"


def one_sample(**members: bytes) -> Callable[[Path], Path]:
    return lambda folder: write_tar(folder / "a.tar", [("0", members)])


MISTAKES = {
    "no such file": (lambda folder: folder / "none-*.tar", {}, ("none-*.tar", "--dataset_name")),
    "nothing in it": (empty_tar, {}, ("a.tar", "no samples")),
    "no archive": (web_page, {}, ("a.tar", "cannot be read", "remove")),
    "no such text column": (
        one_sample(jpg=jpeg(), json=b'{"words": "a", "url": "b"}'),
        {},
        ("captions", "words", "url", "--text_column", '"caption": "A red square."'),
    ),
    "one of the files": (
        lambda folder: (write_tar(folder / "0.tar", [sample(0)]), folder / "{0..2}.tar")[1],
        {},
        ("2 of the tar files", "1.tar", "--dataset_name"),
    ),
    "a field for a picture": (
        one_sample(jpg=jpeg(), json=b'{"caption": "a", "url": "b"}'),
        {"image_column": "url"},
        ("'url'", "jpg, json", "--image_column"),
    ),
    "no such image column": (one_sample(jpg=jpeg(), txt=b"a"), {"image_column": "heic"}, ("'heic'", "jpg, txt")),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_wrong_tars_are_told_in_one_sentence(name: str, tmp_path: Path) -> None:
    write, fields, named = MISTAKES[name]
    with pytest.raises(RecipeError) as told:
        one_pass(write(tmp_path), **fields)
    sentence = str(told.value)
    assert "\n" not in sentence and sentence.endswith("."), sentence
    assert not [word for word in named if word not in sentence], sentence


def test_a_dead_address_is_told(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"http://127\.0\.0\.1:9/a\.tar cannot be read"):
        one_pass("http://127.0.0.1:9/a.tar")
