import os
from pathlib import Path

import pytest
from pictures import fill, link

from datasets.search import find_pictures, passed_over_text


def found_in(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in find_pictures(folder)[0]]


def passed_over_in(folder: Path) -> dict[str, int]:
    return dict(find_pictures(folder)[1])


def write(folder: Path, *names: str) -> None:
    """Write files that are no pictures."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"no picture")


def test_pictures_are_found_at_any_depth_in_order(tmp_path):
    tmp_path = tmp_path / ".hidden_itself"
    fill(tmp_path, "b.jpg", "z/y/x/deep.png", "a.jpg", "c/d.webp", "upper.JPG", "e.gif")
    expected = ["a.jpg", "b.jpg", "c/d.webp", "e.gif", "upper.JPG", "z/y/x/deep.png"]
    assert found_in(tmp_path) == expected
    assert passed_over_in(tmp_path) == {}


# What is no picture.


def test_what_is_no_picture_is_passed_over_and_counted_by_its_ending(tmp_path):
    fill(tmp_path, "one.jpg")
    write(tmp_path, "notes.txt", "a/film.mp4", "film.mpg", "a/raw.CR2", "raw.cr2", "b/c.d/LICENSE")
    assert found_in(tmp_path) == ["one.jpg"]
    kinds = {".txt": 1, ".mp4": 1, ".mpg": 1, ".cr2": 2, "without an ending": 1}
    assert passed_over_in(tmp_path) == kinds


def test_a_file_without_an_ending_is_a_picture_if_pillow_opens_it(tmp_path):
    fill(tmp_path, "a/one.jpg", "two.png")
    (tmp_path / "a" / "one.jpg").rename(tmp_path / "a" / "one")
    (tmp_path / "two.png").rename(tmp_path / "two")
    assert found_in(tmp_path) == ["a/one", "two"]


@pytest.mark.parametrize(
    "name",
    [
        "._one.jpg",
        ".DS_Store",
        ".trash/1.jpg",
        "roses/@eaDir/one.jpg/SYNOPHOTO_THUMB_M.jpg",
        "__MACOSX/one.jpg",
        "#recycle/1.jpg",
        "$RECYCLE.BIN/1.jpg",
        "lost+found/1.jpg",
        "System Volume Information/1.jpg",
        "roses/Thumbs.db",
        "desktop.ini",
    ],
)
def test_what_is_hidden_or_left_by_a_system_is_no_picture_and_not_counted(tmp_path, name):
    fill(tmp_path, "one.jpg", "other.png")
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "other.png").rename(tmp_path / name)
    assert found_in(tmp_path) == ["one.jpg"]
    assert passed_over_in(tmp_path) == {}


def test_heic_is_counted_with_what_reads_it_where_nothing_does(tmp_path, no_heic):
    write(tmp_path, "a.heic", "b.HEIC")
    assert found_in(tmp_path) == []
    assert passed_over_in(tmp_path) == {".heic (pip install pillow-heif reads them)": 2}


def test_a_line_tells_the_most_frequent_kinds_and_how_many_others():
    assert passed_over_text({".txt": 3, ".cr2": 1200, ".a": 3}) == "1,200 .cr2, 3 .a, 3 .txt"
    many = {f".{number:02d}": 20 - number for number in range(15)}
    assert passed_over_text(many).endswith(", 11 .09, 40 others")


# Links.


def test_linked_folders_and_files_are_followed_and_have_the_links_name(tmp_path):
    folder, elsewhere = tmp_path / "mine", tmp_path / "elsewhere"
    fill(folder, "roses/1.jpg")
    fill(elsewhere, "deep/2.jpg", "3.jpg", "@eaDir/3.jpg")
    link(folder / "album", elsewhere / "deep")
    link(folder / "three.jpg", elsewhere / "3.jpg")
    assert found_in(folder) == ["album/2.jpg", "roses/1.jpg", "three.jpg"]
    assert passed_over_in(folder) == {}


def test_two_links_to_the_same_pictures_give_them_once_by_the_first(tmp_path):
    fill(tmp_path, "elsewhere/1.jpg", "elsewhere/2.jpg", "mine/3.jpg")
    link(tmp_path / "mine" / "b.jpg", tmp_path / "elsewhere" / "1.jpg")
    link(tmp_path / "mine" / "c", tmp_path / "elsewhere")
    link(tmp_path / "mine" / "d", tmp_path / "elsewhere")
    assert found_in(tmp_path / "mine") == ["3.jpg", "b.jpg", "c/2.jpg"]
    assert passed_over_in(tmp_path / "mine") == {"linked twice": 2}


def test_a_loop_of_links_ends(tmp_path):
    folder = fill(tmp_path / "mine", "a/1.jpg", "a/b/2.jpg")
    link(folder / "a" / "b" / "loop", folder)
    link(folder / "a" / "self", folder / "a")
    link(tmp_path / "there", folder)
    link(folder / "back", tmp_path / "there")
    assert found_in(folder) == ["a/1.jpg", "a/b/2.jpg"]
    assert passed_over_in(folder) == {"linked twice": 3}


def test_a_link_to_a_folder_above_finds_what_else_is_there(tmp_path):
    fill(tmp_path, "mine/1.jpg", "other/2.jpg")
    link(tmp_path / "mine" / "up", tmp_path)
    assert found_in(tmp_path / "mine") == ["1.jpg", "up/other/2.jpg"]


def test_a_link_to_a_picture_that_is_there_changes_no_name_and_is_counted(tmp_path):
    fill(tmp_path, "roses/1.jpg", "roses/2.jpg")
    link(tmp_path / "album", tmp_path / "roses")
    link(tmp_path / "best.jpg", tmp_path / "roses" / "1.jpg")
    assert found_in(tmp_path) == ["roses/1.jpg", "roses/2.jpg"]
    assert passed_over_in(tmp_path) == {"linked twice": 2}


def test_a_link_to_nothing_is_counted(tmp_path):
    fill(tmp_path, "1.jpg")
    link(tmp_path / "gone.jpg", tmp_path / "nowhere.jpg")
    link(tmp_path / "itself", tmp_path / "itself")
    assert found_in(tmp_path) == ["1.jpg"]
    assert passed_over_in(tmp_path) == {"linked to nothing": 2}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no such files")
def test_what_is_neither_file_nor_folder_is_left_alone(tmp_path):
    fill(tmp_path, "1.jpg")
    os.mkfifo(tmp_path / "pipe")  # to open it would wait for ever
    os.mkfifo(tmp_path / "pipe.jpg")
    assert found_in(tmp_path) == ["1.jpg"]


@pytest.mark.skipif(getattr(os, "geteuid", lambda: 0)() == 0, reason="nothing is closed to root")
def test_a_folder_that_may_not_be_opened_is_counted(tmp_path):
    fill(tmp_path, "1.jpg", "closed/2.jpg")
    (tmp_path / "closed").chmod(0)
    assert found_in(tmp_path) == ["1.jpg"]
    assert passed_over_in(tmp_path) == {"that may not be opened": 1}
    (tmp_path / "closed").chmod(0o700)
