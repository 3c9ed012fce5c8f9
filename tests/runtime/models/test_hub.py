"""Models by their names on the Hub: what is fetched, what is kept, what is said where that fails."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import constants

from echo_rl.config import EngineConfig
from echo_rl.contracts import Request, SamplingParams
from echo_rl.controllers import registry
from echo_rl.errors import ConfigError, WeightsError
from echo_rl.runtime.engine import Engine
from echo_rl.runtime.environment import environment_of, load_engine
from echo_rl.runtime.models import hub as hub_module
from echo_rl.runtime.models.hub import fetch, is_hub_name
from echo_rl.runtime.models.locate import pinned, resolve_drafter, resolve_model
from echo_rl.workloads.driver import serve
from tests import tiny
from tests.runtime.models.fake_hub import fake_hub

ROOT = Path(__file__).parents[3]
MODEL, DRAFTER = "maker/tiny", "maker/tiny-eagle3"
LIMITS = {"device": "cpu", "dtype": "float32", "kv_tokens": 1024, "max_context": 256, "threads": 1}
READ = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A target and a drafter, with what repositories have beside the files that are needed."""
    root = tmp_path_factory.mktemp("repositories")
    target, drafter = tiny.target_folder(root / "target"), tiny.drafter_folder(root / "drafter")
    (target / "onnx").mkdir()
    for unwanted in ("pytorch_model.bin", "model.gguf", "onnx/model.safetensors", "README.md", "training_args.bin",
                     "consolidated.safetensors"):  # fmt: skip
        (target / unwanted).write_bytes(b"not needed")
    return target, drafter


@pytest.fixture
def hub(folders, tmp_path, monkeypatch):
    with fake_hub() as hub:
        hub.add(MODEL, folders[0])
        hub.add(DRAFTER, folders[1])
        use(monkeypatch, hub.url, tmp_path / "cache")
        monkeypatch.chdir(tmp_path)
        yield hub


def use(monkeypatch, url: str, cache: Path) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))


@pytest.fixture
def nowhere(tmp_path, monkeypatch) -> str:
    """The address of a Hub that is not there, with an empty cache."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    use(monkeypatch, url, tmp_path / "cache")
    return url


def tokens(engine: Engine) -> tuple[int, ...]:
    request = Request("r", (70, 71, 72), SamplingParams(max_new_tokens=12, ignore_eos=True))
    return serve(engine, registry.make("chain"), [request], 1).requests[0].tokens


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("HuggingFaceTB/SmolLM2-135M-Instruct", True),
        ("a/b_c.d", True),
        ("smollm2", False),
        ("default", False),
        ("gpt2", False),
        ("./a/b", False),
        ("../a", False),
        ("/a/b", False),
        ("a/b/c", False),
        ("a/", False),
        ("a b/c", False),
        ("", False),
    ],
)
def test_names_of_the_hub_are_told_from_paths(name, answer):
    assert is_hub_name(name) is answer


def test_a_model_and_a_drafter_by_name_are_those_of_the_folders(hub, folders):
    named = EngineConfig(MODEL, drafter=DRAFTER, **LIMITS)
    engine, environment = load_engine(named)
    assert tokens(engine) == tokens(Engine.load(replace(named, model=str(folders[0]), drafter=str(folders[1]))))
    assert set(hub.downloads()) == READ and len(hub.downloads()) == len(READ) + 2
    commits = {name: repository.refs["main"] for name, repository in hub.repositories.items()}
    assert environment["model"] == f"{MODEL}@{commits[MODEL]}"
    assert environment["drafter"] == f"{DRAFTER}@{commits[DRAFTER]}"
    assert engine.config.model_source == environment["model"]
    other = environment_of(replace(named, model=str(folders[0]), drafter=str(folders[1])))
    assert {k for k in other if other[k] != environment[k]} == {"model", "drafter"}


def test_what_is_pinned_stays_when_the_branch_moves_and_needs_no_hub(hub, folders, tmp_path):
    first = hub.repositories[MODEL].refs["main"]
    config = pinned(EngineConfig(MODEL, drafter=None, **LIMITS))
    assert config.revision == first and pinned(config) == config
    second = hub.repositories[MODEL].move(tiny.target_folder(tmp_path / "retrained", seed=1))
    hub.asked.clear()
    assert Engine.load(config).config.revision == first
    assert hub.asked == []
    assert pinned(replace(config, revision=None)).revision == second


def test_a_revision_is_a_branch_a_tag_or_a_commit(hub, tmp_path):
    main = hub.repositories[MODEL].refs["main"]
    other = hub.repositories[MODEL].move(tiny.target_folder(tmp_path / "other", seed=1), ref="v1.0")
    assert resolve_model(MODEL, "v1.0") == resolve_model(MODEL, other) != resolve_model(MODEL, main)
    assert resolve_model(MODEL) == resolve_model(MODEL, "main") == resolve_model(MODEL, main)
    drafter = resolve_drafter(DRAFTER, MODEL, "main")
    assert drafter is not None and drafter.name == hub.repositories[DRAFTER].refs["main"]


def test_a_folder_goes_before_the_hub(hub, folders, tmp_path):
    shutil.copytree(folders[0], tmp_path / MODEL)
    assert resolve_model(MODEL) == Path(MODEL)
    assert pinned(EngineConfig(MODEL, drafter=None)).revision is None
    assert hub.asked == []


@pytest.mark.parametrize("values", [{"revision": "v1"}, {"drafter_revision": "v1"}])
def test_a_revision_of_what_is_not_the_hubs_is_refused(values):
    with pytest.raises(ConfigError, match="revision 'v1' is of no use: '(smollm2|default)' is not taken from"):
        pinned(EngineConfig(**values))


def test_the_cache_serves_without_a_hub(hub, monkeypatch, tmp_path):
    folder = fetch(MODEL)
    use(monkeypatch, "http://127.0.0.1:9", tmp_path / "cache")
    assert fetch(MODEL) == folder
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert fetch(MODEL) == folder


def test_a_connection_that_breaks_is_resumed(hub, folders, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 500)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub.cuts["model.safetensors"] = [1000, 2000]
    folder = fetch(MODEL)
    assert (folder / "model.safetensors").read_bytes() == (folders[0] / "model.safetensors").read_bytes()
    ranges = [line.partition("model.safetensors ")[2] for line in hub.asked if "model.safetensors bytes" in line]
    assert ranges == ["bytes=1000-", "bytes=3000-"]


def test_a_download_that_failed_goes_on_with_the_files_that_are_missing(hub, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub.cuts["model.safetensors"] = [0] * 6
    with pytest.raises(WeightsError, match=f"cannot download '{MODEL}' .*; try again") as failure:
        fetch(MODEL)
    assert "\n" not in str(failure.value)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(WeightsError, match="no complete maker/tiny; it is not downloaded since HF_HUB_OFFLINE is set"):
        fetch(MODEL)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    done = {file for file in hub.downloads() if file != "model.safetensors"}
    hub.asked.clear()
    assert {path.name for path in fetch(MODEL).iterdir()} == READ
    assert "model.safetensors" in hub.downloads() and len(done) >= 1
    assert len(hub.downloads()) == len(set(hub.downloads()))


def refused(name: str, revision: str | None = None) -> str:
    with pytest.raises(WeightsError) as failure:
        fetch(name, revision)
    text = str(failure.value)
    assert "\n" not in text and "Traceback" not in text
    return text


def test_a_name_that_nobody_has_is_neither_here_nor_there(hub):
    text = refused("results/mine")
    assert "there is no folder 'results/mine' here, and the Hugging Face Hub has no such model" in text
    assert "hf auth login" in text and "HF_TOKEN" in text


def test_a_gated_repository_says_where_its_terms_are(hub, folders):
    hub.add("maker/gated", folders[0], gated=True)
    assert f"accept its terms at {hub.url}/maker/gated, then log in" in refused("maker/gated")


def test_a_token_that_the_hub_refuses_is_told_from_a_wrong_name(hub):
    hub.refuse = (401, "")
    text = refused(MODEL)
    assert f"the Hugging Face Hub refuses '{MODEL}'" in text and "HF_TOKEN" in text


def test_a_hub_that_is_down_says_so(hub, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub.refuse = (503, "")
    assert "cannot be reached (" in refused(MODEL) and "503" in refused(MODEL)


@pytest.mark.parametrize("revision", ["nonsense", "0" * 40])
def test_a_revision_that_is_not_there_is_named(hub, revision):
    assert f"'{MODEL}' on the Hugging Face Hub has no revision '{revision}'" in refused(MODEL, revision)


def test_a_repository_without_safetensors_is_refused_and_its_pickles_stay_there(hub, tmp_path):
    folder = tmp_path / "pickled"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    hub.add("maker/pickled", folder)
    assert "has no model.safetensors" in refused("maker/pickled")
    assert hub.downloads() == ["config.json"]


def test_without_a_network_the_cache_and_the_address_are_named(nowhere, tmp_path, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    text = refused(MODEL)
    assert f"the cache in {tmp_path / 'cache'} has no complete {MODEL}" in text
    assert f"{nowhere} cannot be reached (" in text and text.endswith("; check the connection, or give a folder")


def test_offline_mode_is_named(nowhere, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "revision v1; it is not downloaded since HF_HUB_OFFLINE is set" in refused(MODEL, "v1")


def test_every_kind_of_failure_is_an_error_of_this_package(monkeypatch):
    def fail(*args: object, **more: object) -> str:
        raise OSError("No space left on device\nat some place")

    monkeypatch.setattr(hub_module, "snapshot_download", fail)
    assert "(OSError: No space left on device); try again" in refused(MODEL)


def test_commands_take_names(hub, folders, tmp_path):
    """As a user would: a process of its own, with the Hub's own variables."""
    environment = os.environ | {"HF_ENDPOINT": hub.url, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    command = [sys.executable, "-m", "echo_rl.cli", "generate", "hello", "--raw", "--max-new-tokens", "8"]
    command += ["--model", MODEL, "--kv-tokens", "1024", "--max-context", "256"]
    run = lambda **more: subprocess.run(command, capture_output=True, text=True, env=environment | more)  # noqa: E731
    done = run(HF_HOME=str(tmp_path / "home"))
    assert done.returncode == 0 and done.stdout, done.stderr
    assert "note: decoding plainly, since no drafter is loaded" in done.stderr
    assert (tmp_path / "home" / "hub" / "models--maker--tiny" / "refs" / "main").is_file()
    lost = run(HF_HOME=str(tmp_path / "empty"), HF_HUB_OFFLINE="1")
    assert lost.returncode == 2 and lost.stderr.startswith("error: there is no folder 'maker/tiny' here")
    assert lost.stderr.count("\n") == 1
