"""Ranges of characters by script, as text for a regular expression's [...].

Each purpose has its own set, since results depend on the exact ranges.
"""

from __future__ import annotations

THAI_LAO, BURMESE, KHMER = "\u0e00-\u0eff", "\u1000-\u109f", "\u1780-\u17ff"
KANA = "\u3040-\u30ff"  # the blocks of hiragana and katakana, with their marks
KANA_LETTERS = "\u3041-\u3096\u30a1-\u30fa"  # without punctuation and marks
HANGUL = "\uac00-\ud7a3"
HAN_EXTENSION_A, HAN_BASIC, HAN_COMPATIBILITY = "\u3400-\u4dbf", "\u4e00-\u9fff", "\uf900-\ufaff"
HAN_BMP = HAN_EXTENSION_A + HAN_BASIC + HAN_COMPATIBILITY
HAN_PLANES = "\U00020000-\U0003ffff"  # both supplementary planes, with characters to come
HAN_ASSIGNED = "\U00020000-\U000323af"  # of Unicode 15

# Scripts without spaces between words, or whose words end in particles: a character is a word (data/words.py).
UNSPACED = THAI_LAO + BURMESE + KHMER + KANA + HAN_EXTENSION_A + HAN_BASIC + HANGUL + HAN_COMPATIBILITY + HAN_PLANES
# Characters that text augmentation and the metrics of question answering treat as words.
KANA_AND_HAN = KANA + HAN_BMP + HAN_PLANES
# Characters that BLEU treats as Chinese, and, together with kana letters, as Japanese.
CHINESE = HAN_BMP + HAN_ASSIGNED
# Characters that ROUGE treats as words: of scripts without spaces. Korean has spaces.
HALF_WIDTH_KANA = "\uff66-\uff9d"
ROUGE_CHARACTERS = "\u3005\u3007" + KANA_LETTERS + HALF_WIDTH_KANA + HAN_BMP + HAN_ASSIGNED + THAI_LAO + BURMESE + KHMER
