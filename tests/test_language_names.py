"""What people write in `language` means the same language to every verb."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swift_fastmtp.data.clean import clean
from swift_fastmtp.data.language import known_languages, language
from swift_fastmtp.data.language_names import language_code, language_tag
from swift_fastmtp.data.mix import mix
from swift_fastmtp.data.mix_groups import Groups, language_of
from swift_fastmtp.files.rows import read_rows
from swift_fastmtp.vocab.counts import cell_of
from swift_fastmtp.vocab.languages import check_names

CODES = {
    "zh": ["zh", "ZH", "zh-CN", "zh_Hant", "zh-Hans-CN", "zho", "zho_Hans", "cmn-Hans", "Chinese", "CHINESE", "中文",
           "Simplified Chinese", "Chinese (Traditional)", "mandarin", "简体中文", "cn", "Cantonese"],
    "en": ["en", "EN", "en_US", "en-GB-oxendict", "eng", "eng_Latn", "English", " english ", "en_US.UTF-8",
           "British English"],
    "pt": ["pt-BR", "Portuguese", "português", "PORTUGUÊS", "Brazilian Portuguese", "Portuguese (Brazil)"],
    "de": ["Deutsch", "german", "ger", "de_AT"],
    "ja": ["Japanese", "日本語", "jpn_Jpan", "jp"],
    "es": ["spanish", "Español", "es-419"],
    "el": ["Greek", "ΕΛΛΗΝΙΚΆ", "gre"],
    "tr": ["Turkish", "türkçe"],
    "gsw": ["gsw-CH"],
    "klingon": ["Klingon"],
    "unknown": ["", " ", "und", "und-Latn", "Unknown", "N/A", None, 5, ["en"]],
}  # fmt: skip


@pytest.mark.parametrize("code", CODES)
def test_names_and_tags_have_a_code(code):
    assert {language_code(name) for name in CODES[code]} == {code}


def test_every_language_that_is_detected_has_a_name():
    """Its code alone would be read as it stands, so this is about the table."""
    names = {"ar": "Arabic", "hi": "Hindi", "ko": "Korean", "ru": "Russian", "vi": "Vietnamese", "sw": "Swahili"}
    assert {code: language_code(name) for code, name in names.items()} == {code: code for code in names}
    assert {language_code(code) for code in known_languages()} >= set(names)


def test_detected_languages_have_the_codes_that_rows_have():
    """py3langid's `kik`, `gug` and `yue` are `ki`, `gn` and `zh` in rows and maps; its `zxx` is no language."""
    known = known_languages()
    assert {language_code(code) for code in known} == known
    assert known >= {"ki", "gn", "zh", "en", "uz"} and not known & {"kik", "gug", "yue", "wuu", "uzs", "zxx", "unknown"}
    assert check_names(["ki", "gn"]) == {"ki", "gn"}


def test_a_detected_text_and_a_row_agree():
    prose = "Andũ othe maciaragwo marĩ na wĩyathi na maiganaine na matiĩo na ihooto ciao. " * 3
    kikuyu = language(prose)
    assert kikuyu == "ki" and language_code("Kikuyu") == kikuyu


@given(st.text(max_size=12) | st.sampled_from([name for names in CODES.values() for name in names]))
def test_a_tag_is_its_own_tag(name):
    tag = language_tag(name)
    assert tag and language_tag(tag) == tag and language_code(tag) == language_code(name)


def conversation(**told):
    return {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "x = 1"}], **told}


def test_groups_are_of_a_language_or_of_a_tag():
    groups = Groups(languages={"hant": ["zh-Hant"], "zh": ["Chinese"], "en": ["en"]})
    found = {
        name: groups.group({}, language_of(conversation(language=name)))
        for name in ("zh_Hant_TW", "zho-Hant", "zh-CN", "Mandarin", "ENGLISH", "eng", "enm", "French")
    }
    assert found == {
        "zh_Hant_TW": "hant", "zho-Hant": "hant", "zh-CN": "zh", "Mandarin": "zh", "ENGLISH": "en", "eng": "en",
        "enm": "general", "French": "general",
    }  # fmt: skip


@pytest.mark.parametrize("name", ["Chinese", "zh-Hans-CN", "ZH", "中文", "zho_Hans"])
def test_mix_vocab_and_clean_know_it(name, tmp_path):
    row = conversation(language=name, category="math")
    assert cell_of(row) == "zh/math"
    english = "Plants make sugar from light, water and carbon dioxide, and they give off oxygen while they do so."
    chinese = "植物用阳光、水和二氧化碳制造糖分，同时放出氧气，这就是光合作用，地球上的生命都离不开它。"
    rows = [conversation(language=name) for _ in range(3)] + [conversation(language="English", category="qa")]
    for i, row in enumerate(rows):
        row["messages"][0]["content"] = f"{english} Number {i}."
        row["messages"][1]["content"] = chinese if i < 3 else english
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    mix([str(path)], str(tmp_path / "mix"), shares=["zh=0.5", "general=0.5"], max_repeat=9, val_ratio=0)
    report = json.loads((tmp_path / "mix" / "report.json").read_text())
    assert set(report["languages"]) == {"zh", "en"} and report["groups"]["zh"]["input"]["rows"] == 3
    clean([str(path)], str(tmp_path / "clean.jsonl"), filters=["language"])
    assert len(read_rows(tmp_path / "clean.jsonl")) == 4  # asked in English, and an answer in Chinese was wanted
