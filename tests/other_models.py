"""Tiny models of random weights that are no causal language models, with their inputs.

`diffusers` is imported where one of its models is asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import transformers as hf
from torch import Tensor, nn

Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Model:
    """How one is built, and what it is called with."""

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], Inputs]


def _floats(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _ids(*shape: int, high: int = 96, seed: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(5, high, shape, generator=generator)


SMALL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
SEEING = SMALL | {"image_size": 32, "patch_size": 8}


def _padded() -> Inputs:
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, 6:] = 0
    return {"input_ids": _ids(2, 9), "attention_mask": mask}


def _pixels() -> Inputs:
    return {"pixel_values": _floats(2, 3, 32, 32)}


def _pixels_and_text() -> Inputs:
    return _pixels() | {"input_ids": _ids(2, 8)}


def bert() -> nn.Module:
    config = hf.BertConfig(vocab_size=96, max_position_embeddings=32, **SMALL)
    return hf.BertForMaskedLM(config)


def modernbert() -> nn.Module:
    config = hf.ModernBertConfig(
        vocab_size=96, max_position_embeddings=32, pad_token_id=0, **SMALL
    )
    return hf.ModernBertForMaskedLM(config)


def vit() -> nn.Module:
    return hf.ViTForImageClassification(hf.ViTConfig(num_labels=5, **SEEING))


def dinov2() -> nn.Module:
    sizes = {k: v for k, v in SEEING.items() if k != "intermediate_size"}
    return hf.Dinov2ForImageClassification(hf.Dinov2Config(num_labels=5, **sizes))


def siglip() -> nn.Module:
    text = SMALL | {"vocab_size": 96, "max_position_embeddings": 8}
    return hf.SiglipModel(hf.SiglipConfig(text_config=text, vision_config=dict(SEEING)))


def clip() -> nn.Module:
    text = SMALL | {"vocab_size": 96, "max_position_embeddings": 8, "eos_token_id": 2}
    config = hf.CLIPConfig(
        text_config=text, vision_config=dict(SEEING), projection_dim=32
    )
    return hf.CLIPModel(config)


def whisper() -> nn.Module:
    config = hf.WhisperConfig(
        vocab_size=96,
        num_mel_bins=16,
        d_model=64,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=128,
        decoder_ffn_dim=128,
        max_source_positions=32,
        max_target_positions=32,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=3,
        begin_suppress_tokens=None,
    )
    return hf.WhisperForConditionalGeneration(config)


def _heard() -> Inputs:
    return {"input_features": _floats(2, 16, 64), "decoder_input_ids": _ids(2, 5)}


def wav2vec2() -> nn.Module:
    config = hf.Wav2Vec2Config(
        vocab_size=32,
        conv_dim=(32, 32),
        conv_stride=(5, 4),
        conv_kernel=(10, 8),
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
        **SMALL,
    )
    return hf.Wav2Vec2ForCTC(config)


def t5() -> nn.Module:
    config = hf.T5Config(
        vocab_size=96,
        d_model=64,
        d_kv=16,
        d_ff=128,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
    )
    return hf.T5ForConditionalGeneration(config)


def _translated() -> Inputs:
    return _padded() | {"decoder_input_ids": _ids(2, 5, seed=3)}


def dit() -> nn.Module:
    from diffusers import DiTTransformer2DModel

    return DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=16,
        in_channels=4,
        num_layers=2,
        norm_num_groups=4,
        sample_size=8,
        num_embeds_ada_norm=10,
    )


def _noise_and_class() -> Inputs:
    return {
        "hidden_states": _floats(2, 4, 8, 8),
        "timestep": torch.tensor([10, 900]),
        "class_labels": torch.tensor([3, 7]),
    }


def flux() -> nn.Module:
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(
        in_channels=32,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=32,
        num_attention_heads=2,
        joint_attention_dim=64,
        pooled_projection_dim=32,
        guidance_embeds=True,
        axes_dims_rope=(8, 12, 12),
    )


def _noise_and_prompt() -> Inputs:
    return {
        "hidden_states": _floats(2, 16, 32),
        "encoder_hidden_states": _floats(2, 6, 64, seed=4),
        "pooled_projections": _floats(2, 32, seed=5),
        "timestep": torch.tensor([0.2, 0.9]),
        "guidance": torch.tensor([3.5, 3.5]),
        "img_ids": torch.cartesian_prod(
            torch.arange(1.0), torch.arange(4.0), torch.arange(4.0)
        ),
        "txt_ids": torch.zeros(6, 3),
    }


def sd3() -> nn.Module:
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=64,
        caption_projection_dim=64,
        pooled_projection_dim=32,
        out_channels=4,
        pos_embed_max_size=8,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )


def _noise_and_prompts() -> Inputs:
    return {
        "hidden_states": _floats(2, 4, 8, 8),
        "encoder_hidden_states": _floats(2, 6, 64, seed=4),
        "pooled_projections": _floats(2, 32, seed=5),
        "timestep": torch.tensor([100.0, 900.0]),
    }


def pixart() -> nn.Module:
    from diffusers import PixArtTransformer2DModel

    return PixArtTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        norm_num_groups=4,
        cross_attention_dim=64,
        sample_size=8,
        caption_channels=64,
        use_additional_conditions=False,
    )


def _noise_and_caption() -> Inputs:
    return {
        "hidden_states": _floats(2, 4, 8, 8),
        "encoder_hidden_states": _floats(2, 6, 64, seed=4),
        "encoder_attention_mask": torch.tensor([[1.0] * 6, [1, 1, 1, 1, 0, 0]]),
        "timestep": torch.tensor([10, 900]),
    }


TRANSFORMERS = [
    Model("bert", bert, _padded),
    Model("modernbert", modernbert, _padded),
    Model("vit", vit, _pixels),
    Model("dinov2", dinov2, _pixels),
    Model("siglip", siglip, _pixels_and_text),
    Model("clip", clip, _pixels_and_text),
    Model("whisper", whisper, _heard),
    Model("wav2vec2", wav2vec2, lambda: {"input_values": _floats(2, 800)}),
    Model("t5", t5, _translated),
]
DIFFUSERS = [
    Model("dit", dit, _noise_and_class),
    Model("flux", flux, _noise_and_prompt),
    Model("sd3", sd3, _noise_and_prompts),
    Model("pixart", pixart, _noise_and_caption),
]
