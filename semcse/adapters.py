"""Adapters: the bottleneck adapters of the `adapters` library, and Jina v3's own LoRA adapters."""

from __future__ import annotations

import re
import textwrap
from collections import defaultdict
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from semcse import files
from semcse.encoder import Encoder
from semcse.errors import UserError

# The files of a published adapter.
ADAPTER_FILES = ["adapter_config.json", "pytorch_adapter.bin"]
# Where the adapters library puts a "seq_bn" adapter ("pfeiffer" in older versions) in a layer, and
# how it connects it. This is the only kind of adapter that the code below can compute.
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
    """The last LayerNorm of a layer with a bottleneck adapter in front of it.

    It computes norm(s + bottleneck(norm(s))), where s is the feed-forward output plus the residual.
    """

    def __init__(self, norm: nn.LayerNorm, bottleneck: nn.Module) -> None:
        super().__init__()
        self.norm, self.bottleneck = norm, bottleneck

    def forward(self, total: Tensor) -> Tensor:
        """(n, length, d) -> the same shape."""
        return cast(Tensor, self.norm(total + self.bottleneck(self.norm(total))))


def add_adapter(encoder: Encoder, folder: Path) -> None:
    """Put a bottleneck adapter that the `adapters` library saved into the layers of an encoder.

    Args:
        encoder: the BERT-like model that the adapter was trained on; it is changed in place.
        folder: holds the ADAPTER_FILES.

    Raises:
        UserError: the adapter cannot be read, is of another kind than SEQ_BN, or does not fit the
            model.
    """
    try:
        config = dict(files.read_json(folder / ADAPTER_FILES[0])["config"])
        weights = torch.load(folder / ADAPTER_FILES[1], map_location="cpu", weights_only=True)
        states = _states_by_layer(config, weights)
        layers: Any = encoder.model.encoder.layer  # type: ignore[union-attr]
        if set(states) != set(range(len(layers))) - set(config.get("leave_out") or ()):
            raise ValueError(f"it has weights for {len(states)} layers")
        for number, state in states.items():
            norm = layers[number].output.LayerNorm
            size, narrow = len(norm.weight), len(state["0.bias"])
            down, up = nn.Linear(size, narrow), nn.Linear(narrow, size)
            bottleneck = nn.Sequential(down, ACT2FN[config["non_linearity"]], up)
            bottleneck.load_state_dict(state)
            layers[number].output.LayerNorm = AdaptedNorm(norm, bottleneck.to(norm.weight.device))
    # Bad files and files for another model raise errors of many types.
    except Exception as error:
        reason = textwrap.shorten(f"{type(error).__name__}: {error}", 200, placeholder=" ...")
        raise UserError(
            f"adapter {folder} cannot be added to {encoder.name} ({reason})",
            "check its files, and that it is a seq_bn adapter made for this model",
        ) from None


def _states_by_layer(
    config: dict[str, Any], weights: dict[str, Tensor]
) -> dict[int, dict[str, Tensor]]:
    """Layer number -> state dict of its bottleneck (module 0: down, module 2: up)."""
    for key, value in SEQ_BN.items():
        if config.get(key, value) != value:
            raise ValueError(f"{key} is {config[key]}")
    states: dict[int, dict[str, Tensor]] = defaultdict(dict)
    for key, tensor in weights.items():
        if not (found := ADAPTER_KEY.fullmatch(key)):
            raise ValueError(f"unknown weight {key}")
        layer, part, kind = found.groups()
        states[int(layer)][f"{0 if part == 'down.0' else 2}.{kind}"] = tensor
    return states


def select_task(encoder: Encoder, task: str) -> None:
    """Switch on one of a model's LoRA adapters for every text, as Jina v3's model card does.

    Raises:
        UserError: the model has no adapter for this task.
    """
    number = getattr(encoder.model, "_adaptation_map", {}).get(task)
    if number is None:
        raise UserError(
            f"model {encoder.name} has no adapter for the task {task}",
            "check that the folder holds the files that its authors published",
        )

    def add_mask(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        ids = kwargs["input_ids"]
        mask = torch.full((len(ids),), number, dtype=torch.int32, device=ids.device)
        return args, kwargs | {"adapter_mask": mask}

    encoder.model.register_forward_pre_hook(add_mask, with_kwargs=True)
