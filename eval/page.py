"""Self-contained web pages: one file that opens from disk and asks no network."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from draftattn.errors import InputError
from draftattn.files import check_writable, written_whole

ASSETS = Path(__file__).parent / "web"

_INSERTIONS = re.compile(
    r'<link rel="stylesheet" href="(?P<style>\w+\.css)">'
    r'|<script src="(?P<script>\w+\.js)"></script>'
    r"|\{\{(?P<slot>\w+)\}\}"
)


def build_page(template: str, slots: Mapping[str, str], data: Mapping[str, Any]) -> str:
    """Fills a template of ``eval/web`` and puts its style sheets and scripts inside it.

    Args:
        template: file name of the template. It refers to its style sheets and scripts as any page does, and marks
            slots as ``{{name}}``.
        slots: HTML for each slot (see `text`); the slot ``data`` is filled from ``data``.
        data: what the scripts read, as JSON.

    Returns:
        The whole page.

    Raises:
        KeyError: if the template has a slot that is not given.

    >>> page = build_page("report.html", dict.fromkeys(
    ...     ["title", "model", "headline", "overview", "lede", "video_note", "footer", "attachments",
    ...      "settings_table"], "x"), {})
    >>> 'src="' in page, "{{" in page
    (False, False)
    """
    filled = {**slots, "data": script_json(data)}

    def insert(match: re.Match[str]) -> str:
        if match["style"]:
            return f"<style>\n{(ASSETS / match['style']).read_text(encoding='utf-8')}</style>"
        if match["script"]:
            return f"<script>\n{(ASSETS / match['script']).read_text(encoding='utf-8')}</script>"
        return filled[match["slot"]]

    return _INSERTIONS.sub(insert, (ASSETS / template).read_text(encoding="utf-8"))


def text(words: object) -> str:
    """Words as HTML that shows exactly them.

    >>> text("<b> & co")
    '&lt;b&gt; &amp; co'
    """
    return escape(str(words))


def term(key: str, words: str) -> str:
    """A word of the glossary, which explains itself when tapped.

    >>> term("psnr", "PSNR")
    '<span data-term="psnr">PSNR</span>'
    """
    return f'<span data-term="{text(key)}">{text(words)}</span>'


def glossary() -> dict[str, dict[str, str]]:
    """What the words on the pages mean: name and text by key."""
    return json.loads((ASSETS / "glossary.json").read_text(encoding="utf-8"))


def script_json(data: object) -> str:
    """JSON that can stand inside a script element.

    >>> script_json({"prompt": "</script>"})
    '{"prompt":"\\\\u003c/script>"}'
    """
    compact = json.dumps(data, allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    return compact.replace("<", "\\u003c")


def attachment(name: str, content: bytes) -> str:
    """A file inside a page, as a script element with that id that holds base64."""
    return f'<script type="text/plain" id="{text(name)}">{base64.b64encode(content).decode()}</script>'


def save_page(path: Path, page: str) -> None:
    """Writes a page whole or not at all; the one before stays until then.

    Raises:
        InputError: if it cannot be written, as on a full disk.
    """
    check_writable(path)
    try:
        with written_whole(path) as temporary:
            temporary.write_text(page, encoding="utf-8")
    except OSError as error:
        raise InputError(f"page {str(path)!r} could not be written: {error.strerror}") from error
