"""Real quantizers on a small model: what they load, how far they are from 16 bits, and why one is skipped."""

import re
from pathlib import Path
from typing import Any

import pytest

from conf.entry import UserError
from conf.schema import Dtype, Kind, Model, Role, Suite
from evals import gguf
from evals.footprint import stored_bytes
from evals.models import check, load, open_model, prepared
from evals.quantize import QUANTIZERS, Quantizer, QuantizerUnavailable, trying
from evals.run import Request, check_request

# Root mean square difference of the logits from those of 16 bits, as a share of their standard deviation: of a random
# model with large weights, in which every rounding grows. Unrelated logits would be at 1.4.
BOUNDS = {
    **dict.fromkeys(("int8", "torchao_int8", "gguf_q8_0"), (0.02, 0.1)),
    **dict.fromkeys(("nf4", "fp4", "hqq4", "gguf_q4_k_m"), (0.2, 0.9)),
    "hqq3": (0.7, 1.2),
}


def opened(path: Path, quantizer: str, cache: Path, **fields: Any) -> tuple[Any, int]:
    """Logits (1, 96, vocabulary) of a fixed text in a format, and the format's size in bytes."""
    import torch

    settings = {"dtype": Dtype.bfloat16} | fields
    model = Model(path=str(path), **settings)
    with prepared(model, quantizer, cache) as ready:
        size = stored_bytes(load(ready, quantizer))
    with open_model(model, quantizer, cache) as (loaded, _), torch.inference_mode():
        return loaded(input_ids=torch.arange(2, 98)[None]).logits.float(), size


@pytest.fixture(scope="module")
def sixteen_bits(lively_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, int]:
    return opened(lively_model, "none", tmp_path_factory.mktemp("cache"))


@pytest.mark.parametrize("name", BOUNDS)
def test_a_format_is_as_near_as_its_bits_allow(
    lively_model: Path, tmp_path: Path, name: str, sixteen_bits: tuple[Any, int]
) -> None:
    expected, bytes_of_all = sixteen_bits
    try:
        logits, size = opened(lively_model, name, tmp_path)
    except QuantizerUnavailable as reason:
        pytest.skip(str(reason))
    distance = float((logits - expected).square().mean().sqrt() / expected.std())
    least, most = BOUNDS[name]
    assert least < distance < most
    assert size < bytes_of_all


def test_every_format_is_bounded() -> None:
    assert set(BOUNDS) | {"none", "unmerged"} == set(QUANTIZERS)


def test_sizes_are_those_of_the_bits(lively_model: Path, tmp_path: Path) -> None:
    """The linear layers of the small model have 73,728 weights; the rest is 16,640 for tokens and 320 for norms."""
    linear, rest = 73_728, 2 * (258 * 64 + 5 * 64)
    size = {
        name: opened(lively_model, name, tmp_path)[1] - rest
        for name in ("none", "int8", "torchao_int8", "nf4", "hqq4", "hqq3")
    }
    assert size["none"] == 2 * linear
    rows = 2 * (64 + 32 + 32 + 64 + 128 + 128 + 64)
    assert size["int8"] - linear == pytest.approx(4 * rows, abs=20)  # a float32 scale a row
    assert size["torchao_int8"] - linear == pytest.approx(2 * rows, abs=4 * rows)
    # A float32 scale for each 64 weights, and for each matrix a code book and its description.
    assert size["nf4"] - linear / 2 == pytest.approx(4 * linear / 64, rel=0.9)
    # A bfloat16 scale and an int8 zero for each 32 weights.
    for bits in (3, 4):
        assert size[f"hqq{bits}"] == linear * bits / 8 + 3 * linear / 32
    assert size["hqq3"] < size["hqq4"] < size["int8"] < size["none"]


def test_none_is_exact(lively_model: Path, tmp_path: Path, sixteen_bits: tuple[Any, int]) -> None:
    assert opened(lively_model, "none", tmp_path)[0].equal(sixteen_bits[0])


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize(("dtype", "kind"), [("float32", "F32"), ("bfloat16", "BF16")])
def test_a_gguf_file_holds_the_model(
    tmp_path: Path, architecture: str, dtype: str, kind: str
) -> None:
    """transformers' own reader, which is llama.cpp's convention, finds the very weights that were written."""
    import torch
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(1)
    config = AutoConfig.for_model(
        architecture,
        vocab_size=300,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=128
        if architecture == "qwen3"
        else 16,  # transformers' reader knows no other for it
        max_position_embeddings=128,
        tie_word_embeddings=architecture == "llama",
        bos_token_id=0,
        eos_token_id=1,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    gguf.write(model, tmp_path / "model.gguf", kind)
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path,
        gguf_file="model.gguf",
        dtype=getattr(torch, dtype),
        quantization_config=transformers.GgufConfig(dequantize=True),
    ).eval()
    ids = torch.arange(40)[None]
    with torch.inference_mode():
        expected = model(ids).logits
        assert loaded(ids).logits.equal(expected)
        for parameter in model.parameters():
            parameter.zero_()
        gguf.read_into(model, tmp_path / "model.gguf")
        assert model(ids).logits.equal(expected)


def test_gguf_of_an_architecture_that_is_not_written_is_a_named_skip(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=32, n_layer=1, n_head=2)).save_pretrained(
        tmp_path
    )
    with pytest.raises(QuantizerUnavailable, match="not for gpt2"):
        load(Model(path=str(tmp_path)), "gguf_q8_0")


def test_a_width_that_a_format_cannot_run_is_a_named_skip(
    odd_width: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Groups of 32 do not fit a width of 24; the library says so while it loads."""
    with pytest.raises(QuantizerUnavailable, match="hqq4 cannot run here: "):
        opened(odd_width, "hqq4", tmp_path)

    def fails_when_it_runs(model: Any) -> None:
        model.register_forward_pre_hook(lambda *_: exec("raise RuntimeError('wrong shape')"))

    late = Quantizer(None, convert=fails_when_it_runs)
    monkeypatch.setitem(QUANTIZERS, "late", late)
    with pytest.raises(QuantizerUnavailable, match="late cannot run here: wrong shape"):
        opened(odd_width, "late", tmp_path)


@pytest.fixture
def odd_width(tiny_model: Path, tmp_path: Path) -> Path:
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=258, hidden_size=24, intermediate_size=25, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "odd")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "odd")
    return tmp_path / "odd"


def test_a_library_that_breaks_at_import_is_a_named_skip(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_library.py").write_text("raise AttributeError('no such symbol')\n")
    monkeypatch.syspath_prepend(tmp_path)

    def options() -> dict[str, Any]:
        __import__("broken_library")
        return {}

    monkeypatch.setitem(QUANTIZERS, "broken", Quantizer(None, options))
    monkeypatch.setitem(QUANTIZERS, "absent", Quantizer("no_such_library"))
    with pytest.raises(QuantizerUnavailable, match="broken cannot run here: no such symbol"):
        opened(tiny_model, "broken", tmp_path)
    with pytest.raises(QuantizerUnavailable, match=r"^no_such_library is not installed$"):
        opened(tiny_model, "absent", tmp_path)


def test_llama_cpp_is_found_and_part_of_the_key(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for the program, which copies the file, shows how it is called and that its failure is a reason."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("LLAMA_CPP", str(tmp_path / "llama"))
    assert gguf.llama_quantize() is None
    suite = Suite(name="cost", kind=Kind.footprint, role=Role.cost)
    request = Request(Model(path=str(tiny_model)), "gguf_q4_k_m", suite)
    keys = {request.key(tmp_path)}
    program = tmp_path / "llama" / "build" / "bin" / "llama-quantize"
    program.parent.mkdir(parents=True)
    for script in ('/bin/cp "$1" "$2"; echo "$3" > "$2.kind"', "echo out of luck >&2; exit 1"):
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
        keys.add(request.key(tmp_path))
        (tmp_path / "a").write_text("weights")
        if "cp" in script:
            gguf.llama_cpp_quantize(tmp_path / "a", tmp_path / "b", "Q4_K_M")
            assert (tmp_path / "b").read_text() == "weights"
            assert (tmp_path / "b.kind").read_text() == "Q4_K_M\n"
        else:
            with pytest.raises(RuntimeError, match="out of luck"):
                gguf.llama_cpp_quantize(tmp_path / "a", tmp_path / "b", "Q4_K_M")
    assert len(keys) == 3


@pytest.mark.parametrize(
    "words",
    [
        "[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory",
        "CUDA error: out of memory",
        "I/O error: No space left on device (os error 28)",
    ],
)
def test_what_another_try_may_not_meet_is_no_skip(words: str) -> None:
    with pytest.raises(RuntimeError, match=re.escape(words)), trying("int8"):
        raise RuntimeError(words)


@pytest.mark.parametrize(
    "script",
    ["kill -9 $$", "echo 'failed to quantize: basic_ios::clear: iostream error' >&2; exit 1"],
)
def test_llama_cpp_without_memory_or_disk_is_no_skip(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str
) -> None:
    program = tmp_path / "llama-quantize"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("LLAMA_CPP", str(tmp_path))
    with pytest.raises(OSError, match="out of memory or disk"), trying("gguf_q4_k_m"):
        gguf.llama_cpp_quantize(tmp_path / "a", tmp_path / "b", "Q4_K_M")


@pytest.fixture(scope="module")
def adapter(lively_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA adapter whose weights are not zero."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(5)
    base = AutoModelForCausalLM.from_pretrained(lively_model, dtype=torch.float32)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    folder = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(folder)
    return folder


def test_an_adapter_gives_the_same_merged_or_apart(
    lively_model: Path, adapter: Path, tmp_path: Path
) -> None:
    exact = {"dtype": Dtype.float32}
    base, size = opened(lively_model, "none", tmp_path, **exact)
    merged, _ = opened(lively_model, "none", tmp_path, adapter=str(adapter), **exact)
    apart, larger = opened(lively_model, "unmerged", tmp_path, adapter=str(adapter), **exact)
    assert (merged - base).abs().max() > 0.1
    assert (merged - apart).abs().max() < 1e-4
    assert larger - size == 2 * 4 * (4 * (64 + 64) + 4 * (128 + 64))  # layers, bytes, rank × widths


@pytest.mark.parametrize("quantizer", ["none", "unmerged"])
def test_a_home_folder_is_expanded(
    lively_model: Path,
    adapter: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    quantizer: str,
) -> None:
    (tmp_path / "model").symlink_to(lively_model)
    (tmp_path / "adapter").symlink_to(adapter)
    monkeypatch.setenv("HOME", str(tmp_path))
    logits, _ = opened(Path("~/model"), quantizer, tmp_path, adapter="~/adapter")
    assert logits.isfinite().all()


def test_an_adapter_is_needed_to_keep_one_apart(tiny_model: Path) -> None:
    suite = Suite(name="cost", kind=Kind.footprint, role=Role.cost)
    with pytest.raises(UserError, match=r"'unmerged'.*model.adapter is not set"):
        check_request(Request(Model(path=str(tiny_model)), "unmerged", suite))
    check(Model(path=str(tiny_model)))
