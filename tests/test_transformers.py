"""The models of the transformers package, tiny and random, trained unmodified and replayed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import tracejit
from support.verified import VERIFYING
from tracejit.testing import losses_agree

transformers = pytest.importorskip("transformers")

VOCABULARY, LENGTH = 37, 12
Batch = dict[str, object]
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4}
TOKENS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
DECODER = {**SIZES, **TOKENS, "num_key_value_heads": 2, "max_position_embeddings": 32}
DECODER |= {"attention_dropout": 0.1}  # GPT-2, BERT and T5 drop by default


def tokens(*, padded: bool = True) -> Batch:
    """Tokens, which of them are there, and themselves as labels."""
    x = torch.randint(3, VOCABULARY, (3, LENGTH))
    mask = torch.ones_like(x)
    if padded:
        mask[0, 9:] = mask[2, 5:] = 0
    return {"input_ids": x, "attention_mask": mask, "labels": x.masked_fill(mask == 0, -100)}


def model(name: str, config: str, **sizes: object) -> nn.Module:
    return getattr(transformers, name)(getattr(transformers, config)(**sizes))


def gpt2() -> tuple[nn.Module, Batch]:
    sizes = {"n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 4}
    return model("GPT2LMHeadModel", "GPT2Config", **TOKENS, **sizes), tokens()


def bert() -> tuple[nn.Module, Batch]:
    sizes = {**SIZES, "vocab_size": VOCABULARY, "max_position_embeddings": 32}
    kinds = (torch.arange(LENGTH) > 5).long().expand(3, -1).contiguous()
    batch = tokens() | {"token_type_ids": kinds, "next_sentence_label": torch.tensor([0, 1, 1])}
    return model("BertForPreTraining", "BertConfig", **sizes), batch


def llama() -> tuple[nn.Module, Batch]:
    return model("LlamaForCausalLM", "LlamaConfig", **DECODER), tokens()


def mistral() -> tuple[nn.Module, Batch]:
    return model("MistralForCausalLM", "MistralConfig", **DECODER, sliding_window=5), tokens()


def qwen3() -> tuple[nn.Module, Batch]:
    return model("Qwen3ForCausalLM", "Qwen3Config", **DECODER, head_dim=8), tokens()


def t5() -> tuple[nn.Module, Batch]:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    sizes |= {"vocab_size": VOCABULARY, "decoder_start_token_id": 0}
    return model("T5ForConditionalGeneration", "T5Config", **sizes), tokens()


def vit() -> tuple[nn.Module, Batch]:
    batch = {"pixel_values": torch.randn(3, 3, 12, 12), "labels": torch.randint(5, (3,))}
    images = {"image_size": 12, "patch_size": 4, "num_labels": 5}
    images |= {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
    return model("ViTForImageClassification", "ViTConfig", **SIZES, **images), batch


def clip() -> tuple[nn.Module, Batch]:
    sizes = {**SIZES, "projection_dim": 16, "attention_dropout": 0.1}
    text = {**sizes, **TOKENS, "max_position_embeddings": 32}
    vision = {**sizes, "image_size": 12, "patch_size": 4}
    both = {"text_config": text, "vision_config": vision, "projection_dim": 16}
    batch = tokens() | {"pixel_values": torch.randn(3, 3, 12, 12), "return_loss": True}
    del batch["labels"]
    return model("CLIPModel", "CLIPConfig", **both), batch


def whisper() -> tuple[nn.Module, Batch]:
    sizes = {"d_model": 32, "num_mel_bins": 6, "max_source_positions": 12}
    sizes |= {"max_target_positions": 16, "decoder_start_token_id": 1}
    sizes |= {"dropout": 0.1, "attention_dropout": 0.1, "activation_dropout": 0.1}
    for part in ("encoder", "decoder"):
        sizes |= {f"{part}_layers": 2, f"{part}_attention_heads": 4, f"{part}_ffn_dim": 48}
    batch = {"input_features": torch.randn(2, 6, 24)}
    batch["labels"] = torch.randint(3, VOCABULARY, (2, 8))
    return model("WhisperForConditionalGeneration", "WhisperConfig", **TOKENS, **sizes), batch


def mamba() -> tuple[nn.Module, Batch]:
    sizes = {"hidden_size": 32, "state_size": 4, "num_hidden_layers": 2, "time_step_rank": 2}
    batch = tokens(padded=False)
    del batch["attention_mask"]
    return model("MambaForCausalLM", "MambaConfig", **TOKENS, **sizes), batch


MODELS = {f.__name__: f for f in (gpt2, bert, llama, mistral, qwen3, t5, vit, clip, whisper, mamba)}


def make_step(name: str) -> tuple[Callable[..., torch.Tensor], Batch, nn.Module]:
    """A training step, a batch for it, and its model."""
    torch.manual_seed(0)
    model, batch = MODELS[name]()
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, 3, 20)

    def step(**batch: object) -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        return loss.detach()

    return step, batch, model


def train(step: Callable[..., torch.Tensor], batch: Batch, calls: int = 10) -> list[float]:
    torch.manual_seed(1)  # of dropout
    return [step(**batch).item() for _ in range(calls)]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.sweep(5)
def test_models_train_like_eager_and_replay(name):
    """From one seed, with eager's own numbers for dropout."""
    plain, batch, _ = make_step(name)
    eager = train(plain, batch)
    step, batch, _ = make_step(name)
    compiled = tracejit.compile(step, on_unsupported="raise")
    ours = train(compiled, batch)
    for mine, theirs in zip(ours, eager, strict=True):
        assert losses_agree(mine, theirs, eager[0])
    assert len(set(ours[1:])) == len(ours) - 1  # the first rate is 0
    assert VERIFYING or compiled.stats.replays >= 7, compiled.explain_mode()


@pytest.mark.filterwarnings("ignore")
def test_what_a_configuration_says_is_asked_anew():
    """Attributes that the model reads by names it computes are guarded, and so is its mode."""
    plain, batch, theirs = make_step("llama")
    step, batch, mine = make_step("llama")
    compiled = tracejit.compile(step, on_unsupported="raise", backend="numpy")
    changes = [
        lambda m: m.eval(),
        lambda m: m.train(),
        lambda m: m.config.update({"use_cache": False}),
        lambda m: setattr(m.model.norm, "variance_epsilon", 0.5),
    ]
    eager, ours = train(plain, batch, 6), train(compiled, batch, 6)
    for change in changes:
        change(theirs)
        change(mine)
        eager += train(plain, batch, 4)
        ours += train(compiled, batch, 4)
    assert compiled.stats.replays > 6
    for a, b in zip(ours, eager, strict=True):
        assert losses_agree(a, b, eager[0])
