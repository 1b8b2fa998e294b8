"""Text as captions are stored, and what is said in it: captions, prompts and targets are all cleaned by clean()."""

from __future__ import annotations

import html


def clean(text: str) -> str:
    """Mend broken Unicode, undo HTML escapes (twice, for web text that was escaped twice), fold white space."""
    if text.isascii() and text.isprintable() and "&" not in text:  # most captions: nothing to mend, 20 times faster
        return " ".join(text.split())
    import ftfy  # 0.1 s, which plain texts need not take

    return " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split())


def holds(caption: str, target: str) -> bool:
    """Whether a stored caption holds the target, as published: in any case, and inside a word (bananas), too."""
    return clean(target).lower() in caption.lower()
