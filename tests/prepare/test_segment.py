"""Where words start, in scripts with spaces and without."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from dwt_ds.prepare import segment
from dwt_ds.prepare.segment import segmenters, word_starts


def words(text: str) -> list[str]:
    starts = word_starts(text)
    return [text[start:end].strip() for start, end in zip(starts, [*starts, len(text)][1:], strict=True)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("It isn't 3.5 kg.", ["It", "isn't", "3", ".", "5", "kg", "."]),
        ("Größe, déjà-vu", ["Größe", ",", "déjà", "-", "vu"]),
        ("लड़का किताब पढ़ता है।", ["लड़का", "किताब", "पढ़ता", "है", "।"]),
        ("هل تأتي؟", ["هل", "تأتي", "؟"]),
        ("これは本です。", ["こ", "れ", "は", "本", "で", "す", "。"]),
        ("خانه\u200cهای ما", ["خانه\u200cهای", "ما"]),
        ("അവന്\u200dറെ", ["അവന്\u200dറെ"]),
        ("ok 👩\u200d👧!🇩🇪🇫🇷👋🏽", ["ok", "👩\u200d👧", "!", "🇩🇪", "🇫🇷", "👋🏽"]),
        ("2023年3月に", ["2023", "年", "3", "月", "に"]),
        ("Tシャツ、iPhone手机", ["T", "シ", "ャ", "ツ", "、", "iPhone", "手", "机"]),
        ("ປີ2023ເປັນ", ["ປີ", "2023", "ເ", "ປັ", "ນ"]),
        ("か\u3099も葛\U000e0100城", ["か\u3099", "も", "葛\U000e0100", "城"]),
        ("", []),
    ],
)
def test_words(text: str, expected: list[str]) -> None:
    assert words(text) == expected


def test_by_character_a_mark_stays_with_its_character(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segment, "find_spec", lambda name: None)
    segment._segmenter.cache_clear()
    assert segmenters() == {"Chinese": "by character", "Thai": "by character"}
    assert words("北京 ok") == ["北", "京", "ok"]
    assert words("ที่นี่") == ["ที่", "นี่"]
    segment._segmenter.cache_clear()


def test_dictionaries_are_used_where_they_are_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins with the libraries' own calls: they are no requirement."""

    def tokenize(text: str, HMM: bool) -> list[tuple[str, int, int]]:
        return [(text[start : start + 2], start, start + 2) for start in range(0, len(text), 2)]

    thai = SimpleNamespace(word_tokenize=lambda text, keep_whitespace: [text[:3], text[3:]])
    modules = {
        "jieba": SimpleNamespace(setLogLevel=lambda level: None, tokenize=tokenize),
        "pythainlp": SimpleNamespace(tokenize=thai),
        "pythainlp.tokenize": thai,
    }
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(segment, "find_spec", modules.get)
    monkeypatch.setattr(segment.metadata, "version", lambda name: "1.0")
    segment._segmenter.cache_clear()
    assert segmenters() == {"Chinese": "jieba 1.0", "Thai": "pythainlp 1.0"}
    assert words("北京大学，ok") == ["北京", "大学", "，", "ok"]
    assert words("ที่นี่") == ["ที่", "นี่"]
    segment._segmenter.cache_clear()
