"""Where the pictures, videos and sounds of a request may come from."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote, urlsplit


def url_fault(url: str, *, allow_remote_urls: bool, media_root: Path | None) -> str | None:
    """Why media may not be had from a URL; None where they may.

    Args:
        url: as a body has it. Engines take bare paths of the server's own disk, too, so that only
            what is known is let through.
        allow_remote_urls: http(s) may be named, which the engine fetches.
        media_root: folder below which files may be named.
    """
    known = url.lower()
    if known.startswith("data:"):
        return None
    if known.startswith(("http://", "https://")):
        if allow_remote_urls:
            return None
    elif known.startswith("file:") and media_root is not None:
        return _file_fault(url, media_root)
    kinds = ["data:"]
    if media_root is not None:
        kinds.insert(0, f"file: (below {media_root})")
    if allow_remote_urls:
        kinds.insert(0, "http(s):")
        return f"Media must be {' or '.join(kinds)} URLs."
    instead = "send the content itself as a data: URL."
    if media_root is not None:
        instead = f"name a file below {media_root} as a file: URL, or {instead}"
    return f"This server fetches no remote media; {instead}"


def _file_fault(url: str, media_root: Path) -> str | None:
    # As SGLang reads it: no more than the path counts, and it is taken apart in the same way.
    parts = urlsplit(url)
    path = Path(unquote(parts.path))
    if not url.startswith("file:///") or parts.query or parts.fragment or "\0" in str(path):
        return "A file: URL must be file:///, an absolute path, and nothing else."
    # Links are followed: one that leads out of the folder is out of it.
    if not path.resolve().is_relative_to(media_root.resolve()):
        return f"{url[:200]} is not below {media_root}, which is where files may be."
    return None
