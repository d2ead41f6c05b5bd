"""Text that is not UTF-8: refused with what it looks like, read where its encoding is named."""

from __future__ import annotations

import codecs
import gzip
import json
import random
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest
from harness.corpus import compressed, read_file

from dwt_ds.cli.main import main
from dwt_ds.prepare import reading
from dwt_ds.prepare.encoding import TextDecoder, known_encoding
from dwt_ds.prepare.encoding_guess import guess_encoding
from dwt_ds.prepare.hub import HubDataset
from dwt_ds.prepare.reading import LocalFile
from dwt_ds.prepare.sources import UTF_8, SourceCounts, TextForm

TEXTS = {
    "Chinese": "这是关于城市与学校还有图书馆的事情，然后他们讨论了天气和经济的发展问题。",
    "Taiwanese": "這是關於城市與學校還有圖書館的事情，然後他們討論了天氣和經濟的發展問題。",
    "Japanese": "これは日本語の文章です。東京は日本の首都であり、図書館で本を読みました。",
    "Japanese, most in kana": "私たちはきのう古いランプを買いました。あなたもそれを見に来ませんか？",
    "Korean": "한국어 문장입니다. 서울은 대한민국의 수도이며 많은 사람들이 살고 있습니다.",
    "Russian": "Это предложение на русском языке. Москва является столицей России, в ней живут люди.",
    "Russian, short words": "Старый дом 7 не мой. Ещё я их не ел, но и он не ест.",
    "French": "L’été à Orléans, où la forêt fut gelée, Zoé préférait déjà le café. Ça va très bien.",
    "German": "Über die Straße gehen schöne Mädchen. Käse für Jürgen, größer als Bäume.",
    "Spanish": "El niño comió una piña. ¿Dónde está la canción? Mañana será otro día.",
    "Polish": "Zażółć gęślą jaźń. Książka leży na stole, więc poszedłem się uczyć.",
    "Turkish": "Güneş doğdu ve çocuklar şarkı söyledi. Kütüphanede ışık açıktı, öğrenci değildi.",
    "Greek": "Αυτή είναι μια πρόταση στα ελληνικά. Η Αθήνα είναι η πρωτεύουσα της Ελλάδας.",
    "Hebrew": "זהו משפט בעברית. ירושלים היא בירת ישראל ויש בה הרבה אנשים.",
    "Hebrew with points": "הַיֶּלֶד קָרָא סְפָרִים בַּבַּיִת.",
    "Arabic with vowels": "الطَّقْسُ جَمِيلٌ فِي هَذَا الشَّهْرِ.",
    "Arabic": "هذه جملة باللغة العربية. القاهرة هي عاصمة مصر ويعيش فيها كثير من الناس.",
    "Thai": "นี่คือประโยคภาษาไทย กรุงเทพเป็นเมืองหลวงของประเทศไทย มีคนอาศัยอยู่มาก",
}
# Each with what it is taken for: a superset where one encoding is part of another.
ENCODED = [
    ("Chinese", "gbk", "gb18030"),
    ("Chinese", "utf-16", "utf-16"),
    ("Taiwanese", "big5", "big5"),
    ("Japanese", "shift_jis", "cp932"),
    ("Japanese", "euc_jp", "euc_jp"),
    ("Japanese", "iso2022_jp", "iso2022_jp"),
    ("Japanese, most in kana", "shift_jis", "cp932"),
    ("Korean", "euc_kr", "cp949"),
    ("Korean", "iso2022_kr", "iso2022_kr"),
    ("Russian, short words", "koi8_r", "koi8_r"),
    ("Russian", "cp1251", "cp1251"),
    ("Russian", "koi8_r", "koi8_r"),
    ("Russian", "iso8859_5", "iso8859_5"),
    ("Russian", "cp866", "cp866"),
    ("French", "cp1252", "cp1252"),
    ("French", "utf-16-le", "utf-16-le"),
    ("French", "utf-32", "utf-32"),
    ("German", "latin-1", "cp1252"),
    ("German", "cp850", "cp850"),
    ("German", "mac_roman", "mac_roman"),
    ("Spanish", "latin-1", "cp1252"),
    ("Polish", "cp1250", "cp1250"),
    ("Polish", "iso8859_2", "iso8859_2"),
    ("Turkish", "cp1254", "cp1254"),
    ("Greek", "cp1253", "cp1253"),
    ("Hebrew", "cp1255", "cp1255"),
    ("Hebrew with points", "cp1255", "cp1255"),
    ("Arabic", "cp1256", "cp1256"),
    ("Arabic with vowels", "cp1256", "cp1256"),
    ("Thai", "cp874", "cp874"),
]


def read(path: Path, encoding: str = "utf-8") -> tuple[list[str], SourceCounts]:
    return read_file(path, TextForm(encoding=encoding))


@pytest.mark.parametrize(("language", "encoding", "guess"), ENCODED)
def test_another_encoding_is_named_and_can_be_read(tmp_path: Path, language: str, encoding: str, guess: str) -> None:
    path = tmp_path / "corpus.txt"
    text = f"First line.\n{TEXTS[language]}\n"
    path.write_bytes(text.encode(encoding))
    assert guess_encoding(path.read_bytes()) == guess
    with pytest.raises(ValueError, match=rf"corpus\.txt: .*looks like {guess} \(.*give --encoding {guess}"):
        read(path)
    documents, counts = read(path, known_encoding(guess))
    assert documents == [text.strip()]
    assert (counts.invalid_utf8, counts.skipped) == (0, "")


@pytest.mark.parametrize("encoding", ["utf-8", "gb18030", "utf-16", "utf-16-le"])
def test_a_byte_order_mark_is_no_text(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "corpus.txt"
    path.write_bytes("\ufeffTitle\n".encode(encoding))
    assert read(path, encoding)[0] == ["Title"]


@pytest.mark.parametrize("block", [5, 64, 1 << 20])
@pytest.mark.parametrize("encoding", ["utf-8", "gb18030", "utf-16", "utf-16-be", "shift_jis"])
def test_blocks_end_inside_characters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoding: str, block: int
) -> None:
    monkeypatch.setattr(reading, "_BLOCK_BYTES", block)
    monkeypatch.setattr(reading, "_PROBE_BYTES", block)
    text = "日本\n\n本日\n" * 20
    (tmp_path / "corpus.txt").write_bytes(text.encode(encoding))
    documents, counts = read(tmp_path / "corpus.txt", encoding)
    assert documents == ["日本", *["本日\n日本"] * 19, "本日"]
    assert counts.invalid_utf8 == 0
    assert counts.position == (tmp_path / "corpus.txt").stat().st_size


@pytest.mark.parametrize("name", ["corpus.txt.gz", "corpus.jsonl", "proteins.fasta", "corpus.parquet"])
def test_every_reader_refuses_and_reads(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    raw = TEXTS["Chinese"].encode("gb18030")
    if name.endswith(".parquet"):
        pyarrow.parquet.write_table(pa.table({"text": [raw, raw]}), path)
    elif name.endswith(".gz"):
        path.write_bytes(gzip.compress(raw))
    elif name.endswith(".jsonl"):
        path.write_bytes(json.dumps({"text": TEXTS["Chinese"]}, ensure_ascii=False).encode("gb18030"))
    else:
        path.write_bytes(b">one\n" + raw)
    with pytest.raises(ValueError, match=f"{name}: .*this looks like gb18030"):
        read(path)
    assert read(path, "gb18030")[0][0] == TEXTS["Chinese"]


def test_strings_of_a_parquet_may_be_in_another_encoding(tmp_path: Path) -> None:
    raw = pa.array([text.encode("gb18030") for text in (TEXTS["Chinese"], TEXTS["Chinese"])] + ["é".encode()])
    pyarrow.parquet.write_table(pa.table({"text": raw.view(pa.string())}), tmp_path / "corpus.parquet")
    with pytest.raises(ValueError, match="this looks like gb18030"):
        read(tmp_path / "corpus.parquet")
    assert read(tmp_path / "corpus.parquet", "gb18030")[0] == [TEXTS["Chinese"], TEXTS["Chinese"], "é"]


@pytest.mark.parametrize(
    "kind", ["string", "large_string", "string_view", "binary", "large_binary", "binary_view", "dictionary"]
)
@pytest.mark.parametrize("hub", [False, True])
def test_a_stray_byte_in_a_column_is_replaced_and_counted(tmp_path: Path, kind: str, hub: bool) -> None:
    raw = pa.array([b"A plain record of words.", b"caf\xe9 and other words.", None])
    if kind == "string":
        raw = raw.view(pa.string())
    elif kind == "large_string":
        raw = raw.cast(pa.large_binary()).view(pa.large_string())
    elif kind == "string_view":
        raw = raw.cast(pa.binary_view()).view(pa.string_view())
    elif kind == "large_binary":
        raw = raw.cast(pa.large_binary())
    elif kind == "binary_view":
        raw = raw.cast(pa.binary_view())
    elif kind == "dictionary":
        raw = raw.dictionary_encode()
    pyarrow.parquet.write_table(pa.table({"text": raw}), tmp_path / "train.parquet")
    counts = SourceCounts()
    source = HubDataset(str(tmp_path)) if hub else LocalFile(tmp_path / "train.parquet")
    assert list(source.documents(counts)) == ["A plain record of words.", "caf\ufffd and other words."]
    assert (counts.invalid_utf8, counts.unreadable_records) == (1, 1)


def test_a_column_of_another_type_is_named(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pa.table({"text": [1, 2]}), tmp_path / "train.parquet")
    for source in (LocalFile(tmp_path / "train.parquet"), HubDataset(str(tmp_path))):
        with pytest.raises(ValueError, match=r'(parquet|dataset .*): column "text" holds int64, not text'):
            list(source.documents(SourceCounts()))
    datasets.Dataset.from_dict({"text": [["a"], ["b"]]}).save_to_disk(tmp_path / "lists")
    with pytest.raises(ValueError, match="not text: name another with --text-column"):
        list(HubDataset(str(tmp_path / "lists")).documents(SourceCounts()))


def test_up_to_one_percent_is_replaced_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "corpus.txt"
    path.write_bytes((b"x" * 98 + b"\n") * 100 + b"\xe9" * 100)  # 10,000 characters
    documents, counts = read(path)
    assert counts.invalid_utf8 == 100
    assert documents[0].count("\ufffd") == 100
    path.write_bytes((b"x" * 98 + b"\n") * 100 + b"\xe9" * 102)
    with pytest.raises(ValueError, match="1% of its characters cannot be decoded"):
        read(path)


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_the_whole_of_a_file_is_what_invalid_bytes_are_a_share_of(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "_BLOCK_BYTES", 1000)
    path = tmp_path / f"corpus.txt{suffix}"
    path.write_bytes(compressed(b"\xe9" * 200 + b"\n" + (b"x" * 98 + b"\n") * 300, suffix))
    assert read(path)[1].invalid_utf8 == 200


def test_values_are_decoded_one_by_one_and_counted_together() -> None:
    counts = SourceCounts()
    decoder = TextDecoder("iso2022_jp", "column", counts)
    assert decoder.value(b'\x1b$B$"\xff') == "\u3042\ufffd"  # does not switch back to letters
    assert decoder.value(b"\xffabc\xff") == "\ufffdabc\ufffd"
    with pytest.raises(ValueError, match="column: 43% of its characters cannot be decoded"):
        decoder.check()
    assert decoder.value(b"x" * 400) == "x" * 400
    decoder.check()


def test_a_wrong_encoding_is_refused_as_utf_8_is(tmp_path: Path) -> None:
    path = tmp_path / "corpus.txt"
    path.write_bytes(TEXTS["Russian"].encode("cp1251"))
    with pytest.raises(ValueError, match=r"this looks like cp1251 \(.*\), not SHIFT_JIS"):
        read(path, "shift_jis")
    path.write_bytes(b"plain")
    with pytest.raises(ValueError, match="corpus.txt cannot be read as utf-16: .*BOM"):
        read(path, "utf-16")


def test_bytes_of_no_encoding(tmp_path: Path) -> None:
    path = tmp_path / "corpus.txt"
    path.write_bytes(bytes(b % 128 + 128 for b in range(7, 3000, 11)))
    with pytest.raises(ValueError, match="it looks like no encoding that is known here; convert it to UTF-8"):
        read(path)


def test_binary_files_are_no_utf_16(tmp_path: Path) -> None:
    noise = random.Random(1).randbytes(999)
    for content in (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", codecs.BOM_UTF16_LE + bytes(range(256)) * 8, noise + b"\0"):
        (tmp_path / "file").write_bytes(content)
        documents, counts = read(tmp_path / "file")
        assert (documents, counts.skipped, counts.invalid_utf8) == ([], "binary", 0)


def test_the_file_is_not_read_to_its_end_for_the_refusal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "_BLOCK_BYTES", 1000)
    path = tmp_path / "corpus.txt"
    path.write_bytes((TEXTS["Chinese"] + "\n").encode("gb18030") * 2000)
    counts = SourceCounts()
    with pytest.raises(ValueError, match="gb18030"):
        list(LocalFile(path).documents(counts))
    assert counts.position < path.stat().st_size / 10


def test_a_replacement_character_of_the_text_is_not_counted() -> None:
    for encoding in ("utf-8", "gb18030", "utf-16-le"):
        counts = SourceCounts()
        decoder = TextDecoder(encoding, "x", counts)
        raw = ("a\ufffdb" * 9).encode(encoding)
        text = "".join(decoder.decode(raw[i : i + 1], final=i + 1 == len(raw)) for i in range(len(raw)))
        assert (text, counts.invalid_utf8) == ("a\ufffdb" * 9, 0)
        assert decoder.value(raw) == text
        decoder.check()


def test_the_option(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = "\n\n".join(f"{TEXTS['Chinese']}{n}" for n in range(40))
    (tmp_path / "corpus.txt").write_bytes(text.encode("gb18030"))
    words = ["prepare", "--text", f"{tmp_path}/corpus.txt", "--train-tokenizer", "300", "--out", f"{tmp_path}/out"]
    words += ["--workers", "1", "--seq-len", "32"]
    assert main(words) == 2
    assert 'this looks like gb18030 ("' in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main([*words, "--encoding", "GB18030"]) == 0
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["settings"]["identity"]["sources"][0]["encoding"] == "gb18030"
    assert manifest["dropped"]["invalid_utf8"] == 0


def test_names_of_encodings() -> None:
    assert known_encoding("UTF8") == UTF_8
    for name in ("latin9000", "base64", "rot13", ""):
        with pytest.raises(ValueError, match=f"--encoding {name}: Python knows no such encoding"):
            known_encoding(name)


def test_the_default_encoding_is_no_part_of_the_identity(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x")
    assert set(LocalFile(tmp_path / "a").identity()) == {"file", "bytes", "modified_ns"}
    assert LocalFile(tmp_path / "a", TextForm(encoding="gb18030")).identity()["encoding"] == "gb18030"
