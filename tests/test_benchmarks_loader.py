"""The loader benchmark: right bytes before any time, honest arithmetic, peers that may be gone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import run_python

from benchmarks import loader, loader_arms
from benchmarks.loader import LoaderConfig, check_config, check_delivered, choose_peers, compare
from benchmarks.loader_arms import PEERS, ArmSpec, peers_python
from benchmarks.loader_data import write_latent_dataset
from benchmarks.loader_own import build_reader, read_batches
from benchmarks.peers.samples import SHAPES, digest, draw_sample
from benchmarks.peers.worker import count_calls, digest_block, time_block
from shards.errors import UserError

SHORT = ["--num-samples", 64, "--batch-size", 8, "--blocks", 2, "--warmup", 5, "--shards", 3]
SHORT += ["--out", "-"]
SPREAD = {"median", "p10", "p90"}


def run_loader(scratch: Path, *more: object) -> tuple[dict[str, Any], str]:
    """The result of a short run, and all that it printed."""
    done = run_python("-m", "benchmarks", "loader", *SHORT, "--scratch", scratch, *more)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stdout


def check_arm(arm: dict[str, Any]) -> None:
    for figure in ("samples_per_sec", "bytes_per_sec", "memcpy_frac", "cpu_us_per_sample"):
        assert set(arm[figure]) == SPREAD
        assert arm[figure]["median"] > 0
    assert len(arm["sec_per_block"]) == 2
    assert arm["calls_per_sample"] >= 0


def test_the_command_measures_our_arms_and_leaves_nothing_behind(tmp_path):
    out = tmp_path / "result.json"
    result, _ = run_loader(tmp_path / "scratch", "--peers", "none", "--out", out)
    assert result == json.loads(out.read_text())
    assert result["theme"] == "loader"
    assert list(result["arms"]) == ["ours", "ours: image", "ours: text", "memcpy"]
    for arm in result["arms"].values():
        check_arm(arm)
    assert result["arms"]["memcpy"]["memcpy_frac"]["median"] == 1
    assert result["absent_peers"] == []
    assert result["best_peer"] is None
    assert " loader " in result["environment"]["command"]
    assert list((tmp_path / "scratch").iterdir()) == []


def test_all_peers_deliver_the_same_samples(tmp_path):
    if not peers_python():
        pytest.skip("no .venv-peers: `make peers` installs the other loaders")
    result, printed = run_loader(tmp_path)
    assert set(PEERS) < set(result["arms"])
    for peer in PEERS:
        check_arm(result["arms"][peer])
        assert result["arms"][peer]["version"]
    assert result["best_peer"] in PEERS
    assert f"as fast as {result['best_peer']}" in printed


def test_absent_peers_are_named_and_ours_is_measured_all_the_same(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loader_arms, "_PEERS_VENV", tmp_path / "nowhere")
    few = {"num_samples": 16, "batch_size": 8, "blocks": 1, "warmup": 1, "shards": 1}
    result = loader.measure(LoaderConfig(**few, scratch=str(tmp_path), peers="mds,litdata"))
    assert result["absent_peers"] == ["mds", "litdata"]
    assert "ours" in result["arms"]
    assert "not measured: mds, litdata; `make peers`" in capsys.readouterr().out


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write_latent_dataset(tmp_path_factory.mktemp("loader") / "latents", 24, 2)


@pytest.mark.parametrize("arrays", [["moments", "states"], ["moments"], ["states"]])
def test_our_arms_deliver_every_sample_once_with_its_bytes(dataset, arrays):
    batches = read_batches(build_reader(dataset, 8), 8, arrays)
    answer = digest_block(batches, 0, 3)
    batches.close()
    assert sorted(answer["numbers"]) == list(range(24))
    spec = ArmSpec(name="ours", kind="ours", command=(), arrays=tuple(arrays))
    check_delivered(spec, answer["numbers"], answer["digests"], 24)


def test_an_arm_that_delivers_other_bytes_is_refused():
    spec = ArmSpec(name="mds", kind="peer", command=())
    samples = {number: draw_sample(number) for number in (3, 5)}
    check_delivered(spec, [3, 5], [digest(samples[3]), digest(samples[5])], 2)
    samples[5]["states"][76, 1023] += 1
    with pytest.raises(UserError, match=r"mds.*other bytes than sample 5"):
        check_delivered(spec, [3, 5], [digest(samples[3]), digest(samples[5])], 2)
    with pytest.raises(UserError, match="sample 3"):
        check_delivered(spec, [3], [digest({"states": draw_sample(3)["states"]})], 1)
    with pytest.raises(UserError, match="delivered 0 samples"):
        check_delivered(spec, [], [], 2)


def test_a_batch_that_is_no_array_in_one_piece_is_refused():
    moments = np.zeros((2, *SHAPES["moments"]), np.float16)
    batch = {"sample": np.arange(2), "moments": moments.transpose(0, 1, 3, 2)}
    with pytest.raises(ValueError, match="contiguous"):
        digest_block(iter([batch]), 0, 1)


def test_an_arm_that_ends_is_reported_with_its_last_words(tmp_path):
    command = ("python3", "-c", "import sys; sys.exit('no such chunk')")
    spec = ArmSpec(name="litdata", kind="peer", command=command)
    with (
        pytest.raises(UserError, match=r"litdata.*no such chunk"),
        loader_arms.running([spec], tmp_path),
    ):
        pass


def endless(batch_size):
    while True:
        yield {"sample": np.arange(batch_size), "states": np.zeros((batch_size, 4), np.float16)}


def test_a_block_counts_what_follows_the_skipped_batches():
    answer = time_block(endless(8), 2, 3)
    assert (answer["samples"], answer["bytes"]) == (24, 3 * 8 * 4 * 2)
    assert answer["seconds"] > 0


def test_calls_are_counted_in_the_threads_that_the_arm_starts(dataset):
    reader = build_reader(dataset, 8)
    single = count_calls(lambda: endless(8), 2, 4)
    threaded = count_calls(lambda: read_batches(reader, 8, ["moments"]), 2, 4)
    assert single["samples"] == threaded["samples"] == 32
    assert single["calls"] < 100 < threaded["calls"]


def test_ours_is_compared_with_the_best_peer_block_by_block():
    def arm(kind, median, seconds):
        return {"kind": kind, "samples_per_sec": {"median": median}, "sec_per_block": seconds}

    arms = {"ours": arm("ours", 9.0, [1.0, 2.0]), "memcpy": arm("memcpy", 99.0, [0.1, 0.1])}
    assert compare(arms) == {"best_peer": None, "ours_over_best_peer": None}
    arms |= {"slow": arm("peer", 1.0, [9.0, 9.0]), "fast": arm("peer", 2.0, [4.0, 4.0])}
    result = compare(arms)
    assert result["best_peer"] == "fast"
    assert result["ours_over_best_peer"]["median"] == pytest.approx(3.0)


def test_peers_are_chosen_by_name():
    assert choose_peers("all") == list(PEERS)
    assert choose_peers("none") == []
    assert choose_peers("mds, litdata") == ["mds", "litdata"]
    with pytest.raises(UserError, match=r"ffcv.*webdataset, mds, litdata"):
        choose_peers("mds,ffcv")


def test_samples_that_make_no_whole_batches_are_refused():
    check_config(LoaderConfig())
    for settings in ({"num_samples": 4097}, {"num_samples": 256}, {"blocks": 0}, {"shards": 0}):
        with pytest.raises(UserError):
            check_config(LoaderConfig(**settings))
