"""Locks hold while others look, delete and take over."""

import threading

import pytest

from shards.lock import held_file, remove_abandoned


def test_what_is_held_is_not_removed_and_what_is_free_is(tmp_path):
    path = tmp_path / "file.lock"
    with held_file(path):
        assert not remove_abandoned(path)
        assert path.exists()
    assert remove_abandoned(path)
    assert not path.exists()
    assert remove_abandoned(path)  # gone already


def test_one_at_a_time_holds_a_file_that_others_keep_trying_to_remove(tmp_path):
    path = tmp_path / "file.lock"
    done, inside, most = threading.Event(), [0], [0]

    def hold() -> None:
        for _ in range(300):
            with held_file(path):
                inside[0] += 1
                most[0] = max(most[0], inside[0])
                inside[0] -= 1

    def remove() -> None:
        while not done.is_set():
            remove_abandoned(path)

    removers = [threading.Thread(target=remove) for _ in range(2)]
    holders = [threading.Thread(target=hold) for _ in range(4)]
    for thread in (*removers, *holders):
        thread.start()
    for thread in holders:
        thread.join(60)
    done.set()
    for thread in removers:
        thread.join(60)
    assert not any(thread.is_alive() for thread in (*removers, *holders))
    assert most[0] == 1


def test_a_removal_between_a_holders_opening_and_locking_is_noticed(tmp_path, monkeypatch):
    """The window in which a file that was looked at and found free was deleted under its holder."""
    path = tmp_path / "file.lock"
    flock = __import__("fcntl").flock
    removed = []

    def late_flock(descriptor: int, operation: int) -> None:
        if not removed:
            removed.append(True)
            assert remove_abandoned(path)
        flock(descriptor, operation)

    monkeypatch.setattr("shards.lock.fcntl.flock", late_flock)
    with held_file(path):
        assert path.exists()
        assert not remove_abandoned(path)


def test_a_missing_folder_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError), held_file(tmp_path / "no" / "file.lock"):
        pass
