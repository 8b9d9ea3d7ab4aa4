"""Adapters: the bottleneck adapters of the `adapters` library, and Jina v3's own LoRA adapters."""

import re
import textwrap
from collections import OrderedDict, defaultdict
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from semcse import files
from semcse.encoder import Encoder
from semcse.errors import UserError

ADAPTER_FILES = ["adapter_config.json", "pytorch_adapter.bin"]
# How the adapters library connects a "seq_bn" adapter ("pfeiffer" in older versions), the only kind
# that this module can compute. Other kinds differ here or in the names of their weights.
SEQ_BN = {
    "original_ln_before": True,
    "original_ln_after": True,
    "residual_before_ln": True,
    "is_parallel": False,
    "scaling": 1.0,
}
ADAPTER_KEY = re.compile(r"(?:.*\.)?encoder\.layer\.(\d+)\.output\.adapters\.[^.]+\.(.+)")


class AdaptedNorm(nn.Module):
    """The last LayerNorm of a layer with a bottleneck adapter in front of it.

    It computes norm(s + bottleneck(norm(s))), where s is the feed-forward output plus the residual.
    """

    def __init__(self, norm: nn.LayerNorm, bottleneck: nn.Module) -> None:
        super().__init__()
        self.norm, self.bottleneck = norm, bottleneck

    def forward(self, total: Tensor) -> Tensor:
        """Apply the bottleneck and the norm to (n, length, d) states; the shape stays the same."""
        return cast(Tensor, self.norm(total + self.bottleneck(self.norm(total))))


def add_adapter(encoder: Encoder, folder: Path) -> None:
    """Put a bottleneck adapter that the `adapters` library saved into the layers of an encoder.

    Args:
        encoder: The BERT-like model that the adapter was trained on; it is changed in place.
        folder: Holds the ADAPTER_FILES of a SEQ_BN adapter.
    """
    try:
        config = files.read_json(folder / ADAPTER_FILES[0])["config"]
        for key, value in SEQ_BN.items():
            if config.get(key, value) != value:
                raise ValueError(f"{key} is {config[key]}")
        weights = torch.load(folder / ADAPTER_FILES[1], map_location="cpu", weights_only=True)
        states = _states_by_layer(weights)
        layers: Any = encoder.model.encoder.layer  # type: ignore[union-attr]
        if set(states) != set(range(len(layers))) - set(config.get("leave_out") or ()):
            raise ValueError(f"it has weights for {len(states)} layers")
        for number, state in states.items():
            norm = layers[number].output.LayerNorm
            bottleneck = _bottleneck(len(norm.weight), state, config["non_linearity"])
            layers[number].output.LayerNorm = AdaptedNorm(norm, bottleneck.to(encoder.device))
    # Bad files and files for another model raise errors of many types.
    except Exception as error:
        reason = textwrap.shorten(f"{type(error).__name__}: {error}", 200, placeholder=" ...")
        what = f"adapter {folder} cannot be added to {encoder.name} ({reason})"
        fix = "check its files, and that it is a seq_bn adapter made for this model"
        raise UserError(what, fix) from None


def _states_by_layer(weights: dict[str, Tensor]) -> dict[int, dict[str, Tensor]]:
    """Return layer number -> the state dict of its bottleneck."""
    states: dict[int, dict[str, Tensor]] = defaultdict(dict)
    for key, tensor in weights.items():
        if not (found := ADAPTER_KEY.fullmatch(key)):
            raise ValueError(f"unknown weight {key}")
        states[int(found[1])][found[2]] = tensor
    return states


def _bottleneck(size: int, state: dict[str, Tensor], activation: str) -> nn.Module:
    """Build a bottleneck from (..., size) to (..., size) with the weights in `state`."""
    narrow = len(state["adapter_down.0.bias"])
    down = nn.Sequential(nn.Linear(size, narrow), ACT2FN[activation])
    module = nn.Sequential(OrderedDict(adapter_down=down, adapter_up=nn.Linear(narrow, size)))
    module.load_state_dict(state)
    return module


def select_task(encoder: Encoder, task: str) -> None:
    """Use a model's LoRA adapter for `task` on every text, as Jina v3's model card does."""
    number = getattr(encoder.model, "_adaptation_map", {}).get(task)
    if number is None:
        raise UserError(f"{encoder.name} has no adapter for {task}", "use the files of its authors")

    def add_mask(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        ids = kwargs["input_ids"]
        mask = torch.full((len(ids),), number, dtype=torch.int32, device=ids.device)
        return args, kwargs | {"adapter_mask": mask}

    encoder.model.register_forward_pre_hook(add_mask, with_kwargs=True)
