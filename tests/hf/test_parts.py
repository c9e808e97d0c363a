"""Models with converted parts that nobody told them of: no way of writing them leads to random kernels."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import load_checkpoint_in_model
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from sw_transplant import ShiftwiseConv2d, SWConfig, convert, load, merge, save
from sw_transplant.hf import ShiftwiseQuantizer, attach
from tests.acceptance import shiftwise_layers
from tests.hf.models import MODELS
from tests.hf.training import STEPS, trainer

ROOT = Path(__file__).resolve().parents[2]
CONVNEXT = transformers.ConvNextForImageClassification


def upernet() -> Any:
    whole = MODELS["UperNet"].model()
    whole.backbone = convert(whole.backbone)
    return whole


def assert_same_state(one: nn.Module, other: nn.Module) -> None:
    state, expected = one.state_dict(), other.state_dict()
    assert list(state) == list(expected)
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())


# ---- models of transformers ----


def test_the_whole_knows_of_its_parts_when_it_is_asked() -> None:
    whole = upernet()
    assert isinstance(whole.hf_quantizer, ShiftwiseQuantizer)
    assert whole.hf_quantizer.is_trainable
    assert "hf_quantizer" not in vars(whole)
    assert not hasattr(MODELS["UperNet"].model(), "hf_quantizer")
    with pytest.raises(AttributeError, match="hf_quantizer"):
        _ = MODELS["ConvNext"].model().hf_quantizer


def test_parts_of_several_kinds_and_what_becomes_of_them(tmp_path: Path) -> None:
    whole = MODELS["ConvNext"].model()
    stages = whole.convnext.encoder.stages
    stages[0] = convert(stages[0])
    stages[2].layers[0].dwconv = convert(stages[2].layers[0].dwconv, SWConfig(mode="shiftwise"))
    whole.save_pretrained(tmp_path / "converted")
    loaded = CONVNEXT.from_pretrained(tmp_path / "converted")
    assert list(shiftwise_layers(loaded)) == list(shiftwise_layers(whole))
    assert_same_state(loaded, whole)
    stages[0] = merge(stages[0])
    assert hasattr(whole, "hf_quantizer")
    stages[2] = copy.deepcopy(MODELS["ConvNext"].model().convnext.encoder.stages[2])
    assert not hasattr(whole, "hf_quantizer")


def test_a_part_that_was_merged_to_other_names_is_not_written(tmp_path: Path) -> None:
    whole = upernet()
    whole.backbone = merge(convert(MODELS["UperNet"].model().backbone, SWConfig(mode="shiftwise")))
    with pytest.raises(ValueError, match=r"backbone\.encoder.*: merged into convolutions with other names or shapes"):
        whole.save_pretrained(tmp_path)
    whole = MODELS["ConvNext"].model()
    layer = whole.convnext.encoder.stages[0].layers[0]
    layer.dwconv = convert(layer.dwconv)
    layer.dwconv.reparameterize()
    with pytest.raises(ValueError, match=r"dwconv: merged into convolutions"):
        whole.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


class Own(transformers.PreTrainedModel):
    """A model whose class converts a part of it by itself."""

    config_class = transformers.PretrainedConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.inner = convert(timm.create_model("test_convnext", num_classes=5, kernel_sizes=9))
        self.post_init()


def test_a_class_that_converts_by_itself_is_left_alone(tmp_path: Path) -> None:
    own = Own(transformers.PretrainedConfig())
    assert not hasattr(own, "hf_quantizer")
    own.save_pretrained(tmp_path)
    loaded, report = Own.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert_same_state(loaded, own)


def test_a_whole_that_is_quantized_otherwise_is_not_written(tmp_path: Path) -> None:
    whole = upernet()
    whole.hf_quantizer = _Other.__new__(_Other)
    with pytest.raises(ValueError, match="quantized with other, whose folders cannot hold Shiftwise layers"):
        attach(whole)
    with pytest.raises(RuntimeError, match=r"backbone\S+: a converted layer in a UperNet.* \(it is quantized"):
        whole.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))


class _Other(transformers.quantizers.HfQuantizer):
    quantization_config = type("Config", (), {"quant_method": "other"})()
    is_trainable = False

    def is_serializable(self) -> bool:
        return True

    def get_state_dict_and_metadata(self, model: Any) -> Any:
        return None, {}


LATE = """
import sys
import timm, sw_transplant
part = sw_transplant.convert(timm.create_model("test_convnext", num_classes=5, kernel_sizes=9))
assert "transformers.modeling_utils" not in sys.modules
import transformers
config = transformers.TimmWrapperConfig(architecture="test_convnext", num_labels=5, model_args={"kernel_sizes": 9})
whole = transformers.TimmWrapperForImageClassification(config)
whole.timm_model = part
try:
    whole.save_pretrained(sys.argv[1])
except RuntimeError as error:
    print(error)
whole.save_pretrained(sys.argv[2])
"""


@pytest.mark.exhaustive
def test_a_library_that_is_imported_after_the_conversion(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", LATE, str(tmp_path / "first"), str(tmp_path / "second")]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Call sw_transplant.hf.attach(model), then save it again" in done.stdout
    assert not list((tmp_path / "first").glob("*.safetensors"))
    loaded = transformers.TimmWrapperForImageClassification.from_pretrained(tmp_path / "second")
    assert len(shiftwise_layers(loaded)) == 9


# ---- plain modules around them ----


class Head(nn.Module, PyTorchModelHubMixin):
    """What a user writes around a backbone of transformers."""

    def __init__(self, converted: bool = False) -> None:
        super().__init__()
        self.backbone = MODELS["ConvNext"].model().convnext
        if converted:
            self.backbone = convert(self.backbone)
        self.head = nn.Linear(32, 5)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.head(self.backbone(pixel_values).pooler_output)
        loss = {} if labels is None else {"loss": nn.functional.cross_entropy(logits, labels)}
        return {**loss, "logits": logits}


def trained() -> Head:
    head = Head(converted=True)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.mul_(1.5)
    return head


def test_ordinary_state_dicts_stay_as_they_are(tmp_path: Path) -> None:
    head = trained()
    names = list(head.state_dict())
    assert not [name for name in names if name.endswith("dwconv.weight")]
    with pytest.raises(RuntimeError, match=r"Missing key.*dwconv\.weight"):
        Head().load_state_dict(head.state_dict())
    again = Head(converted=True)
    again.load_state_dict(head.state_dict())
    assert_same_state(again, head)
    head.backbone.save_pretrained(tmp_path / "backbone")
    assert_same_state(type(head.backbone).from_pretrained(tmp_path / "backbone"), head.backbone)
    save(head, tmp_path / "ours")
    assert_same_state(load(Head(), tmp_path / "ours"), head)


def test_trainers_checkpoints(tmp_path: Path) -> None:
    whole = trainer(trained(), tmp_path, remove_unused_columns=False)
    whole.train()
    checkpoint = str(tmp_path / f"checkpoint-{STEPS}")
    resumed = trainer(Head(converted=True), tmp_path, remove_unused_columns=False, max_steps=STEPS)
    resumed.train(resume_from_checkpoint=checkpoint)
    assert_same_state(resumed.model, whole.model)
    plain = trainer(Head(), tmp_path, remove_unused_columns=False, max_steps=STEPS)
    with pytest.raises(RuntimeError, match=r"size mismatch for backbone\S+dwconv\.weight"):
        plain.train(resume_from_checkpoint=checkpoint)


def test_folders_of_huggingface_hub(tmp_path: Path) -> None:
    head = trained()
    head.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match=r"size mismatch for backbone\S+dwconv\.weight"):
        Head.from_pretrained(str(tmp_path), converted=False)
    again = Head.from_pretrained(str(tmp_path))  # config.json keeps how it was made
    assert any(isinstance(module, ShiftwiseConv2d) for module in again.modules())
    assert_same_state(again, head)


def test_folders_of_accelerate(tmp_path: Path) -> None:
    head = trained()
    Accelerator(cpu=True).save_model(head, tmp_path)
    with pytest.raises((RuntimeError, ValueError), match=r"size mismatch for backbone\S+dwconv\.weight|shape"):
        load_checkpoint_in_model(Head(), str(tmp_path))
    again = Head(converted=True)
    load_checkpoint_in_model(again, str(tmp_path))
    assert_same_state(again, head)
