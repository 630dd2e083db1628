"""Characters of scripts that are written without spaces, for character classes of `re`."""

KANA = "\u3040-\u30ff"
HAN = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f"
CJK = KANA + HAN
