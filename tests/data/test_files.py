import pytest

from diffjax.data.files import atomic_path


def test_file_is_whole_or_unchanged(tmp_path):
    path = tmp_path / "folder" / "a.txt"
    with atomic_path(path) as part:
        part.write_text("one")
        assert not path.exists()

    def fail():
        with atomic_path(path) as part:
            part.write_text("tw")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail()
    assert path.read_text() == "one"
    assert [each.name for each in path.parent.iterdir()] == ["a.txt"]
