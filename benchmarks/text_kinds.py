"""Scripts x tokenizers: what is unknown, what is kept, and how fast text becomes rows, on one core.

    python benchmarks/text_kinds.py [--text LANGUAGE=FILE...] [--characters N] [--entries N] [--tokenizer NAME]

Each language's text is drawn from words written here, in sentences as the language writes them, unless a file is given
for it. For each kind of tokenizer one is trained on that text (not timed), then the text is prepared with it. With
--tokenizer, that one is measured on every language besides. Rates are per second of one core's processor time. Results
are added to benchmarks/results/text_kinds.csv, and printed as the table of docs/data.md.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple, get_args

from rows import RESULTS, append_row, processor_and_cores

from dwt_ds.base.words import table
from dwt_ds.prepare.options import PrepareOptions
from dwt_ds.prepare.pipeline import prepare
from dwt_ds.prepare.reading import LocalFile
from dwt_ds.prepare.train_tokenizer import Kind, train_tokenizer

FIELDS = ["language", "tokenizer", "unknown_share", "characters_kept_share", "tokens_per_second", "characters_a_token"]
SENTENCES_A_LINE = 8


class Words(NamedTuple):
    """How a language's sentences are made."""

    words: str
    between: str = " "
    end: str = "."
    after: str = " "
    """What stands between two sentences."""


LANGUAGES = {
    "English": Words(
        "river bridge the a of house old winter letter boat and by saw was with night road garden they left market "
        "never before found quietly station reading window summer",
    ),
    "German": Words(
        "Fluß Brücke der die das Häuser alt für Winter Briefe und über sah war mit Nächte Straße Gärten sie gingen "
        "Märkte niemals früher gefunden leise Bahnhöfe lesend Fenster schön",
    ),
    "French": Words(
        "rivière pont le la de maison âgé hiver lettre bateau et près vit était avec nuit forêt château ils gelée "
        "marché déjà été trouvé à gare élève fenêtre où",
    ),
    "Russian": Words(
        "река мост дом старый зимний письмо лодка и около видел был с ночью дорога сад они шёл рынок никогда раньше "
        "нашёл тихий вокзал чтение окно моей её лёд",
    ),
    "Hindi": Words(
        "नदी पुल घर पुराना सर्दी चिट्ठी नाव और पास देखा था साथ रात सड़क बगीचा वे गए बाज़ार कभी पहले मिला धीरे स्टेशन पढ़ना "
        "खिड़की में है की",
        end="।",
    ),
    "Arabic": Words(
        "نهر جسر بيت قديم شتاء رسالة قارب و قرب رأى كان مع ليل طريق حديقة هم ذهبوا سوق أبدا قبل وجد بهدوء محطة قراءة "
        "نافذة في آخر إلى",
    ),
    "Thai": Words(
        "แม่น้ำ สะพาน บ้าน เก่า ฤดูหนาว จดหมาย เรือ และ ใกล้ เห็น เป็น กับ คืน ถนน สวน พวกเขา ไป ตลาด ไม่เคย ก่อน พบ เงียบ "
        "สถานี อ่าน หน้าต่าง ที่ มี ใน",
        between="",
        end="",
    ),
    "Chinese": Words(
        "河流 桥 房子 旧 冬天 信 船 和 附近 看见 是 与 夜晚 道路 花园 他们 去了 市场 从不 "
        "以前 找到 安静 车站 阅读 窗户 的 在 了",
        between="",
        end="。",
        after="",
    ),
    "Japanese": Words(
        "川 橋 家 古い 冬 手紙 ボート と 近く 見た です で 夜 道 庭 彼ら 行った 市場 決して "
        "前に 見つけ 静かに 駅 読書 窓 が を は",
        between="",
        end="。",
        after="",
    ),
}


def made_text(language: str, characters: int) -> str:
    """At least so many characters; a line is a document. Words are drawn as unevenly as in a language (Zipf)."""
    draw, made = random.Random(language), LANGUAGES[language]
    words = made.words.split()
    weights = [1 / (rank + 2) for rank in range(len(words))]
    lines: list[str] = []
    while characters > 0:
        sentences = [
            made.between.join(draw.choices(words, weights, k=draw.randint(6, 18))) + made.end
            for _ in range(SENTENCES_A_LINE)
        ]
        lines.append(made.after.join(sentences))
        characters -= len(lines[-1])
    return "\n\n".join(lines)


def measured(language: str, name: str, text: Path, tokenizer: str, folder: Path) -> dict[str, Any]:
    options = PrepareOptions([LocalFile(text)], folder, tokenizer=tokenizer, keep_duplicates=True, allow_unknown=True)
    start = time.process_time()
    manifest = prepare(options)
    seconds = time.process_time() - start
    values = [
        language,
        name,
        manifest.unknown_share,
        manifest.characters_kept / manifest.characters_seen,
        round(manifest.tokens / seconds),
        round(manifest.characters_kept / manifest.tokens, 2),
    ]
    return dict(zip(FIELDS, values, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", nargs="+", default=[], metavar="LANGUAGE=FILE", help="text to take instead")
    parser.add_argument("--characters", type=int, default=1_000_000, help="of each language (default: %(default)s)")
    parser.add_argument("--entries", type=int, default=4000, help="of each tokenizer (default: %(default)s)")
    parser.add_argument("--tokenizer", metavar="VOCAB_OR_NAME", help="one more, measured on every language")
    arguments = parser.parse_args()
    given = dict(each.split("=", 1) for each in arguments.text)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for language in [*LANGUAGES, *(name for name in given if name not in LANGUAGES)]:
            text = Path(scratch) / f"{language}.txt"
            if language in given:
                text.write_text(Path(given[language]).read_text(encoding="utf-8")[: arguments.characters], "utf-8")
            else:
                text.write_text(made_text(language, arguments.characters), encoding="utf-8")
            tokenizers = {arguments.tokenizer: arguments.tokenizer} if arguments.tokenizer else {}
            for kind in get_args(Kind):
                trained = train_tokenizer([text.read_text(encoding="utf-8")], arguments.entries, kind)
                tokenizers[kind] = str(Path(scratch) / f"{language}-{kind}")
                trained.save_pretrained(tokenizers[kind])
            for number, (name, tokenizer) in enumerate(tokenizers.items()):
                out = Path(scratch) / f"{language}-{number}-data"
                rows.append(measured(language, Path(name).name, text, tokenizer, out))
    made_with = {"characters": arguments.characters, "processor": processor_and_cores()}
    for row in rows:
        append_row(RESULTS / "text_kinds.csv", row | made_with)
    shown = [
        (
            row["language"],
            row["tokenizer"],
            f"{row['unknown_share']:.2%}",
            f"{row['characters_kept_share']:.1%}",
            f"{row['tokens_per_second']:,}",
            f"{row['characters_a_token']:.2f}",
        )
        for row in rows
    ]
    print(*table([tuple(FIELDS), *shown], "<<>"), sep="\n")


if __name__ == "__main__":
    main()
