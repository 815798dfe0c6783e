"""The models of the zoo by name: "timm/resnet18", "torchvision/r3d_18", "transformers/detr", "own/unet".

All are built from their code with random weights; nothing is downloaded.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from zoo_networks import NETWORKS, Example

__all__ = ["LIBRARIES", "UnworkableError", "build", "names", "sizes", "workable"]

LIBRARIES = ("own", "torchvision", "transformers", "timm")
SIZES = (64, 96, 128, 160, 192, 224, 256, 299, 384)
CLASSES = 10
SIZE_ERRORS = (ValueError, RuntimeError, TypeError, AssertionError, IndexError)
"""The errors of models for images of a size that does not suit them."""


class UnworkableError(Exception):
    """A model cannot be built at any size, or computes nothing with two samples."""


@functools.cache
def library(name: str) -> ModuleType:
    """Import a library without its warnings, also a torchvision whose compiled operators do not load."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if name != "torchvision":
            library("torchvision")  # timm and transformers import it
        try:
            return importlib.import_module(name)
        except RuntimeError:
            torch.library.define("torchvision::nms", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            torch.library.define("torchvision::qnms", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            return importlib.import_module(name)


def names(kind: str) -> list[str]:
    """Return the names of all architectures of a library, with batch norm or without."""
    found: dict[str, Callable[[], list[str]]] = {
        "own": lambda: list(NETWORKS),
        "timm": lambda: library("timm").list_models(),
        "torchvision": lambda: [
            *(name for name in library("torchvision").models.list_models() if not name.startswith("quantized_")),
            "resnet_fpn_backbone",
        ],
        "transformers": lambda: list(TRANSFORMERS),
    }
    return [f"{kind}/{name}" for name in found[kind]()]


def build(name: str, size: int = 64) -> tuple[nn.Module, Example]:
    """Return a model and an example with two samples; images have ``size`` pixels per side."""
    kind, _, architecture = name.partition("/")
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if kind == "own":
            network, example = NETWORKS[architecture]
            return network(), example()
        if kind == "timm":
            return timm_model(architecture, size), (image(size),)
        if kind == "torchvision":
            return torchvision_model(architecture, size)
        model, example = TRANSFORMERS[architecture](library("transformers"), size)
        return model, example


def sizes(name: str) -> tuple[int, ...]:
    """Return the sizes of images to try, smallest first."""
    if name.startswith("own/"):
        return SIZES[:1]
    return SIZES


def workable(name: str, beyond: int = 0) -> tuple[int, nn.Module, Example]:
    """Return the smallest size above ``beyond`` at which a model runs in both modes, the model and the example.

    The model has run once in train mode, which has moved its statistics.
    """
    reason = "no size is left"
    for size in sizes(name):
        if size <= beyond:
            continue
        try:
            model, example = build(name, size)
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model.eval()
                call(model, example)
                model.train()
                call(model, example)
        except SIZE_ERRORS as error:
            reason = f"{size} pixels: {error}"
            continue
        return size, model, example
    raise UnworkableError(reason)


def call(model: nn.Module, example: Example) -> Any:
    """Run a model on an example."""
    return model(**example) if isinstance(example, dict) else model(*example)


def image(size: int, *shape: int, seed: int = 0) -> Tensor:
    """Return two random images, or other inputs whose last two dimensions have ``size`` elements."""
    return torch.randn(2, *(shape or (3,)), size, size, generator=torch.Generator().manual_seed(seed))


# timm


def timm_model(name: str, size: int) -> nn.Module:
    """Return a model of timm, built for images of a size where it can be told the size."""
    create = library("timm").create_model
    if name in fixed_sizes():
        try:
            return create(name, pretrained=False, num_classes=CLASSES, img_size=size)  # type: ignore[no-any-return]
        except TypeError:
            pass
    return create(name, pretrained=False, num_classes=CLASSES)  # type: ignore[no-any-return]


@functools.cache
def fixed_sizes() -> frozenset[str]:
    """Return the names of timm's models that are built for one size of images."""
    timm = library("timm")
    return frozenset(
        name
        for name in timm.list_models()
        if (settings := timm.get_pretrained_cfg(name, allow_unregistered=True)) and settings.fixed_input_size
    )


# torchvision


class WithoutBoxes(nn.Module):
    """The parts of a detector that have layers: backbone and heads, without anchors, boxes and their suppression."""

    def __init__(self, detector: Any) -> None:
        super().__init__()
        self.backbone = detector.backbone
        self.dense = detector.head if hasattr(detector, "head") else detector.rpn.head
        self.pooled = nn.ModuleDict()
        for part, cells in (("box_head", 7), ("mask_head", 14), ("keypoint_head", 14)):
            head = getattr(getattr(detector, "roi_heads", None), part, None)
            if head is not None:
                self.pooled[f"{part}_{cells}"] = head

    def forward(self, images: Tensor) -> list[Any]:
        """Return the results of all heads."""
        features = self.backbone(images)
        maps = [features] if isinstance(features, Tensor) else list(features.values())
        heads = [head(F.adaptive_avg_pool2d(maps[0], int(part[-2:].strip("_")))) for part, head in self.pooled.items()]
        return [self.dense(maps), *heads]


class Flow(nn.Module):
    """RAFT with two updates of the flow rather than twelve."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, first: Tensor, second: Tensor) -> list[Tensor]:
        """Return the flow after each update."""
        return self.model(first, second, num_flow_updates=2)  # type: ignore[no-any-return]


VIDEO = {"mc3_18": 4, "r3d_18": 4, "r2plus1d_18": 4, "s3d": 16, "mvit_v1_b": 16, "mvit_v2_s": 16}
DETECTORS = ("rcnn", "retinanet", "fcos", "ssd")
WITH_BACKBONE = (*DETECTORS, "deeplab", "fcn_", "lraspp")


def torchvision_model(name: str, size: int) -> tuple[nn.Module, Example]:
    """Return a model of torchvision; of a detector, its backbone and heads."""
    models = library("torchvision").models
    if name == "resnet_fpn_backbone":
        backbone = models.detection.backbone_utils.resnet_fpn_backbone(backbone_name="resnet18", weights=None)
        return backbone, (image(size),)
    options = {"weights_backbone": None} if any(part in name for part in WITH_BACKBONE) else {}
    if name == "maxvit_t":
        options["input_size"] = (size, size)
    model = models.get_model(name, weights=None, **options)
    if any(part in name for part in DETECTORS):
        return WithoutBoxes(model), (image(size),)
    if name.startswith("raft"):
        return Flow(model), (image(size), image(size, seed=1))
    if name in VIDEO or name.startswith("swin3d"):
        return model, (image(size, 3, VIDEO.get(name, 4)),)
    return model, (image(size),)


# transformers

Build = Callable[[Any, int], tuple[nn.Module, Example]]
SMALL = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "num_queries": 5,
}


def of_images(kind: str, config: str, channels: int = 3, **settings: Any) -> Build:
    """Return a function that builds a model of images from its configuration, and an example."""

    def built(transformers: Any, size: int) -> tuple[nn.Module, Example]:
        options = {key: value(transformers) if callable(value) else value for key, value in settings.items()}
        if "image_size" in options:
            options["image_size"] = size
        configuration = getattr(transformers, f"{config}Config")(**options)
        model = getattr(transformers, kind)
        model = model.from_config(configuration) if kind.startswith("Auto") else model(configuration)
        return model, {"pixel_values": image(size, channels)}

    return built


def small_resnet(*stages: str) -> Callable[[Any], Any]:
    """Return a function that builds the configuration of a small ResNet with these stages as outputs."""
    sizes = {"embedding_size": 16, "hidden_sizes": [16, 32, 64, 128], "depths": [1, 1, 1, 1]}
    return lambda transformers: transformers.ResNetConfig(**sizes, out_features=list(stages))


def small_vit(transformers: Any) -> Any:
    """Return the configuration of a small ViT for matting."""
    return transformers.VitDetConfig(
        image_size=64,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        out_features=["stage1"],
        num_channels=4,
    )


def conformer(transformers: Any, _: int) -> tuple[nn.Module, Example]:
    """Return a small model of speech, whose convolutions have batch norm."""
    settings = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    positions = {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4, "mask_time_prob": 0.0}
    config = transformers.Wav2Vec2ConformerConfig(**settings, **positions, conv_dim=[16] * 7)
    sound = torch.randn(2, 4000, generator=torch.Generator().manual_seed(0))
    return transformers.Wav2Vec2ConformerModel(config), {"input_values": sound}


def patches_of_series(transformers: Any, _: int) -> tuple[nn.Module, Example]:
    """Return a small model of time series, with batch norm in the place of layer norm."""
    sizes = {"d_model": 16, "num_attention_heads": 2, "num_hidden_layers": 2, "ffn_dim": 16, "num_input_channels": 2}
    patches = {"context_length": 32, "patch_length": 4, "patch_stride": 4, "prediction_length": 4}
    series = torch.randn(2, 32, 2, generator=torch.Generator().manual_seed(0))
    return transformers.PatchTSTForPrediction(transformers.PatchTSTConfig(**sizes, **patches)), {"past_values": series}


CLASSIFY, SEGMENT, DETECT = "ForImageClassification", "ForSemanticSegmentation", "ForObjectDetection"
RT_DETR = {
    **dict.fromkeys(("d_model", "encoder_hidden_dim", "encoder_ffn_dim", "decoder_ffn_dim"), 32),
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "decoder_layers": 1,
    "num_queries": 5,
    "num_denoising": 0,
    "decoder_in_channels": [32, 32, 32],
}
BEIT = {"image_size": 64, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32}
UPERNET = {"hidden_size": 32, "auxiliary_in_channels": 64, "pool_scales": [1, 2]}
MATTING = {"hidden_size": 32, "fusion_hidden_sizes": [32, 16, 16, 8], "convstream_hidden_sizes": [8, 16, 16]}
TRANSFORMERS: dict[str, Build] = {
    "resnet": of_images(f"ResNet{CLASSIFY}", "ResNet"),
    "regnet": of_images(f"RegNet{CLASSIFY}", "RegNet"),
    "mobilenet_v1": of_images(f"MobileNetV1{CLASSIFY}", "MobileNetV1"),
    "mobilenet_v2": of_images(f"MobileNetV2{CLASSIFY}", "MobileNetV2"),
    "mobilenet_v2_segmentation": of_images(f"MobileNetV2{SEGMENT}", "MobileNetV2"),
    "efficientnet": of_images(
        f"EfficientNet{CLASSIFY}", "EfficientNet", width_coefficient=1.0, depth_coefficient=1.0, hidden_dim=1280
    ),
    "levit": of_images(f"Levit{CLASSIFY}", "Levit", image_size=64),
    "levit_with_teacher": of_images(f"Levit{CLASSIFY}WithTeacher", "Levit", image_size=64),
    "detr_timm": of_images(
        f"Detr{DETECT}", "Detr", use_timm_backbone=True, use_pretrained_backbone=False, backbone="resnet18", **SMALL
    ),
    "detr": of_images(
        f"Detr{DETECT}", "Detr", use_timm_backbone=False, backbone_config=small_resnet("stage4"), **SMALL
    ),
    "conditional_detr": of_images(
        f"ConditionalDetr{DETECT}",
        "ConditionalDetr",
        use_timm_backbone=False,
        backbone_config=small_resnet("stage4"),
        **SMALL,
    ),
    "table_transformer": of_images(
        f"TableTransformer{DETECT}",
        "TableTransformer",
        use_timm_backbone=False,
        backbone_config=small_resnet("stage4"),
        **SMALL,
    ),
    "rt_detr": of_images(f"RTDetr{DETECT}", "RTDetr", **RT_DETR),
    "segformer": of_images(
        f"Segformer{SEGMENT}",
        "Segformer",
        hidden_sizes=[16, 32, 32, 32],
        depths=[1, 1, 1, 1],
        decoder_hidden_size=32,
    ),
    "mobilevit": of_images(f"MobileViT{CLASSIFY}", "MobileViT", image_size=64),
    "mobilevit_v2": of_images(f"MobileViTV2{CLASSIFY}", "MobileViTV2", image_size=64),
    "cvt": of_images(f"Cvt{CLASSIFY}", "Cvt"),
    "swiftformer": of_images(f"SwiftFormer{CLASSIFY}", "SwiftFormer", image_size=64, depths=[1, 1, 2, 1]),
    "textnet": of_images(f"TextNet{CLASSIFY}", "TextNet"),
    "hgnet_v2": of_images(f"HGNetV2{CLASSIFY}", "HGNetV2"),
    "pp_lcnet": of_images("AutoModelForImageClassification", "PPLCNet"),
    "upernet": of_images(
        f"UperNet{SEGMENT}", "UperNet", backbone_config=small_resnet(*(f"stage{i}" for i in (1, 2, 3, 4))), **UPERNET
    ),
    "beit_segmentation": of_images(f"Beit{SEGMENT}", "Beit", out_indices=[1, 2, 3, 4], pool_scales=[1, 2], **BEIT),
    "vitmatte": of_images("VitMatteForImageMatting", "VitMatte", 4, backbone_config=small_vit, **MATTING),
    "timm_backbone": of_images("TimmBackbone", "TimmBackbone", backbone="resnet18", use_pretrained_backbone=False),
    "wav2vec2_conformer": conformer,
    "patchtst": patches_of_series,
}


def tensors(output: Any) -> Iterator[Tensor]:
    """Yield the floating tensors of an output, however they are nested."""
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, dict):
        for value in output.values():
            yield from tensors(value)
    elif isinstance(output, list | tuple):
        for value in output:
            yield from tensors(value)
