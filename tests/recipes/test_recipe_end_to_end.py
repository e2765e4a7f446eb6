"""Complete models that libraries quantise are audited, compared, dequantised and loaded again.

The plain copy of each must have the weights that the library itself dequantises, to the last bit of
the stored dtype, and the names and the config with which transformers loads them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import wellcond as wc
from wellcond import cli

pytestmark = pytest.mark.libraries
transformers = pytest.importorskip("transformers", minversion="5.24")


@pytest.fixture(autouse=True)
def _without_compilation(monkeypatch: pytest.MonkeyPatch) -> None:
    """bitsandbytes would compile functions that run only once."""
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")


SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
NO_TOKENS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("AutoModelForCausalLM", "LlamaConfig", {**SIZES, "tie_word_embeddings": False}),
    "qwen2": ("AutoModelForCausalLM", "Qwen2Config", {**SIZES, "tie_word_embeddings": True}),
    "experts": (
        "AutoModelForCausalLM",
        "Qwen3MoeConfig",
        {**SIZES, "moe_intermediate_size": 32, "num_experts": 3, "num_experts_per_tok": 2},
    ),
    "deepseek": (
        "AutoModelForCausalLM",
        "DeepseekV3Config",
        {
            **{**SIZES, "num_key_value_heads": 4, "first_k_dense_replace": 1, "n_group": 2},
            **{"moe_intermediate_size": 32, "n_routed_experts": 4, "num_experts_per_tok": 2},
            **{"topk_group": 1, "kv_lora_rank": 32, "q_lora_rank": 32, "qk_rope_head_dim": 16},
            **{"qk_nope_head_dim": 16, "v_head_dim": 16, "n_shared_experts": 1},
        },
    ),
    "gpt_oss": (
        "AutoModelForCausalLM",
        "GptOssConfig",
        {**SIZES, "intermediate_size": 96, "num_local_experts": 3, "num_experts_per_tok": 2},
    ),
    "gpt2": (
        "AutoModelForCausalLM",
        "GPT2Config",
        {**NO_TOKENS, "vocab_size": 96, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 32},
    ),
    "vit": (
        "AutoModelForImageClassification",
        "ViTConfig",
        {
            **{key: SIZES[key] for key in ("hidden_size", "intermediate_size")},
            **{"num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 16, "patch_size": 8},
        },
    ),
}
IMAGES = ("vit",)


class Quantised:
    """The folders of a model: the plain one, the quantised one, and the plain copy."""

    def __init__(self, name: str, folder: Path) -> None:
        kind, config, settings = MODELS[name]
        self.name, self.auto = name, getattr(transformers, kind)
        self.plain, self.codes, self.copy = (folder / n for n in ("plain", "codes", "copy"))
        torch.manual_seed(0)
        model = self.auto.from_config(getattr(transformers, config)(**settings))
        for parameter in model.parameters():
            if parameter.ndim > 1:
                scales = torch.logspace(-0.4, 0.4, parameter.shape[-2])[:, None]
                parameter.data = torch.randn(parameter.shape) * 0.05 * scales
        model.to(torch.bfloat16).save_pretrained(self.plain, max_shard_size="60KB")

    def load(self, path: Path, **options: Any) -> nn.Module:
        model: nn.Module = self.auto.from_pretrained(path, **{"dtype": torch.bfloat16, **options})
        return model.eval()

    def run(self, model: nn.Module) -> Tensor:
        torch.manual_seed(1)
        if self.name in IMAGES:
            inputs = {"pixel_values": torch.randn(1, 3, 16, 16, dtype=torch.bfloat16)}
        else:
            inputs = {"input_ids": torch.randint(3, 90, (2, 9))}
        with torch.no_grad():
            logits: Tensor = model(**inputs).logits
        return logits

    def rewrite(self, change: Callable[[str, Tensor], dict[str, Tensor]], settings: Any) -> None:
        """Writes a copy of the plain model in which `change` replaces tensors."""
        self.codes.mkdir()
        index = json.loads((self.plain / "model.safetensors.index.json").read_text())
        places: dict[str, str] = {}
        for shard in sorted(set(index["weight_map"].values())):
            tensors: dict[str, Tensor] = {}
            for name, tensor in load_file(self.plain / shard).items():
                tensors |= change(name, tensor)
            places |= dict.fromkeys(tensors, shard)
            save_file(tensors, self.codes / shard, {"format": "pt"})
        index["weight_map"] = places
        (self.codes / "model.safetensors.index.json").write_text(json.dumps(index))
        config = json.loads((self.plain / "config.json").read_text())
        config["quantization_config"] = settings
        (self.codes / "config.json").write_text(json.dumps(config))


def quantise_fp8(model: Quantised) -> nn.Module:
    """Quantises as transformers does. It needs a GPU to quantise, but its operation does not."""
    from transformers.integrations.finegrained_fp8 import Fp8Quantize

    settings = transformers.FineGrainedFP8Config(weight_block_size=[32, 16])
    settings.modules_to_not_convert = ["lm_head", "model.embed_tokens"]
    operation = Fp8Quantize(SimpleNamespace(quantization_config=settings))

    def change(name: str, tensor: Tensor) -> dict[str, Tensor]:
        wanted = name.endswith(("proj.weight", "_mqa.weight"))
        return operation.convert({name: tensor}) if wanted else {name: tensor}

    model.rewrite(change, settings.to_dict())
    return model.load(model.codes)


def quantise_bitsandbytes(model: Quantised, **settings: Any) -> nn.Module:
    pytest.importorskip("bitsandbytes")
    options = {"device_map": {"": "cpu"}}
    config = transformers.BitsAndBytesConfig(**settings)
    found = model.load(model.plain, quantization_config=config, **options)
    found.save_pretrained(model.codes, max_shard_size="60KB")
    return model.load(model.codes, **options).dequantize()


@torch.no_grad()
def quantise_compressed(model: Quantised, **weights: Any) -> nn.Module:
    compressed = pytest.importorskip("compressed_tensors")
    from compressed_tensors import quantization
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    found = model.load(model.plain)
    scheme = quantization.QuantizationScheme(
        targets=["Linear"], weights=quantization.QuantizationArgs(**weights)
    )
    config = quantization.QuantizationConfig(
        config_groups={"group_0": scheme}, ignore=["lm_head", "classifier"]
    )
    quantization.apply_quantization_config(found, config)
    for module in found.modules():
        if getattr(module, "quantization_scheme", None) is None:
            continue
        W, scale, factor = module.weight, module.weight_scale, {}
        if hasattr(module, "weight_global_scale"):
            module.weight_global_scale.copy_(generate_gparam(W.amin()[None], W.amax()[None]))
            factor["global_scale"] = module.weight_global_scale
        blocks = W.float().reshape(scale.shape[0], -1, scale.shape[1], W.shape[1] // scale.shape[1])
        args = module.quantization_scheme.weights
        values, _ = calculate_qparams(blocks.amin((1, 3)), blocks.amax((1, 3)), args, **factor)
        scale.copy_(values)
    compressor = ModelCompressor.from_pretrained_model(found)
    compressor.compress_model(found)
    found.save_pretrained(model.codes, max_shard_size="60KB")
    compressor.update_config(model.codes)
    compressor.decompress_model(found)
    for module in found.modules():  # so that it computes with the decompressed weights
        if hasattr(module, "quantization_scheme"):
            compressed.quantization.disable_quantization(module)
    return found


def quantise_torchao(model: Quantised) -> nn.Module:
    quantization = pytest.importorskip("torchao.quantization")
    config = transformers.TorchAoConfig(quantization.Int8WeightOnlyConfig())
    options = {"quantization_config": config, "device_map": {"": "cpu"}}
    found = model.load(model.plain, **options)
    found.save_pretrained(model.codes, max_shard_size="60KB")
    for module in found.modules():
        if hasattr(getattr(module, "weight", None), "qdata"):
            module.weight = nn.Parameter(module.weight.dequantize())
    return found


def quantise_mxfp4(model: Quantised) -> nn.Module:
    """Random codes, because transformers quantises only on a GPU; it reads them without one."""

    def change(name: str, tensor: Tensor) -> dict[str, Tensor]:
        if not name.endswith(("gate_up_proj", "down_proj")):
            return {name: tensor}
        E, n, m = tensor.shape
        codes = torch.randint(256, (E, m, n // 32, 16), dtype=torch.uint8)
        scales = torch.randint(118, 123, (E, m, n // 32), dtype=torch.uint8)
        return {f"{name}_blocks": codes, f"{name}_scales": scales}

    model.rewrite(change, {"quant_method": "mxfp4"})
    return model.load(model.codes)


FLOAT4 = {"num_bits": 4, "type": "float"}
CASES: dict[str, tuple[str, Callable[[Quantised], nn.Module], str]] = {
    "FP8 of experts": ("experts", quantise_fp8, "float8_e4m3fn"),
    "FP8 of DeepSeek": ("deepseek", quantise_fp8, "float8_e4m3fn"),
    "int8 of bitsandbytes": (
        "gpt2",
        lambda model: quantise_bitsandbytes(model, load_in_8bit=True),
        "int8",
    ),
    "NF4, double quantised": (
        "llama",
        lambda model: quantise_bitsandbytes(
            model,
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
        ),
        "nf4",
    ),
    "FP4 of bitsandbytes": (
        "qwen2",
        lambda model: quantise_bitsandbytes(model, load_in_4bit=True, bnb_4bit_quant_type="fp4"),
        "fp4",
    ),
    "W4A16": (
        "qwen2",
        lambda model: quantise_compressed(model, num_bits=4, strategy="group", group_size=16),
        "int4",
    ),
    "W8 of images": (
        "vit",
        lambda model: quantise_compressed(model, num_bits=8, strategy="channel"),
        "int8",
    ),
    "FP8 of compressed-tensors": (
        "llama",
        lambda model: quantise_compressed(
            model, num_bits=8, type="float", strategy="block", block_structure=[16, 32]
        ),
        "float8_e4m3fn",
    ),
    "NVFP4": (
        "llama",
        lambda model: quantise_compressed(
            model,
            **FLOAT4,
            strategy="tensor_group",
            group_size=16,
            scale_dtype=torch.float8_e4m3fn,
        ),
        "float4_e2m1",
    ),
    "int8 of torchao": ("llama", quantise_torchao, "int8"),
    "MXFP4": ("gpt_oss", quantise_mxfp4, "float4_e2m1"),
}


@pytest.mark.parametrize("case", CASES)
def test_model_is_audited_compared_and_dequantised(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, quantise, dtype = CASES[case]
    model = Quantised(name, tmp_path)
    expected = quantise(model)
    before, after = wc.audit(model.plain), wc.audit(model.codes)
    assert after.coverage.failed == 0
    built = [finding for finding in after.findings if finding.parts]
    assert {finding.dtype for finding in built} == {dtype}
    # All weights have a counterpart with the same number of entries.
    compared = wc.compare(before, after)
    assert all(pair.before and pair.after for pair in compared.pairs)
    assert after.coverage.measured == before.coverage.measured
    assert after.coverage.parameter_share == pytest.approx(before.coverage.parameter_share)
    assert after.coverage.skipped == before.coverage.skipped
    # A repair reports that it does not change codes, and names --dequantise.
    shrunk = tmp_path / "shrunk"
    if len(built) < len(after.findings):
        report = wc.repair(model.codes, shrunk, 50.0)
        assert len({f.name for f in built} & report.skipped.keys()) > 1
        assert "--dequantise" in str(report)
    else:
        with pytest.raises(ValueError, match=r"stored as codes.*--dequantise"):
            wc.repair(model.codes, shrunk, 50.0)
    # The plain copy equals the model that the library dequantises.
    command = ["repair", str(model.codes), str(model.copy), "--max-condition", "inf"]
    assert cli.main([*command, "--dequantise"]) == 0
    assert f"{len({f.name for f in built})} weight" in capsys.readouterr().out
    assert "quantization_config" not in (model.copy / "config.json").read_text()
    copied, info = model.auto.from_pretrained(model.copy, output_loading_info=True)
    assert not any(info.values()), info
    ours, theirs = copied.state_dict(), expected.state_dict()
    for path, tensor in ours.items():
        # bitsandbytes replaces the Conv1D of GPT-2 by a Linear.
        linear = name == "gpt2" and path.endswith(("c_attn.weight", "c_fc.weight", "c_proj.weight"))
        other = theirs[path].T if linear else theirs[path]
        torch.testing.assert_close(tensor, other, rtol=0, atol=0)
    torch.testing.assert_close(model.run(copied.eval()), model.run(expected), rtol=0, atol=0)
    again = wc.audit(model.copy)
    assert {f.label for f in again.findings} == {f.label for f in after.findings}
    # All weights of the copy are within the limit.
    wc.repair(model.codes, tmp_path / "limited", 100.0, dequantise=True)
    assert not wc.audit(tmp_path / "limited").exceeding(100.0)


@pytest.mark.parametrize(
    ("name", "targets"), [("llama", ["q_proj", "down_proj"]), ("gpt2", ["c_attn", "c_proj"])]
)
def test_adapter_of_quantised_model_is_added(name: str, targets: list[str], tmp_path: Path) -> None:
    """This includes GPT-2, whose layers are stored as (inputs, outputs) unless quantised."""
    peft = pytest.importorskip("peft")
    model = Quantised(name, tmp_path)
    quantise_bitsandbytes(model, load_in_4bit=True, bnb_4bit_quant_type="nf4")
    options = {"device_map": {"": "cpu"}}
    adapted = peft.get_peft_model(
        model.load(model.codes, **options),
        peft.LoraConfig(r=3, lora_alpha=12, target_modules=targets),
    )
    for parameter_name, parameter in adapted.named_parameters():
        if "lora_B" in parameter_name:
            nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained(tmp_path / "adapter")
    report = wc.audit(tmp_path / "adapter", base=model.codes)
    merged = {f.label: f for f in report.findings if f.with_adapter}
    layers = model.load(model.codes, **options).dequantize()
    adapter = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert merged
    for label, finding in merged.items():
        if ":" in label.removesuffix(":merged"):
            continue  # a block of c_attn
        path = label.removesuffix(".weight:merged")
        A, B = (adapter[f"base_model.model.{path}.lora_{one}.weight"].double() for one in "AB")
        sigma = torch.linalg.svdvals(layers.get_submodule(path).weight.double() + 4 * B @ A)
        assert finding.sigma_max == pytest.approx(float(sigma[0]), rel=2e-3)
        change = torch.linalg.svdvals(layers.get_submodule(path).weight.double())
        assert abs(float(change[0] - sigma[0])) > 0.05 * float(sigma[0])
