"""A guess of the encoding of a file that is not UTF-8, for an error message; no file is read by a guess."""

from __future__ import annotations

import codecs
import re
from collections.abc import Sequence

from data.errors import DataError

BOMS = {  # UTF-32 first, whose mark begins with that of UTF-16
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}

# The most frequent characters of languages and scripts.
_HAN = (
    "的一是不了在人有我他这个们中来上大为和国地到以说时要就出会可也你对生能而子那得于着下自之年好很看没去过家学多小么"
)
_TRADITIONAL = _HAN + "這個們來為國說時會對過學麼沒後還發經點長開樣裡"
_KANA = "のにはをたがでてとしれさいなもるんかこらすきまっだょう、。"
_HANGUL = "이다는을에의가고하지도를한은로기사어나아리시대자만서해인그일정라있게으보안좋"
_GREEK = "αοιετνσηρπκμλςυόίάέύή"
_ARABIC = "اليمونرتبةعدسفهكقحج"
_THAI = "านรอกเงมยล่้"
_CENTRAL = "ąćęłńóśźżáčďéěíňřšťúůýžĄĆĘŁŃÓŚŹŻČŘŠŽőű"
_CYRILLIC = "оеаинтсрвлкмдпуяыьгзбчй"
_LATIN = "æøåÅéèàüöäßñçóáíúãêôîâëï’‘“”–—…€£°«»¿¡ÉÀÜÖÄÑÇ"

# {Python's name: (a pattern of what texts in it consist of beside ASCII, their most frequent characters)}.
_CANDIDATES = {
    "gb18030": (r"[一-鿿　-〿！-～“”‘’…—]", _HAN),
    "big5": (r"[一-鿿　-〿！-～“”‘’…—]", _TRADITIONAL),
    "shift_jis": (r"[぀-ヿ一-鿿　-〿！-～]", _KANA),
    "euc_jp": (r"[぀-ヿ一-鿿　-〿！-～]", _KANA),
    "euc_kr": (r"[가-힣　-〿]", _HANGUL),
    # Words are in one script: "cafй" is none.
    "cp1251": (r"(?<![A-Za-z])[А-яЁё«»№—–“”„…]+(?![A-Za-z])", _CYRILLIC),
    "koi8-r": (r"(?<![A-Za-z])[А-яЁё]+(?![A-Za-z])", _CYRILLIC),
    "cp1253": (r"(?<![A-Za-z])[Α-ώ]+(?![A-Za-z])", _GREEK),
    "cp1256": (r"(?<![A-Za-z])[ء-ي،؟]+(?![A-Za-z])", _ARABIC),
    # Syllables: vowels and tone marks stand around consonants only.
    "tis-620": (r"(?<![A-Za-z])(?:[เ-ไ]?[ก-ฮ][ัิ-ฺ็]?[่-์]?[ะาำๅๆฯ]?){2,}(?![A-Za-z])", _THAI),
    # At most two in a row: words of Western languages are mostly ASCII.
    "cp1252": (rf"(?<![^\x00-\x7f])[{_LATIN}À-ÿ]{{1,2}}(?![^\x00-\x7f])", _LATIN),
    "cp1250": (rf"(?<![^\x00-\x7f])[{_CENTRAL}]{{1,4}}(?![^\x00-\x7f])", _CENTRAL),
}
_OTHER = re.compile(r"[^\x00-\x7f]")
SAMPLED = 500  # lines from which the encoding is guessed
SHOWN = 30  # characters of a line that are shown


def check_encoding(name: str) -> None:
    """Raise DataError if data.encoding = `name` is not a text encoding that Python knows; "" is UTF-8."""
    try:
        "a\n".encode(name or "utf-8").decode(name or "utf-8")
    except (LookupError, ValueError):
        raise DataError(
            f"data.encoding = {name!r} is not an encoding that Python knows; "
            "some are utf-8, utf-16, gb18030, big5, shift_jis, euc_kr, cp1251, cp1252 and latin-1"
        ) from None


def find_wide_encoding(head: bytes) -> str:
    """Return utf-16 or utf-32 for a file that begins so, with -le or -be if it has no byte order mark; else ""."""
    for mark, name in BOMS.items():
        if head.startswith(mark):
            return name
    head = head[:64]
    if len(head) < 4 or b"\0" not in head:
        return ""
    if head.count(0) > 0.6 * len(head):
        return "utf-32-be" if head[0] == 0 else "utf-32-le"
    even, odd = head[::2].count(0), head[1::2].count(0)
    # In ASCII, in which most headers are, every second byte is zero.
    if max(even, odd) >= max(3, len(head) / 8) and min(even, odd) == 0:
        return "utf-16-be" if even > odd else "utf-16-le"
    return ""


def guess_encoding(lines: Sequence[bytes]) -> str:
    """Return Python's name of the encoding in which these lines are most likely text; "" where none is likely."""
    best, best_score = "", 0.5
    for name, (pattern, frequent) in _CANDIDATES.items():
        try:
            text = b"\n".join(lines[:SAMPLED]).decode(name)
        except UnicodeDecodeError:
            continue
        others = _OTHER.findall(text)
        usual = sum(map(len, re.findall(pattern, text)))
        score = usual / len(others) * (1 + sum(character in frequent for character in others) / len(others))
        if score > best_score:
            best, best_score = name, score
    return best


def describe_bad_encoding(lines: Sequence[bytes]) -> str:
    """Return what data.encoding could be for lines that are not UTF-8, with what the first of them then says."""
    name = guess_encoding(lines)
    if not name:
        return "data.encoding names another encoding"
    text = " ".join(lines[0].decode(name).split())
    other = _OTHER.search(text)  # None where it was a space, as a fixed one of cp1252
    start = max(0, other.start() - SHOWN // 2) if other else 0
    return f'as {name} it reads {text[start : start + SHOWN]!r}: data.encoding = "{name}", if that is right'
