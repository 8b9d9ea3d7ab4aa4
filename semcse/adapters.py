"""TODO: say what this file is for: semcse.adapters."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.activations import get_activation

from semcse.encoder import Encoder
from semcse.errors import UserError
from semcse.model_folder import brief, hub_folder, json_or_empty

log = logging.getLogger(__name__)

# Where a bottleneck adapter stands in each layer and how it is wired: the adapters library's
# "seq_bn" ("pfeiffer" before), the only kind computed here.
SEQ_BN = {
    "output_adapter": True,
    "mh_adapter": False,
    "cross_adapter": False,
    "original_ln_before": True,
    "original_ln_after": True,
    "residual_before_ln": True,
    "ln_before": False,
    "ln_after": False,
    "is_parallel": False,
    "use_gating": False,
    "phm_layer": False,
    "inv_adapter": None,
    "scaling": 1.0,
}
ADAPTER_KEY = re.compile(
    r"(?:.*\.)?encoder\.layer\.(\d+)\.output\.adapters\.[^.]+\.adapter_(down\.0|up)\.(weight|bias)"
)


class AdaptedNorm(nn.Module):
    """The LayerNorm that ends a layer, with a bottleneck adapter before it: s -> norm(s +
    bottleneck(norm(s))), s being feed-forward plus residual.
    """

    def __init__(self, norm: nn.LayerNorm, bottleneck: nn.Module) -> None:
        super().__init__()
        self.norm, self.bottleneck = norm, bottleneck

    def forward(self, total: Tensor) -> Tensor:
        """(n, length, d) -> the same shape."""
        return cast(Tensor, self.norm(total + self.bottleneck(self.norm(total))))


def add_adapter(encoder: Encoder, name: str, revision: str = "main") -> None:
    """Put a bottleneck adapter that the `adapters` library saved into the layers of a BERT-like
    encoder, which it changes.

    Args:
        encoder: the model that the adapter was trained on.
        name: folder or Hub id that holds adapter_config.json and pytorch_adapter.bin.
        revision: branch, tag or full commit hash, of adapters from the Hub.

    Raises:
        UserError: it cannot be found or read, is of another kind than SEQ_BN, or does not fit the
            model.
    """
    folder = (
        Path(name)
        if Path(name).is_dir()
        else hub_folder(name, ["adapter_config.json", "pytorch_adapter.bin"], revision)
    )
    found = json_or_empty(folder / "adapter_config.json").get("config")
    config: dict[str, Any] = found if isinstance(found, dict) else {"output_adapter": None}
    if other := [
        f"{key} is {config[key]}"
        for key, value in SEQ_BN.items()
        if config.get(key, value) != value
    ]:
        raise UserError(
            f"{folder / 'adapter_config.json'}: {other[0]}",
            "only bottleneck adapters of the kind seq_bn can be used here",
        )
    activation: Any = get_activation  # untyped
    try:
        weights = torch.load(folder / "pytorch_adapter.bin", map_location="cpu", weights_only=True)
        bottlenecks = _adapter_layers(weights)
        layers: Any = encoder.model.encoder.layer  # type: ignore[union-attr]
        if set(bottlenecks) != set(range(len(layers))) - set(config.get("leave_out") or ()):
            raise ValueError(f"has adapters for {len(bottlenecks)} layers")
        for number, own in bottlenecks.items():
            norm = layers[number].output.LayerNorm
            bottleneck = nn.Sequential(
                nn.Linear(len(norm.weight), len(own["0.bias"])), activation(config["non_linearity"])
            )
            bottleneck.append(nn.Linear(len(own["0.bias"]), len(norm.weight))).load_state_dict(own)
            layers[number].output.LayerNorm = AdaptedNorm(norm, bottleneck.to(norm.weight.device))
    # pickle's and torch's many kinds for bad files, KeyError, AttributeError and RuntimeError for
    # what does not fit
    except Exception as error:
        raise UserError(
            f"adapter {name} cannot be put into {encoder.name} ({brief(error)})",
            "check the files, and that it was made for this model",
        ) from None


def _adapter_layers(weights: dict[str, Tensor]) -> dict[int, dict[str, Tensor]]:
    """Layer number -> state of its bottleneck (0: down, 2: up). Every key must be one of these."""
    layers: dict[int, dict[str, Tensor]] = {}
    for key, tensor in weights.items():
        if not (found := ADAPTER_KEY.fullmatch(key)):
            raise ValueError(f"has {key}")
        layers.setdefault(int(found[1]), {})[f"{0 if found[2] == 'down.0' else 2}.{found[3]}"] = (
            tensor
        )
    return layers


def select_task(encoder: Encoder, task: str) -> None:
    """Switch on one of a model's own LoRA adapters for every text (Jina v3: its card's
    `adapter_mask`). UserError: the model has no such task.
    """
    number = getattr(encoder.model, "_adaptation_map", {}).get(task)
    if number is None:
        raise UserError(
            f"model {encoder.name} has no adapter for the task {task}",
            "check that these are the model's own files",
        )

    def with_mask(
        module: nn.Module, args: Any, kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        ids = kwargs["input_ids"]
        return args, kwargs | {
            "adapter_mask": torch.full((len(ids),), number, dtype=torch.int32, device=ids.device)
        }

    encoder.model.register_forward_pre_hook(with_mask, with_kwargs=True)
