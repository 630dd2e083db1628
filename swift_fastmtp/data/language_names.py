"""What people write in a row's `language`, as BCP 47 tags: names, tags in any case, codes of two and three letters.

The table has the languages that py3langid tells apart, and a few: code, three-letter codes (ISO 639-3, and those of
ISO 639-2/B that differ), name in English, other names and the language's own.
"""

import re
import unicodedata

from .scripts import normalized

UNKNOWN = "unknown"

_TABLE = """
ace: acehnese
af: afr, afrikaans
am: amh, amharic, አማርኛ
an: arg, aragonese
ar: ara, arb, arabic, العربية
ary: moroccan arabic, darija
arz: egyptian arabic
as: asm, assamese
az: aze, azj, azerbaijani, azeri
ba: bak, bashkir
bcl: central bikol
be: bel, belarusian, беларуская
bg: bul, bulgarian, български
bn: ben, bengali, bangla, বাংলা
br: bre, breton
bs: bos, bosnian, bosanski
ca: cat, catalan, valencian, català
crh: crimean tatar
cs: ces, cze, czech, čeština, cesky
cy: cym, wel, welsh, cymraeg
da: dan, danish, dansk
de: deu, ger, german, deutsch
dz: dzo, dzongkha
el: ell, gre, greek, ελληνικά
en: eng, english
eo: epo, esperanto
es: spa, spanish, castilian, español, espanol, castellano
et: est, ekk, estonian, eesti
eu: eus, baq, basque, euskara
fa: fas, per, pes, persian, farsi, فارسی
fi: fin, finnish, suomi
fo: fao, faroese
fr: fra, fre, french, français, francais
fuv: fulfulde, nigerian fulfulde
fy: fry, frisian, west frisian
ga: gle, irish, gaeilge
gd: gla, scottish gaelic
gl: glg, galician, galego
gn: grn, gug, guarani
gom: konkani
grc: ancient greek
gu: guj, gujarati, ગુજરાતી
guw: gun
ha: hau, hausa
he: heb, iw, hebrew, עברית
hi: hin, hindi, हिन्दी, हिंदी
hr: hrv, croatian, hrvatski
ht: hat, haitian, haitian creole
hu: hun, hungarian, magyar
hy: hye, arm, armenian, հայերեն
id: ind, in, indonesian, bahasa indonesia
ig: ibo, igbo
is: isl, ice, icelandic, íslenska
it: ita, italian, italiano
ja: jpn, jp, japanese, 日本語, 日语, 日文
jv: jav, javanese
ka: kat, geo, georgian, ქართული
kab: kabyle
ki: kik, kikuyu, gikuyu
kk: kaz, kazakh, қазақша
km: khm, khmer, cambodian, ខ្មែរ
kn: kan, kannada, ಕನ್ನಡ
ko: kor, korean, 한국어, 韩语, 韩文
ku: kur, kmr, kurdish
ky: kir, kyrgyz, kirghiz
la: lat, latin
lb: ltz, luxembourgish
lg: lug, ganda, luganda
lij: ligurian
ln: lin, lingala
lo: lao, laotian, ລາວ
lt: lit, lithuanian, lietuvių
ltg: latgalian
lv: lav, lvs, latvian, latviešu
mg: mlg, plt, malagasy
mk: mkd, mac, macedonian, македонски
ml: mal, malayalam, മലയാളം
mn: mon, khk, mongolian, монгол
mr: mar, marathi, मराठी
ms: msa, may, zsm, malay, bahasa melayu
mt: mlt, maltese
my: mya, bur, burmese
nb: nob, norwegian bokmål, norwegian bokmal, bokmål, bokmal
ne: nep, npi, nepali, नेपाली
nl: nld, dut, dutch, flemish, nederlands
nn: nno, norwegian nynorsk, nynorsk
no: nor, norwegian, norsk
nso: sepedi, northern sotho
oc: oci, occitan
om: orm, gaz, oromo
or: ori, ory, odia, oriya, ଓଡ଼ିଆ
pa: pan, punjabi, panjabi, ਪੰਜਾਬੀ
pcm: nigerian pidgin
pl: pol, polish, polski
ps: pus, pbt, pashto
pt: por, portuguese, português, portugues
qu: que, quy, quechua
ro: ron, rum, romanian, moldovan, română
ru: rus, russian, русский
rw: kin, kinyarwanda
sa: san, sanskrit
se: sme, northern sami
si: sin, sinhala, sinhalese, සිංහල
sk: slk, slo, slovak, slovenčina
sl: slv, slovenian, slovene, slovenščina
sn: sna, shona
so: som, somali
sq: sqi, alb, als, albanian, shqip
sr: srp, serbian, српски, srpski
st: sot, sesotho, southern sotho
sv: swe, swedish, svenska
sw: swa, swh, swahili, kiswahili
ta: tam, tamil, தமிழ்
te: tel, telugu, తెలుగు
tg: tgk, tajik
th: tha, thai, ไทย
tk: tuk, turkmen
tl: tgl, fil, tagalog, filipino
tr: tur, turkish, türkçe, turkce
tt: tat, tatar
ug: uig, uyghur, uighur
uk: ukr, ukrainian, українська
ur: urd, urdu, اردو
uz: uzb, uzn, uzs, uzbek
vec: venetian
vi: vie, vietnamese, tiếng việt
vo: vol, volapük
wa: wln, walloon
xh: xho, xhosa
yo: yor, yoruba
zh: zho, chi, cmn, yue, wuu, cn, chinese, mandarin, mandarin chinese
zh: cantonese, 中文, 汉语, 漢語, 普通话, 普通話, 国语, 國語, 简体中文, 繁体中文, 繁體中文, 粤语, 粵語
zu: zul, zulu, isizulu
"""
_NO_LANGUAGE = ("", "und", "mul", "zxx", "none", "null", "unknown", "n/a")
_QUALIFIERS = re.compile(r"\b(simplified|traditional|brazilian|european|american|british|modern|standard)\b|\(.*\)")
_MAX_NAME = 100
"""Characters; a longer text is no language's name, and the expression above takes the square of its length."""
_TAG = re.compile(r"[a-z]{2,3}(-[a-z0-9]{1,8})*")


def _code_by_name() -> dict[str, str]:
    codes = {}
    for line in _TABLE.strip().splitlines():
        code, _, names = line.partition(": ")
        for name in (code, *names.split(", ")):
            codes[unicodedata.normalize("NFKC", name).casefold()] = code
    return codes


_CODES = _code_by_name()


def language_tag(name: object) -> str:
    """The language that is meant, as a tag in lower case that begins with its ISO 639-1 code if it has one:
    `zh-hans-cn` for "zh_Hans_CN" and "zho-Hans-CN", `en` for "English"; a name that nobody knows as it is, in lower
    case; `unknown` if it is no text or says that it is not known."""
    if not isinstance(name, str):
        return UNKNOWN
    text = " ".join(normalized(name).casefold().split())
    if text in _NO_LANGUAGE:
        return UNKNOWN
    if text in _CODES:
        return _CODES[text]
    if len(text) > _MAX_NAME:
        return text
    plain = " ".join(_QUALIFIERS.sub(" ", text).split())  # "Simplified Chinese", "Portuguese (Brazil)"
    if plain in _CODES:
        return _CODES[plain]
    tag = text.replace("_", "-").partition(".")[0]  # and en_US.UTF-8
    if not _TAG.fullmatch(tag):
        return text
    primary, _, rest = tag.partition("-")
    primary = _CODES.get(primary, primary)
    if primary in _NO_LANGUAGE:
        return UNKNOWN
    return f"{primary}-{rest}" if rest else primary


def language_code(name: object) -> str:
    """The primary subtag of `language_tag`: `zh` for "Chinese", "zh-Hans-CN", "zho_Hans"; `unknown`, too."""
    tag = language_tag(name)
    return tag.partition("-")[0] if _TAG.fullmatch(tag) else tag
