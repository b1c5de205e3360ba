"""A folder, a GGUF file or a hub name becomes tensors by the model's own names."""

import copy
import json
import os
import re
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from hsplit_flwr import cli
from hsplit_flwr.common.cache_folder import CACHE_VARIABLE
from hsplit_flwr.errors import ConfigError, UnsupportedModelError
from hsplit_flwr.models import gguf_cache
from hsplit_flwr.models.assets import smollm2_checkpoint
from hsplit_flwr.models.files import ModelFiles
from hsplit_flwr.models.gguf_cache import convert_once
from hsplit_flwr.models.segments import load_segment
from hsplit_flwr.models.tensor_files import INDEX, WEIGHTS
from tests.helpers.models import ARCHITECTURES, tiny_config, tiny_model

LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4665a5ea423c2713d4\nsize 548105171\n"
SMOLLM2_CUT = 4
PEAK_LIMIT = 1.25
"""of the head's own bytes: what loading it may take above the imports"""


@pytest.fixture
def llama(tmp_path: Path) -> tuple[PreTrainedModel, Path]:
    model = tiny_model("llama", tied=False)
    folder = tmp_path / "llama"
    model.save_pretrained(folder)
    return model, folder


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_tensor_reads_back_under_its_state_dict_name(name: str, tied: bool, tmp_path: Path) -> None:
    model = tiny_model(name, tied=tied)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    files = ModelFiles.resolve(str(tmp_path))
    state = model.state_dict()
    for key, tensor in state.items():
        assert torch.equal(files.read(key), tensor), key
    distinct = {tensor.data_ptr(): None for tensor in state.values()}
    assert len(files.weight_names()) == len(distinct) == len(state) - tied
    assert files.weight_names() == [key for key in state if key in files.weight_names()]


def test_a_checkpoint_of_the_bare_model_is_found_too(tmp_path: Path) -> None:
    """GPT-2's checkpoint on the hub is one: its names lack 'transformer.'."""
    model = tiny_model("gpt2", tied=True)
    model.transformer.save_pretrained(tmp_path)
    assert "wte.weight" in load_file(tmp_path / WEIGHTS)
    files = ModelFiles.resolve(str(tmp_path))
    for key, tensor in model.state_dict().items():
        assert torch.equal(files.read(key), tensor), key


@pytest.mark.parametrize("kept", ["model.embed_tokens.weight", "lm_head.weight"])
def test_of_a_tied_pair_either_name_may_be_stored(kept: str, tmp_path: Path) -> None:
    model = tiny_model("llama", tied=True)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    tensors[kept] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, tmp_path / WEIGHTS)
    files = ModelFiles.resolve(str(tmp_path))
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(files.read(name), model.get_input_embeddings().weight)


def test_a_tied_pair_stored_twice_must_agree(tmp_path: Path) -> None:
    tiny_model("llama", tied=True).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, tmp_path / WEIGHTS)
    assert "lm_head.weight" not in ModelFiles.resolve(str(tmp_path)).weight_names()
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"] + 1}, tmp_path / WEIGHTS)
    with pytest.raises(UnsupportedModelError, match=r"Expected lm_head\.weight to equal model\.embed_tokens\.weight"):
        ModelFiles.resolve(str(tmp_path)).weight_names()


def test_a_read_maps_the_file_unless_it_must_convert(llama: tuple[PreTrainedModel, Path]) -> None:
    model, folder = llama
    files = ModelFiles.resolve(str(folder))
    name = "model.layers.0.mlp.up_proj.weight"
    view = files.read(name)
    assert view.data_ptr() == files.read(name, torch.float32).data_ptr()
    assert torch.equal(files.read(name, torch.bfloat16), model.state_dict()[name].to(torch.bfloat16))
    view.add_(1.0)  # the mapping is private
    assert torch.equal(ModelFiles.resolve(str(folder)).read(name), model.state_dict()[name])


def test_the_config_is_that_of_the_folder(llama: tuple[PreTrainedModel, Path]) -> None:
    _, folder = llama
    config = ModelFiles.resolve(str(folder)).config
    assert (config.model_type, config.num_hidden_layers, config.hidden_size) == ("llama", 4, 32)


# --- refusals --------------------------------------------------------------------------------------------------


def test_what_is_not_there_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    for name in (str(tmp_path / "absent"), "someone/absent-model", "not a//name"):
        with pytest.raises(ConfigError, match="a model of the hub, found nothing under") as caught:
            ModelFiles.resolve(name)
        assert repr(name) in str(caught.value)
    with pytest.raises(ConfigError, match=r"Expected a GGUF file, found none at .*absent\.gguf"):
        ModelFiles.resolve(str(tmp_path / "absent.gguf"))


def test_a_folder_without_config_or_safetensors_is_refused(llama: tuple[PreTrainedModel, Path]) -> None:
    _, folder = llama
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")
    with pytest.raises(
        UnsupportedModelError, match=r"found weights \['pytorch_model\.bin'\]\. Load .* save_pretrained"
    ):
        ModelFiles.resolve(str(folder))
    (folder / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"Expected a folder with config\.json, found none in"):
        ModelFiles.resolve(str(folder))


def test_a_missing_shard_is_refused(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path, max_shard_size="20KB")
    shard = sorted(set(json.loads((tmp_path / INDEX).read_text())["weight_map"].values()))[1]
    (tmp_path / shard).unlink()
    with pytest.raises(ConfigError, match=rf"Expected every shard .* found \['{shard}'\] missing"):
        ModelFiles.resolve(str(tmp_path))


def test_a_missing_tensor_is_refused_by_the_segment_that_needs_it(llama: tuple[PreTrainedModel, Path]) -> None:
    _, folder = llama
    tensors = load_file(folder / WEIGHTS)
    del tensors["model.layers.3.mlp.up_proj.weight"]
    save_file(tensors, folder / WEIGHTS)
    files = ModelFiles.resolve(str(folder))
    load_segment(files, 0, 3)
    with pytest.raises(UnsupportedModelError, match=r"a tensor for 'model\.layers\.3\.mlp\.up_proj\.weight'"):
        load_segment(files, 3)


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (
            lambda path: path.write_bytes(path.read_bytes()[:-100]),
            r"safetensors file at .*safetensors, found [\d,]+ bytes",
        ),
        (lambda path: path.write_bytes(path.read_bytes()[:40]), "found 40 bytes that are none"),
        (lambda path: path.write_bytes(b""), "found 0 bytes that are none"),
        (lambda path: path.write_text(LFS_POINTER), r"found a Git LFS pointer .* \(run: git lfs pull\)"),
    ],
    ids=["cut in a tensor", "cut in the header", "empty", "LFS pointer"],
)
@pytest.mark.parametrize("sharded", [False, True], ids=["single", "sharded"])
def test_a_file_that_is_not_all_there_is_refused_by_name(
    break_it: Callable[[Path], object], message: str, sharded: bool, tmp_path: Path
) -> None:
    """A download that broke off, or a clone without Git LFS: once a bare SafetensorError."""
    tiny_model("llama").save_pretrained(tmp_path, **({"max_shard_size": "20KB"} if sharded else {}))
    path = sorted(tmp_path.glob("*.safetensors"))[-1]
    break_it(path)
    with pytest.raises(ConfigError, match=message) as caught:
        ModelFiles.resolve(str(tmp_path))
    assert str(path) in str(caught.value)
    assert "Download it again." in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"weight_map": {', "Expected JSON in .*, found 16 bytes that are none"),
        ("[]", "Expected 'weight_map' in"),
        ('{"weight_map": {"lm_head.weight": 3}}', "Expected 'weight_map' in"),
        ('{"weight_map": {"lm_head.weight": "../model.safetensors"}}', "with a file of its folder for each tensor"),
        ('{"weight_map": {"no.such.weight": "model.safetensors"}}', "Expected the tensor 'no.such.weight' in"),
    ],
)
def test_an_index_that_does_not_fit_is_refused(text: str, message: str, llama: tuple[PreTrainedModel, Path]) -> None:
    _, folder = llama
    (folder / INDEX).write_text(text)
    with pytest.raises(ConfigError, match=message):
        ModelFiles.resolve(str(folder))


@pytest.mark.parametrize(
    ("name", "shape"), [("model.embed_tokens.weight", (97, 32)), ("model.layers.2.input_layernorm.weight", (1,))]
)
def test_stored_shapes_are_those_of_the_config(
    name: str, shape: tuple[int, ...], llama: tuple[PreTrainedModel, Path]
) -> None:
    """An embedding of more rows than vocab_size, a norm of one value: both trained on; transformers refuses both."""
    _, folder = llama
    if shape == (1,):
        tensors = load_file(folder / WEIGHTS)
        save_file({**tensors, name: torch.ones(1)}, folder / WEIGHTS, metadata={"format": "pt"})
        expected: tuple[int, ...] = (32,)
    else:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 90}))
        expected = (90, 32)
    with pytest.raises(RuntimeError, match="mismatch"):
        AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(ConfigError, match=rf"Expected \S+ of the shape {re.escape(str(expected))}, ") as caught:
        load_segment(ModelFiles.resolve(str(folder)), 0, 1)
    assert f"found {shape} in {folder / WEIGHTS}" in str(caught.value)


def test_an_adapter_beside_the_model_is_refused_rather_than_ignored(
    llama: tuple[PreTrainedModel, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Transformers applies it: without it logits were 2.85 off."""
    model, folder = llama
    get_peft_model(copy.deepcopy(model), LoraConfig(target_modules=["q_proj"])).save_pretrained(folder)
    with pytest.raises(ConfigError, match=r"Expected a model alone in .* Merge it first") as caught:
        ModelFiles.resolve(str(folder))
    assert plan(folder, tmp_path, capsys) == str(caught.value)


@pytest.mark.parametrize(
    "settings",
    [
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        {"quant_method": "gptq", "bits": 4, "group_size": 128},
        {"quant_method": "awq", "bits": 4, "group_size": 128},
    ],
    ids=lambda settings: str(settings["quant_method"]),
)
def test_quantised_weights_are_refused_by_run_and_plan(
    settings: dict[str, object], llama: tuple[PreTrainedModel, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Once the plan took them for fp32 and training ended in 'mat1 and mat2 shapes cannot be multiplied'."""
    _, folder = llama
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    with pytest.raises(UnsupportedModelError, match=rf"quantised by {settings['quant_method']} .* Take the") as caught:
        load_segment(ModelFiles.resolve(str(folder)), 0, 1)
    assert plan(folder, tmp_path, capsys) == str(caught.value)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=["int8", "fp8"])
def test_quantised_weights_that_config_json_keeps_silent_about_are_refused(
    dtype: torch.dtype, llama: tuple[PreTrainedModel, Path]
) -> None:
    """Of the right shapes, so they were loaded as they are, and failed in the first matrix product."""
    _, folder = llama
    tensors = load_file(folder / WEIGHTS)
    name = "model.layers.1.mlp.up_proj.weight"
    save_file({**tensors, name: tensors[name].to(dtype)}, folder / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(UnsupportedModelError, match=rf"found {re.escape(name)} in (I8|F8_E4M3) in .*quantised"):
        load_segment(ModelFiles.resolve(str(folder)), 0, 1)


@pytest.mark.parametrize("text", ["{", LFS_POINTER, '{"model_type": "no-such-model"}', "[]", "{}"])
def test_a_config_that_cannot_be_read_is_refused_by_name(text: str, llama: tuple[PreTrainedModel, Path]) -> None:
    """Once an OSError or KeyError of transformers."""
    _, folder = llama
    (folder / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"Expected .*config\.json to be a file that transformers .* reads, found: "):
        load_segment(ModelFiles.resolve(str(folder)), 0, 1)


def test_a_generation_config_that_cannot_be_read_is_refused_by_name(llama: tuple[PreTrainedModel, Path]) -> None:
    _, folder = llama
    (folder / "generation_config.json").write_text('{"eos_token_id": ')
    with pytest.raises(ConfigError, match=r"Expected .*generation_config\.json to be a file that"):
        load_segment(ModelFiles.resolve(str(folder)), 0, 1)


def test_blocks_that_config_json_leaves_out_are_said(
    llama: tuple[PreTrainedModel, Path], caplog: pytest.LogCaptureFixture
) -> None:
    """Two layers in config.json, four in the file: half of the model would train without a word."""
    _, folder = llama
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    load_segment(ModelFiles.resolve(str(folder)), 0, 1)
    assert "18 tensors of" in caplog.text
    assert "model.layers.2.input_layernorm.weight" in caplog.text


def plan(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """What ``hsplit-flwr plan`` refuses the model of `folder` with."""
    (tmp_path / "fleet.toml").write_text('[server]\ndevice = "workstation"\n[[client]]\ndevice = "phone"\n')
    capsys.readouterr()
    code = cli.main(["plan", "--model", str(folder), "--profiles", str(tmp_path / "fleet.toml")])
    assert code == cli.USER_ERROR
    return capsys.readouterr().err.removeprefix("hsplit-flwr: error: ").removesuffix("\n")


# --- the hub's cache -------------------------------------------------------------------------------------------


def put_in_hub_cache(cache: Path, repository: str, save: PreTrainedModel) -> Path:
    """The layout that huggingface_hub keeps, without a download."""
    root = cache / f"models--{repository.replace('/', '--')}"
    snapshot = root / "snapshots" / "0123456789abcdef0123456789abcdef01234567"
    save.save_pretrained(snapshot)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(snapshot.name)
    return snapshot


def test_a_hub_name_resolves_to_the_local_cache_without_a_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    model = tiny_model("gpt2")
    snapshot = put_in_hub_cache(tmp_path, "someone/tiny", model)
    files = ModelFiles.resolve("someone/tiny")
    assert files.folder == snapshot
    assert torch.equal(files.read("transformer.wpe.weight"), model.transformer.wpe.weight)


def test_an_incomplete_snapshot_is_not_taken_for_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """AutoConfig alone leaves a snapshot with nothing but config.json."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    snapshot = put_in_hub_cache(tmp_path, "someone/tiny", tiny_model("gpt2"))
    (snapshot / WEIGHTS).unlink()
    with pytest.raises(UnsupportedModelError, match=r"found weights \[\]"):
        ModelFiles.resolve("someone/tiny")


# --- GGUF ------------------------------------------------------------------------------------------------------


def test_a_gguf_file_is_converted_once_however_many_ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    conversions: list[Path] = []
    running = threading.Event()

    def convert(gguf: Path, folder: Path) -> None:
        assert not running.is_set(), "two conversions at once"
        running.set()
        conversions.append(gguf)
        threading.Event().wait(0.2)  # time for the others to arrive at the lock
        tiny_model("llama").save_pretrained(folder)
        running.clear()

    monkeypatch.setattr(gguf_cache, "_convert", convert)
    first, same, other = tmp_path / "a.gguf", tmp_path / "sub" / "a.gguf", tmp_path / "b.gguf"
    same.parent.mkdir()
    first.write_bytes(b"GGUF one")
    same.write_bytes(b"GGUF one")
    other.write_bytes(b"GGUF two")
    folders: list[Path] = []
    threads = [threading.Thread(target=lambda: folders.append(convert_once(first))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert len(folders) == 4
    assert len({*folders, convert_once(same)}) == 1, "keyed by content"
    assert len(conversions) == 1
    assert convert_once(other) not in folders
    assert ModelFiles.resolve(str(first)).config.model_type == "llama"


def test_a_failed_conversion_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"not a GGUF file")
    for _ in range(2):
        with pytest.raises(UnsupportedModelError, match=r"that transformers supports, found .*broken\.gguf"):
            convert_once(broken)
        assert [path.suffix for path in (tmp_path / "cache").iterdir()] in ([], [".lock"])


def test_a_conversion_that_never_ends_is_not_waited_for_forever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    monkeypatch.setattr(gguf_cache, "CONVERSION_LIMIT_S", 0.05)
    gguf = tmp_path / "slow.gguf"
    gguf.write_bytes(b"GGUF")

    def ask_again(_gguf: Path, _folder: Path) -> None:
        with pytest.raises(ConfigError, match=r"within 0 s, found .*\.lock still held"):
            convert_once(gguf)

    monkeypatch.setattr(gguf_cache, "_convert", ask_again)
    convert_once(gguf)


# --- real weights ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def smollm2() -> Path:
    pytest.importorskip("gguf")
    try:
        return smollm2_checkpoint()
    except ConfigError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def smollm2_cache(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that three processes filled at once. They share nothing but the file system."""
    cache = tmp_path_factory.mktemp("gguf-cache")
    code = f"from hsplit_flwr.models.files import ModelFiles; print(ModelFiles.resolve({str(smollm2)!r}).folder)"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env={**os.environ, CACHE_VARIABLE: str(cache)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    outputs = [process.communicate(timeout=500) for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], outputs
    assert len({stdout for stdout, _ in outputs}) == 1
    assert sum("Converting SmolLM2" in stderr for _, stderr in outputs) == 1
    assert [path.name for path in cache.iterdir() if path.name.startswith(".converting")] == []
    return cache


@pytest.mark.slow
def test_smollm2_converted_and_cut_equals_the_gguf_model(
    smollm2: Path, smollm2_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(smollm2_cache))
    files = ModelFiles.resolve(str(smollm2))
    reference = AutoModelForCausalLM.from_pretrained(smollm2.parent, gguf_file=smollm2.name, dtype=torch.float32)
    for name, tensor in reference.state_dict().items():
        assert torch.equal(files.read(name), tensor), name
    tokenizer = files.tokenizer()
    texts = ["The Eagle is a", "Near the river there is a coffee shop called"]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    head, tail = load_segment(files, 0, SMOLLM2_CUT), load_segment(files, SMOLLM2_CUT)
    with torch.no_grad():
        expected = reference.eval()(**batch).logits
        found = tail(head(batch["input_ids"], batch["attention_mask"]), batch["attention_mask"])
    assert torch.equal(found, expected)
    assert tokenizer.decode(expected[1, batch["attention_mask"][1].sum() - 1].argmax()) != ""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads the peak from Linux's /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_peak_memory_of_loading_a_head(smollm2: Path, smollm2_cache: Path, dtype: str) -> None:
    """In a process of its own: the peak above the imports stays below 1.25 times the head's own bytes.

    What torch sets up for its first pass in a process (5 MB, measured) is there before: a look at the miniature takes
    one while the head is loaded, and training would take it in any case.
    """
    code = f"""
        import json
        import flwr, peft, torch, transformers
        from pathlib import Path
        from hsplit_flwr.models.files import ModelFiles
        from hsplit_flwr.models.segments import load_segment

        def status(key):
            lines = Path("/proc/self/status").read_text().splitlines()
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

        inputs = torch.ones(4, 64, requires_grad=True)
        torch.nn.functional.linear(inputs, torch.ones(64, 64)).sum().backward()
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, see proc(5)
        baseline = status("VmHWM:")
        head = load_segment(ModelFiles.resolve({str(smollm2)!r}), 0, {SMOLLM2_CUT}, dtype=torch.{dtype})
        for parameter in head.parameters():
            parameter.sum()  # mapped pages count once they are touched
        own = sum(p.numel() * p.element_size() for p in head.parameters())
        print(json.dumps({{"own": own, "peak": status("VmHWM:") - baseline}}))
    """
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, CACHE_VARIABLE: str(smollm2_cache)},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    measured = json.loads(run.stdout.splitlines()[-1])
    blocks, embeddings = SMOLLM2_CUT * 3_540_096, 49_152 * 576
    assert measured["own"] == (blocks + embeddings) * {"float32": 4, "bfloat16": 2}[dtype]
    ratio = measured["peak"] / measured["own"]
    print(f"head of SmolLM2-135M at cut {SMOLLM2_CUT} in {dtype}: {ratio:.3f} of its bytes")
    assert 1.0 <= ratio < PEAK_LIMIT


def test_tied_flag_of_the_tiny_configs() -> None:
    for name in ARCHITECTURES:
        assert tiny_config(name, True).tie_word_embeddings
        assert not tiny_config(name, False).tie_word_embeddings
