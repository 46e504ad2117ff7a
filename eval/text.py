"""Text files as users save them: which encodings are read, and where lines end.

Read by `eval` and `distill` alike. Nothing is ever replaced: text is decoded to the letter, or
refused.
"""

from __future__ import annotations

import codecs

MARK = "\ufeff"  # the byte-order mark, once decoded
REMEDY = "save it as UTF-8"


def decoded(content: bytes) -> str:
    """The text of bytes in UTF-8, with or without a byte-order mark, or in UTF-16 with one.

    Marks at the start go, and each \\r\\n becomes \\n.

    Raises:
        ValueError: they are in another encoding; the message is a clause that ends in the remedy.
    """
    if content.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        raise ValueError(f"is UTF-32 and not UTF-8; {REMEDY}")
    wide = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    name = "UTF-16" if wide else "UTF-8"
    try:
        text = content.decode(name)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"is not {name} text (byte {error.start + 1} is {content[error.start]:#04x}); {REMEDY}"
        ) from None
    return text.lstrip(MARK).replace("\r\n", "\n")


def lines(text: str) -> list[str]:
    """The lines of decoded text, which end at \\n alone.

    `str.splitlines` would also cut at characters that may stand within a line, such as U+2028. An
    end of line at the end of the text begins no line.
    """
    return text.removesuffix("\n").split("\n") if text else []
