"""The model that `from_pretrained` would build for a checkpoint, without weights."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.initialization import no_init_weights

from ..checkpoint import formats
from ..checkpoint.files import Checkpoint
from ..checkpoint.load import LoadReport
from . import loading
from .pretrained import _class_of, _read_config
from .quantizer import Loading, drop_towers


def skeleton(checkpoint: Checkpoint) -> Any:
    """The stock transformers model of the checkpoint's architecture, on the meta device.

    No code of the checkpoint's own is run. Raises what transformers does for an
    architecture or a configuration that it does not know.
    """
    config, _ = _read_config(checkpoint, {"trust_remote_code": False})
    model_class, config = _class_of(AutoModelForCausalLM, config)
    state = Loading(checkpoint, LoadReport(str(checkpoint.folder)))
    if formats.recognizes(checkpoint):
        model_class, config = loading._without_towers(model_class, config, state, True)
        loading._untie(config, checkpoint)
    with torch.device("meta"), no_init_weights():
        model = model_class(config)
    if not state.seeing:
        drop_towers(model)
    return model
