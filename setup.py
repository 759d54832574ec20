"""The description that a package index shows, made from README.md when the package is built.

Links in README.md are relative, which works on every code host and in a checkout. On an index they would lead nowhere.
With `url` in the section [metadata] of setup.cfg they become links to that repository; without it, plain text. All
other metadata is in setup.cfg.
"""

import configparser
import re
from pathlib import Path

from setuptools import setup


ROOT = Path(__file__).resolve().parent
BRANCH = "main"
FENCE = re.compile(r"(^```.*?^```[^\n]*$)", re.DOTALL | re.MULTILINE)
TARGET = r"\]\(([^)\s]+)([^)]*)\)"
PICTURE = re.compile(rf"!\[([^\]]*){TARGET}")
# Code between backticks, which stays as it is; or a link, whose text may hold code or a picture; or a picture.
PARTS = re.compile(
    rf"(?P<code>(?<!`)(?P<ticks>`+)(?!`)(?:(?!\n\n).)+?(?<!`)(?P=ticks)(?!`))"
    rf"|(?<!!)\[(?P<text>(?:!\[[^\]]*\]\([^)]*\)|`[^`]*`|[^\[\]`])*){TARGET}|{PICTURE.pattern}",
    re.DOTALL,
)


def is_relative(target: str) -> bool:
    return not re.match(r"[a-z][a-z0-9+.-]*:|//", target)


def description(readme: str, url: str | None) -> str:
    """Return README.md for a package index.

    Args:
        readme: the text, with links relative to the root of the repository.
        url: address of the repository on a code host, None if it has no fixed one.

    Returns:
        The text with absolute links and pictures. Without `url`, relative links are their text alone, and pictures of
        the repository are left out.

    Raises:
        ValueError: for a relative link that is written in HTML or as a reference, which is not rewritten.
    """
    parts = FENCE.split(readme)
    for number in range(0, len(parts), 2):  # every second part is a block of code
        parts[number] = _absolute(parts[number], url.rstrip("/") if url else None)
    return "".join(parts)


def _absolute(prose: str, url: str | None) -> str:
    for target in re.findall(r"<[^>]+(?:src|href)=[\"']([^\"']+)|^\[[^\]]+\]: *(\S+)", prose, re.MULTILINE):
        if is_relative(target := "".join(target)):
            raise ValueError(f"README.md links to {target!r} in HTML or by reference; write [text]({target})")

    def picture(found: re.Match) -> str:
        text, target, title = found.groups()
        if not is_relative(target):
            return found[0]
        return f"![{text}]({url}/raw/{BRANCH}/{target.removeprefix('./')}{title})" if url else ""

    def part(found: re.Match) -> str:
        if found["code"] or found["text"] is None:
            return found[0] if found["code"] else picture(PICTURE.match(found[0]))
        text, (target, title) = PICTURE.sub(picture, found["text"]), found.group(4, 5)
        if not is_relative(target):
            return f"[{text}]({target}{title})" if text else ""
        target = f"README.md{target}" if target.startswith("#") else target.removeprefix("./")
        return f"[{text}]({url}/blob/{BRANCH}/{target}{title})" if url else text

    prose = PARTS.sub(part, prose)
    return prose if url else re.sub(r"\n{3,}", "\n\n", prose)


def repository() -> str | None:
    metadata = configparser.ConfigParser()
    metadata.read(ROOT / "setup.cfg", encoding="utf-8")
    return metadata["metadata"].get("url")


if __name__ == "__main__":
    text = description((ROOT / "README.md").read_text(encoding="utf-8"), repository())
    setup(long_description=text, long_description_content_type="text/markdown")
