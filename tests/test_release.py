"""The checklist of a release (tools/release.py): what it can say without building anything."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools import release


def test_what_holds_of_every_commit() -> None:
    assert release.main(["--only", "versions", "page"]) == 0


@pytest.mark.parametrize(
    ("place", "text"),
    [
        ("CITATION.cff", "version: 9.9.9\n"),
        ("CHANGELOG.md", "# Changelog\n\n## [9.9.9] - 2030-01-01\n\n## [{version}] - 2029-01-01\n"),
        ("python/gradclip/__init__.py", '__version__ = "9.9.9"\n'),
    ],
)
def test_another_version_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], place: str, text: str
) -> None:
    version = release.project()["version"]
    for name in ("pyproject.toml", "python/gradclip/__init__.py", "CITATION.cff", "CHANGELOG.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text((release.ROOT / name).read_text())
    monkeypatch.setattr(release, "ROOT", tmp_path)
    assert release.main(["--only", "versions"]) == 0
    (tmp_path / place).write_text(text.format(version=version))
    assert release.main(["--only", "versions"]) == 1
    assert f"[ ] versions: {place}: expected version {version}" in capsys.readouterr().out


def test_a_page_for_an_index_has_no_dead_links() -> None:
    page = "# A\n\n![plot](docs/a.png)\n\n[one](docs/one.md#part), [two](https://b.c).\n<!-- mark -->\n\n![x](https://d/e.png)\n"
    assert release.package_page(page) == "# A\n\none, [two](https://b.c).\n![x](https://d/e.png)\n"


def test_a_changelog_without_a_date_is_not_ready(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(release, "ROOT", tmp_path)
    (tmp_path / "CHANGELOG.md").write_text("# Changelog\n\n## [1.0.0] - unreleased\n")
    with pytest.raises(release.CheckFailed, match=r"expected a date, got '## \[1\.0\.0\] - unreleased'"):
        release.check_dated()
    (tmp_path / "CHANGELOG.md").write_text("# Changelog\n\n## [1.0.0] - 2030-01-31\n")
    assert release.check_dated() == "## [1.0.0] - 2030-01-31"
