"""Starting again after failures: what is tried again, how often, and by whom."""

import subprocess
import sys
from pathlib import Path

import pytest
from helpers_train import start

from shards.errors import UserError
from train.restarts import restarted_on_failure

SCRIPT = """
import sys
from pathlib import Path

from shards.errors import StorageError, UserError
from train.restarts import restarted_on_failure

ERRORS = {"crash": RuntimeError("device lost"), "storage": StorageError("s3://x", "timed out"),
          "user": UserError("--data", "wrong"), "interrupt": KeyboardInterrupt()}

log, kind, failures, allowed = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
with log.open("a") as file:
    file.write(" ".join(sys.argv[5:]) + chr(10))
with restarted_on_failure(allowed):
    if len(log.read_text().splitlines()) <= failures:
        raise ERRORS[kind]
print("done")
"""


def attempts(folder: Path, kind: str, *, failures: int, allowed: int) -> tuple[int, int, str, str]:
    """Status, how often the command ran, its output and its errors."""
    script, log = folder / "script.py", folder / "log"
    script.write_text(SCRIPT)
    process = start(
        "-W", "ignore", script, log, kind, failures, allowed, "--some", "flag", PYTHONPATH="."
    )
    out, err = process.communicate(timeout=60)
    lines = log.read_text().splitlines()
    assert set(lines) == {"--some flag"}, "each attempt has the same command line"
    return process.returncode, len(lines), out, err


@pytest.mark.parametrize("kind", ["crash", "storage"])
def test_a_failure_is_tried_again_until_it_passes(tmp_path, kind):
    status, runs, out, err = attempts(tmp_path, kind, failures=2, allowed=3)
    assert (status, runs) == (0, 3)
    assert out == "done\n"
    assert "starting again, 1 of 3" in err
    assert "starting again, 2 of 3" in err
    assert "Traceback" in err


def test_it_gives_up_with_the_last_error(tmp_path):
    status, runs, _, err = attempts(tmp_path, "crash", failures=9, allowed=2)
    assert (status, runs) == (1, 3)
    assert err.rstrip().endswith("RuntimeError: device lost")


@pytest.mark.parametrize(("kind", "allowed"), [("user", 3), ("interrupt", 3), ("crash", 0)])
def test_what_the_user_must_put_right_is_not_tried_again(tmp_path, kind, allowed):
    status, runs, _, err = attempts(tmp_path, kind, failures=9, allowed=allowed)
    assert status != 0
    assert runs == 1
    assert "starting again" not in err


def test_one_of_several_processes_cannot_start_again_alone(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    refusal = pytest.raises(UserError, match=r"accelerate launch --max_restarts 3")
    with refusal, restarted_on_failure(3):
        pytest.fail("it must not begin")
    with restarted_on_failure(0):
        pass


def test_a_training_that_crashes_continues_from_its_checkpoint(tmp_path, make_latent_dataset):
    """The first attempt dies after its checkpoint of step 4, in the middle of a step."""
    data = make_latent_dataset(tmp_path / "latents", [40], dim=128, num_tokens=5).path
    code = f"""
import os, sys
from train import trainer
from train.main import main

train_step = trainer.Trainer._train_step

def fragile(self, batch):
    if self.step == 5 and "LATENTMILL_RESTARTS" not in os.environ:
        raise RuntimeError("device lost")
    train_step(self, batch)

trainer.Trainer._train_step = fragile
main(["tiny", "--data", {str(data)!r}, "--output-dir", {str(tmp_path / "run")!r},
      "--global-batch-size", "4", "--max-steps", "7", "--checkpoint-every", "4",
      "--num-samples", "0", "--max-restarts", "1"])
"""
    (tmp_path / "run.py").write_text(code)
    done = subprocess.run(
        [sys.executable, tmp_path / "run.py"],
        env={"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "RuntimeError: device lost" in done.stderr
    assert f"continuing {tmp_path / 'run'} at step 4" in done.stdout
    assert (tmp_path / "run" / "checkpoints" / "000007").exists()
