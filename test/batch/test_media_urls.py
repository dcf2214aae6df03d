"""Where media may come from."""

from pathlib import Path

import pytest

from blendserve.batch import content_faults
from blendserve.batch.media_urls import url_fault


def fault(url: str, root: Path | None, *, remote: bool = False) -> str | None:
    return url_fault(url, allow_remote_urls=remote, media_root=root)


def test_files_below_the_folder_may_be_named(tmp_path: Path) -> None:
    picture = tmp_path / "some cats" / "a#1.png"
    assert fault(picture.as_uri(), tmp_path) is None
    # Whether it is there shows when the line is answered: that is no fault of the whole file.
    assert fault((tmp_path / "missing.png").as_uri(), tmp_path) is None


@pytest.mark.parametrize(
    "path", ["../other.png", "cats/../../other.png", "%2e%2e/other.png", "/..%2fother.png"]
)
def test_no_way_leads_out_of_the_folder(tmp_path: Path, path: str) -> None:
    root = tmp_path / "media"
    root.mkdir()
    assert "not below" in str(fault(f"file://{root}/{path}", root))


def test_a_link_out_of_the_folder_is_out_of_it(tmp_path: Path) -> None:
    root = tmp_path / "media"
    root.mkdir()
    (tmp_path / "secret.png").write_bytes(b"")
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    assert "not below" in str(fault((root / "link.png").as_uri(), root))


@pytest.mark.parametrize(
    "rest", ["relative.png", "//host{root}/a.png", "//localhost{root}/a.png", "//{root}/a.png?x=1"]
)
def test_a_file_url_is_an_absolute_path_and_nothing_else(tmp_path: Path, rest: str) -> None:
    assert "absolute path" in str(fault("file:" + rest.format(root=tmp_path), tmp_path))


def test_files_are_refused_without_a_folder_and_the_web_without_leave(tmp_path: Path) -> None:
    assert fault("file:///a.png", None) is not None
    assert fault("/a.png", tmp_path) is not None
    assert fault("https://a.example/b.png", tmp_path) is not None
    assert fault("https://a.example/b.png", tmp_path, remote=True) is None
    assert fault("data:image/png;base64,AA", None) is None


def test_bodies_are_looked_at_with_the_folder(tmp_path: Path) -> None:
    def body(url: str) -> dict[str, object]:
        return {"messages": [{"role": "user", "content": [{"image_url": {"url": url}}]}]}

    assert not list(content_faults(body((tmp_path / "a.png").as_uri()), media_root=tmp_path))
    (found,) = content_faults(body("file:///etc/passwd"), media_root=tmp_path)
    assert found.code == "remote_url_not_allowed"
    assert str(tmp_path) in found.message
