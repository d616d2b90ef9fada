"""Lines of varied Unicode text, the same in every run: what tokenizers are compared on."""

import random
import re
import unicodedata

# First and last code point of the blocks that lines are drawn from.
BLOCKS = {
    "ascii": (0x20, 0x7E),
    "latin": (0xA1, 0x24F),
    "ipa": (0x250, 0x2AF),
    "combining": (0x300, 0x36F),
    "greek": (0x370, 0x3FF),
    "cyrillic": (0x400, 0x4FF),
    "armenian": (0x531, 0x58F),
    "hebrew": (0x590, 0x5FF),
    "arabic": (0x600, 0x6FF),
    "devanagari": (0x900, 0x97F),
    "bengali": (0x980, 0x9FF),
    "tamil": (0xB80, 0xBFF),
    "thai": (0xE00, 0xE7F),
    "georgian": (0x10A0, 0x10FF),
    "hangul jamo": (0x1100, 0x11FF),
    "ethiopic": (0x1200, 0x137F),
    "vietnamese": (0x1E00, 0x1EFF),
    "punctuation": (0x2000, 0x206F),
    "fractions and romans": (0x2150, 0x218B),
    "arrows and mathematics": (0x2190, 0x22FF),
    "circled": (0x2460, 0x24FF),
    "dingbats": (0x2700, 0x27BF),
    "kana": (0x3040, 0x30FF),
    "han": (0x4E00, 0x9FFF),
    "hangul": (0xAC00, 0xD7A3),
    "private": (0xE000, 0xE0FF),
    "variation selectors": (0xFE00, 0xFE0F),
    "full width": (0xFF01, 0xFFEF),
    "gothic": (0x10330, 0x1034F),
    "mathematical": (0x1D400, 0x1D7FF),
    "emoji": (0x1F300, 0x1F6FF),
    "newer emoji": (0x1F900, 0x1F9FF),
    "rare han": (0x20000, 0x200FF),
    "tags": (0xE0020, 0xE007F),
}
WORDS = [
    "the",
    "of",
    "and",
    "question",
    "Who's",
    "they'LL",
    "don't",
    "I'm",
    "What",
    "Ünïcödé",
    "naïve",
    "Straße",
    "Москва",
    "東京",
    "한국어",
    "हिन्दी",
    "שלום",
    "مرحبا",
]
# What random characters seldom make: sequences, controls, bytes that few vocabularies have, white space, numbers.
PIECES = [
    *(
        "👩‍👩‍👧‍👦",
        "🇫🇷🇩🇪",
        "👍🏽",
        "e\u0301",
        "ﬁ",
        "Å",
        "…",
        "“”",
        "foo_bar(x[1]);",
        "--",
        "###",
        "http://a.b/c?d=1&e=f#g",
    ),
    *("\x00", "\x01", "\x04", "\x1b[0m", "\x7f", "\u0085", "\u200d", "\ufeff", "\u202e", "\U00100000"),
    *("\t", "\r\n", "\n\n", "\u00a0", "\u3000", "  ", "   "),
    *("3.14", "1,000", "x2", "²³", "½", "٣٤", "१२", "Ⅷ"),
]


def unicode_lines(count: int, seed: int = 0, spaced_digits: bool = True) -> list[str]:
    """`count` lines that mix scripts, emoji, combining marks, controls, numbers and kinds of white space.

    With `spaced_digits=False` no white space stands before a numeric character.
    """
    draw = random.Random(seed)
    lines = []
    for _ in range(count):
        blocks = draw.sample(sorted(BLOCKS), k=draw.randint(1, 4))
        line = "".join(_piece(draw, blocks) for _ in range(draw.randint(1, 25)))
        lines.append(line if spaced_digits else _without_space_before_digits(line))
    return lines


def _piece(draw: random.Random, blocks: list[str]) -> str:
    kind = draw.random()
    if kind < 0.45:
        first, last = BLOCKS[draw.choice(blocks)]
        return "".join(chr(draw.randint(first, last)) for _ in range(draw.randint(1, 6)))
    if kind < 0.6:
        return draw.choice(WORDS)
    if kind < 0.75:
        return draw.choice(PIECES)
    if kind < 0.8:
        return str(draw.randint(0, 10**6))
    return " "


def _without_space_before_digits(line: str) -> str:
    """Drops every run of white space that a character of the categories Nd, Nl or No follows."""
    kept: list[str] = []
    for run in re.split(r"(\s+)", line):
        if kept and kept[-1].isspace() and run and unicodedata.category(run[0]).startswith("N"):
            kept.pop()
        kept.append(run)
    return "".join(kept)
