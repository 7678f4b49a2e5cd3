"""The SageMaker contract: what a training container is told, and what it does with it."""

import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import REPOSITORY

from deploy.render import holes, render
from deploy.sagemaker import training
from deploy.sagemaker.environment import Environment, read_environment
from deploy.sagemaker.hosting import server_command
from deploy.sagemaker.hyperparameters import trainer_flags
from deploy.sagemaker.training import CHANNELS, settings_of
from shards.canonical import canonical_json
from shards.errors import UserError
from train.main import parse

SAGEMAKER = REPOSITORY / "deploy" / "sagemaker"
HOSTS = ["algo-2", "algo-1", "algo-10"]


def write_config(base: Path, **files: Any) -> Path:
    """/opt/ml as SageMaker fills it."""
    folder = base / "input" / "config"
    folder.mkdir(parents=True)
    for name, document in files.items():
        (folder / f"{name}.json").write_text(canonical_json(document))
    return base


@pytest.fixture
def environment(tmp_path: Path) -> Environment:
    base = write_config(
        tmp_path,
        hyperparameters={"preset": "tiny", "max_steps": "20"},
        resourceconfig={"current_host": "algo-1", "hosts": ["algo-1"]},
        inputdataconfig={"latents": {}, "model": {}},
    )
    return read_environment({"SAGEMAKER_BASE_DIR": str(base)})


# What the container is told -----------------------------------------------------------------------


def test_a_container_of_ones_own_reads_the_files_below_opt_ml(tmp_path: Path) -> None:
    base = write_config(
        tmp_path,
        hyperparameters={"preset": "tiny", "sagemaker_region": '"us-west-2"'},
        resourceconfig={
            "current_host": "algo-2",
            "hosts": HOSTS,
            "network_interface_name": "eth0",
        },
        inputdataconfig={"latents": {"TrainingInputMode": "File"}},
    )
    found = read_environment({"SAGEMAKER_BASE_DIR": str(base)})
    assert found.hyperparameters == {"preset": "tiny"}
    assert found.channels == {"latents": base / "input" / "data" / "latents"}
    assert found.hosts == ("algo-1", "algo-10", "algo-2")
    assert found.rank == 2
    assert found.network_interface == "eth0"
    assert found.num_gpus is None
    assert found.checkpoint_dir == base / "checkpoints"
    assert found.model_dir == base / "model"


def test_the_toolkits_variables_win(tmp_path: Path) -> None:
    base = write_config(tmp_path, resourceconfig={"current_host": "algo-9", "hosts": ["algo-9"]})
    found = read_environment(
        {
            "SAGEMAKER_BASE_DIR": str(base),
            "SM_HOSTS": '["algo-2", "algo-1"]',
            "SM_CURRENT_HOST": "algo-2",
            "SM_NUM_GPUS": "8",
            "SM_HPS": '{"preset": "sd2-base-256", "learning_rate": 1e-4, "follow": true}',
            "SM_CHANNEL_LATENTS": "/data/latents",
            "SM_MODEL_DIR": "/m",
            "SM_CHECKPOINT_DIR": "/c",
            "SM_OUTPUT_DIR": "/o",
            "SM_NETWORK_INTERFACE_NAME": "ens5",
        }
    )
    assert (found.rank, found.num_gpus, found.network_interface) == (1, 8, "ens5")
    assert found.hyperparameters["learning_rate"] == "0.0001"
    assert found.hyperparameters["follow"] == "true"
    assert found.channels == {"latents": Path("/data/latents")}
    assert (found.model_dir, found.checkpoint_dir) == (Path("/m"), Path("/c"))
    assert found.output_dir == Path("/o")


@pytest.mark.parametrize(
    ("given", "as_text"),
    [
        ('"tiny"', "tiny"),
        ("tiny", "tiny"),
        ("1e-4", "0.0001"),
        ("300", "300"),
        ("true", "true"),
        ("[0.9, 0.95]", "0.9 0.95"),
        ("s3://b/x", "s3://b/x"),
        ("a lion; a leaf", "a lion; a leaf"),
    ],
)
def test_values_mean_the_same_from_the_sdk_and_from_the_api(
    tmp_path: Path, given: str, as_text: str
) -> None:
    base = write_config(tmp_path, hyperparameters={"x": given})
    assert read_environment({"SAGEMAKER_BASE_DIR": str(base)}).hyperparameters == {"x": as_text}


def test_a_container_outside_sagemaker_says_how_to_train_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"this is no SageMaker job.*train PRESET"):
        read_environment({"SAGEMAKER_BASE_DIR": str(tmp_path)})


@pytest.mark.parametrize(
    ("variables", "found"),
    [
        ({"SM_HOSTS": "algo-1"}, "SM_HOSTS: no JSON"),
        ({"SM_HOSTS": '["a"]', "SM_CURRENT_HOST": "b"}, "SM_CURRENT_HOST: b"),
        ({"SM_HOSTS": '["a"]', "SM_HPS": "[1]"}, "SM_HPS"),
        ({"SM_HOSTS": "[]"}, r"SM_HOSTS: \[\]; wanted a JSON list"),
        ({"SM_HOSTS": '"algo-1"'}, "SM_HOSTS: 'algo-1'; wanted a JSON list"),
        ({"SM_HOSTS": '["a"]', "SM_NUM_GPUS": "many"}, "SM_NUM_GPUS: many; wanted a number"),
    ],
)
def test_what_makes_no_sense_is_named(
    tmp_path: Path, variables: dict[str, str], found: str
) -> None:
    with pytest.raises(UserError, match=found):
        read_environment({"SAGEMAKER_BASE_DIR": str(tmp_path)} | variables)


# What becomes of it -------------------------------------------------------------------------------


def test_hyperparameters_become_flags_that_the_trainer_takes() -> None:
    given = {
        "max_steps": "30",
        "learning-rate": "3e-4",
        "preset": "tiny",
        "adam_betas": "0.9 0.95",
        "checkpoint_in_background": "false",
        "follow": "true",
        "sample_negative_prompt": "--blurry",
    }
    config = parse([*trainer_flags(given), "--data=/x"])
    assert (config.max_steps, config.learning_rate) == (30, 3e-4)
    assert config.adam_betas == (0.9, 0.95)
    assert config.prediction_type == "v_prediction"  # of the preset
    assert (config.checkpoint_in_background, config.follow) == (False, True)
    assert config.sample_negative_prompt == "--blurry"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"lerning_rate": "1"}, r"lerning_rate: .*no such setting.*Remedy: learning_rate"),
        ({"batch_size": "1"}, r"wanted some of preset, unet, .*global_batch_size"),
        ({"follow": "yes"}, r"follow: 'yes'; wanted true or false"),
    ],
)
def test_what_the_trainer_does_not_know_is_refused(given: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        trainer_flags(given)


def test_channels_and_folders_become_settings(environment: Environment) -> None:
    settings = settings_of(environment)
    assert settings["data"] == str(environment.channels["latents"])
    assert settings["model"] == str(environment.channels["model"])
    assert settings["output_dir"] == str(environment.checkpoint_dir)


def test_a_channel_that_nothing_reads_is_refused(environment: Environment) -> None:
    """A published job called its channel `train`; its script read SM_CHANNEL_TRAINING."""
    with pytest.raises(UserError, match="channel train: nothing reads it; wanted some of latents"):
        settings_of(replace(environment, channels={"train": Path("/x")}))


def test_a_job_without_latents_is_refused(environment: Environment) -> None:
    with pytest.raises(UserError, match=r"no latents.*channel latents"):
        settings_of(replace(environment, channels={}))
    with_url = {"data": "s3://b/latents"}
    found = settings_of(replace(environment, channels={}, hyperparameters=with_url))
    assert found["data"] == "s3://b/latents"


def test_a_channel_and_a_hyperparameter_cannot_say_the_same(environment: Environment) -> None:
    with pytest.raises(UserError, match="hyperparameter data says the same"):
        settings_of(replace(environment, hyperparameters={"data": "s3://b/latents"}))


@pytest.mark.parametrize("given", [{"max_restarts": "3"}, {"checkpoint_format": "sharded"}])
def test_machines_that_share_no_folder_cannot_restart_or_write_parts(
    environment: Environment, given: dict[str, str]
) -> None:
    several = replace(environment, hosts=("a", "b"), current_host="a", hyperparameters=given)
    with pytest.raises(UserError, match=r"output_dir=s3://"):
        settings_of(several)
    settings_of(replace(several, hosts=("a",)))
    shared = {**given, "output_dir": "memory://run"}
    assert settings_of(replace(several, hyperparameters=shared))["output_dir"] == "memory://run"


def test_nccl_talks_over_the_interface_that_sagemaker_names(
    environment: Environment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NCCL_SOCKET_IFNAME", raising=False)
    named = replace(environment, network_interface="ens5")
    assert training.trainer_variables(named)["NCCL_SOCKET_IFNAME"] == "ens5"
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "eth1")
    assert training.trainer_variables(named)["NCCL_SOCKET_IFNAME"] == "eth1"


# The trainer's end --------------------------------------------------------------------------------


def run_script(environment: Environment, script: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """The job with a few lines of Python in the place of the trainer."""
    monkeypatch.setattr(
        training, "trainer_command", lambda *_, **__: [sys.executable, "-c", script]
    )
    return training.run(environment)


def test_a_failure_is_told_in_the_trainers_own_words(
    environment: Environment, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = (
        "import sys; sys.stderr.write('noise\\ntrain: error: no dataset\\nmore\\n'); sys.exit(2)"
    )
    assert run_script(environment, script, monkeypatch) == 2
    assert (environment.output_dir / "failure").read_text() == "train: error: no dataset"


def test_a_crash_is_told_by_the_end_of_what_it_said(
    environment: Environment, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = "import sys; sys.stderr.write('x' * 5000 + '\\n'); raise ValueError('the reason')"
    assert run_script(environment, script, monkeypatch) == 1
    failure = (environment.output_dir / "failure").read_text()
    assert failure.startswith("status 1;")
    assert failure.rstrip().endswith("ValueError: the reason")
    assert len(failure) <= 1024


def test_a_process_that_was_killed_is_a_failure(
    environment: Environment, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run_script(environment, "import os; os.kill(os.getpid(), 9)", monkeypatch) == 137
    assert "status -9" in (environment.output_dir / "failure").read_text()


def test_a_stop_is_passed_on_and_is_no_failure(
    environment: Environment, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = (
        "import signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))\n"
        "sys.stderr.write('ready\\n'); sys.stderr.flush(); time.sleep(60)"
    )
    before = signal.getsignal(signal.SIGTERM)
    said: list[str] = []

    class Screen:
        def write(self, text: str) -> None:
            said.append(text)
            if "ready" in text:
                os.kill(os.getpid(), signal.SIGTERM)

        def flush(self) -> None:
            pass

    monkeypatch.setattr(sys, "stderr", Screen())
    assert run_script(environment, script, monkeypatch) == 0
    assert not (environment.output_dir / "failure").exists()
    assert signal.getsignal(signal.SIGTERM) == before
    assert not any(environment.model_dir.glob("*"))


@pytest.mark.parametrize("given", [{"batch": "8"}, {"max_restarts": "many"}])
def test_the_containers_status_and_failure_tell_of_a_wrong_hyperparameter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: dict[str, str]
) -> None:
    base = write_config(tmp_path, hyperparameters=given, inputdataconfig={"latents": {}})
    monkeypatch.setenv("SAGEMAKER_BASE_DIR", str(base))
    for name in [name for name in os.environ if name.startswith("SM_")]:
        monkeypatch.delenv(name)
    assert training.main() == 2
    assert f"hyperparameter {next(iter(given))}" in (base / "output" / "failure").read_text()


# Hosting ------------------------------------------------------------------------------------------


def test_an_endpoint_without_a_model_says_what_it_wants(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"empty.*ModelDataUrl, or LATENTMILL_SOURCE="):
        server_command({"SAGEMAKER_BASE_DIR": str(tmp_path)})


def test_an_endpoint_serves_the_archive_or_what_the_environment_names(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model_index.json").write_text("{}")
    base = {"SAGEMAKER_BASE_DIR": str(tmp_path)}
    command = server_command(base)
    assert command[1:6] == ["-m", "serve", "run", "--source", str(tmp_path / "model")]
    assert command[6:10] == ["--host", "0.0.0.0", "--port", "8080"]
    other = server_command(
        {**base, "LATENTMILL_SOURCE": "s3://b/run", "LATENTMILL_SERVE_ARGS": "--weights ema"}
    )
    assert command[command.index("--token") + 1] == ""  # LATENTMILL_TOKEN would shut SageMaker out
    assert other[5] == "s3://b/run"
    assert other[-2:] == ["--weights", "ema"]


def test_a_quote_that_does_not_end_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"LATENTMILL_SERVE_ARGS: .*No closing quotation"):
        server_command({"LATENTMILL_SOURCE": "s3://b/run", "LATENTMILL_SERVE_ARGS": "--weights 'e"})


# Requests -----------------------------------------------------------------------------------------

REQUESTS = {
    "training-job": "CreateTrainingJob",
    "model": "CreateModel",
    "endpoint-config": "CreateEndpointConfig",
    "endpoint": "CreateEndpoint",
}
VALUES = {
    "NAME": "sd2-1",
    "ROLE": "arn:aws:iam::111122223333:role/training",
    "IMAGE": "111122223333.dkr.ecr.us-west-2.amazonaws.com/latentmill:sagemaker",
    "BUCKET": "a-bucket",
    "ARCHIVE": "s3://a-bucket/model.tar.gz",
    "MODEL": "sd2-1",
    "CONFIG": "sd2-1",
}


def request_of(name: str, **values: str) -> dict[str, Any]:
    file = SAGEMAKER / f"{name}.yaml"
    needed = {hole for hole, default in holes(file.read_text()).items() if default is None}
    given = {hole: VALUES[hole] for hole in needed}
    document: dict[str, Any] = yaml.safe_load(render(file, given | values))
    return document


@pytest.fixture(scope="module")
def service() -> Any:
    botocore = pytest.importorskip("botocore.session")
    return botocore.Session().get_service_model("sagemaker")


def problems(value: Any, shape: Any, path: str = "") -> Iterator[str]:
    """Values that the service's own model does not list, or whose text has another form."""
    if shape.type_name == "structure":
        for name, entry in value.items():
            yield from problems(entry, shape.members[name], f"{path}.{name}")
    elif shape.type_name == "list":
        for number, entry in enumerate(value):
            yield from problems(entry, shape.member, f"{path}.{number}")
    elif getattr(shape, "enum", None) and value not in shape.enum:
        yield f"{path}: {value}"


@pytest.mark.parametrize("name", REQUESTS)
def test_sagemaker_takes_the_request(service: Any, name: str) -> None:
    from botocore.validate import ParamValidator

    shape = service.operation_model(REQUESTS[name]).input_shape
    document = request_of(name)
    report = ParamValidator().validate(document, shape)
    assert not report.has_errors(), report.generate_report()
    assert list(problems(document, shape)) == []


def test_an_instance_type_that_does_not_exist_would_be_noticed(service: Any) -> None:
    """`ml.p4dn.24xlarge`, which was published, is none."""
    shape = service.operation_model("CreateTrainingJob").input_shape
    document = request_of("training-job", INSTANCE="ml.p4dn.24xlarge")
    assert list(problems(document, shape)) == [".ResourceConfig.InstanceType: ml.p4dn.24xlarge"]


def test_the_request_and_the_entry_mean_the_same_channels_and_folders(tmp_path: Path) -> None:
    document = request_of("training-job")
    names = {channel["ChannelName"] for channel in document["InputDataConfig"]}
    assert "latents" in names <= set(CHANNELS)
    assert trainer_flags(document["HyperParameters"]) == ["sd2-base-256"]
    write_config(tmp_path)
    default = read_environment({"SAGEMAKER_BASE_DIR": str(tmp_path)}).checkpoint_dir
    wanted = Path(document["CheckpointConfig"]["LocalPath"])
    assert default.relative_to(tmp_path) == wanted.relative_to("/opt/ml")


def test_a_spot_job_is_retried_and_may_wait_longer_than_it_runs() -> None:
    document = request_of("training-job")
    assert document["EnableManagedSpotTraining"] is True
    stopping = document["StoppingCondition"]
    assert stopping["MaxWaitTimeInSeconds"] >= stopping["MaxRuntimeInSeconds"]
    assert document["RetryStrategy"]["MaximumRetryAttempts"] >= 1
