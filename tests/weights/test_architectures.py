"""The table of names of architectures agrees with the installed libraries."""

import re
from pathlib import Path

import pytest

from wellcond.weights import architectures as arch

# Names that transformers does not use (or no longer), and their origin.
ELSEWHERE = {
    "in_proj_weight": "torch",
    "multi_query_attention": "ChatGLM",
    "norm_q": "diffusers",
    "norm_k": "diffusers",
    "pool_q": "torchvision",
    "pool_k": "torchvision",
    "pool_v": "torchvision",
    "proj_l": "timm",
    "q_ln": "CLIP",
    "query_norm": "torchtune",
    "rope": "timm",
    "sub_norm": "RetNet",
    "n_head_kv": "Falcon's own code",
    "w12": "DINOv2's own code",
    "weights_in": "transformers 4",
    "weights_out": "transformers 4",
}
OWN_CODE = {"florence", "refinedweb", "refinedwebmodel"}  # model types not in transformers


def parts() -> set[str]:
    """The layers, parameters and attributes of the table."""
    fused = {output for one in arch.FUSED.values() for output in one.outputs} | {*arch.FUSED}
    compared = {name for names, _ in arch.NOT_COMPARED for name in names}
    return {
        *(name for names in arch.SEPARATE for name in names),
        *(*arch.OUTPUTS, *fused, *arch.GATED, *arch.GATED.values(), *arch.OTHER_ORDER),
        *(*arch.NO_TOKENS, *compared, *arch.NOT_CARRIED, *arch.NOT_CARRIED_IN_TIMM),
    }


@pytest.mark.frameworks
def test_every_name_occurs_in_a_library() -> None:
    transformers = pytest.importorskip("transformers", minversion="5")
    gguf = pytest.importorskip("gguf")
    models = Path(transformers.__file__).parent / "models"
    modules, configs = (
        "\n".join(path.read_text(encoding="utf-8") for path in models.glob(f"*/{kind}_*.py"))
        for kind in ("modeling", "configuration")
    )
    attributes = set(re.findall(r"\bself\.(\w+) = ", modules))
    attributes |= {name.rpartition(".")[2] for name in gguf.TENSOR_NAMES.values()}
    settings = set(re.findall(r"\b\w+\b", configs))
    in_modules = {*arch.HEADS, *arch.KEY_HEADS, *arch.SIZE, *arch.ROTATED}
    in_configs = {*arch.HEADS, *arch.HEADS_OF_SIDES, *arch.SIZE_IN_CONFIG, *arch.WIDTH}
    in_configs |= {*arch.ROTATED_IN_CONFIG}
    assert parts() - attributes <= ELSEWHERE.keys()
    assert in_modules - attributes - settings <= ELSEWHERE.keys()
    assert in_configs <= settings


@pytest.mark.frameworks
def test_every_model_type_is_known_to_transformers() -> None:
    pytest.importorskip("transformers", minversion="5")
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    known = {kind.replace("-", "_") for kind in CONFIG_MAPPING_NAMES}
    assert {*arch.MODEL_TYPES} - known <= OWN_CODE
