"""Plain twins of the tiny models that are given pictures: raw hooks, one picture or prompt at a time.

As in ``oracle``, nothing comes from the library. Positions of a picture are those of the tensors that its layers hand
on; what is added to them for their place is found here by adding it up again.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import causalpatch as cp
from causalpatch.testing.configs import VOCAB
from causalpatch.testing.pictures import END_ID, N_CLASSES, PICTURE_ID, tiny_seer
from oracle import Change, Edit, Inside, Plain, on_output
from parts import LLAMA, Parts

VIT = Parts(
    body="vit",
    final="layernorm",
    q="attention.q_proj",
    k="attention.k_proj",
    v="attention.v_proj",
    attention="attention",
    heads="attention.o_proj",
    attn_out="attention",
    up="mlp.fc1",
    down="mlp.fc2",
    reader="layernorm_after",
)
DINOV2 = replace(
    VIT, body="dinov2", layers="encoder.layer", attn_out="layer_scale1", mlp_out="layer_scale2", reader="norm2"
)
GATED = {"up": "mlp.up_proj", "gate": "mlp.gate_proj", "down": "mlp.down_proj"}
CLIP = replace(
    LLAMA,
    body="",
    layers="encoder.layers",
    embed="embeddings.token_embedding",
    positions="embeddings.position_embedding",
    final="final_layer_norm",
    heads="self_attn.out_proj",
    up="mlp.fc1",
    down="mlp.fc2",
    reader="layer_norm2",
)
SIGLIP = replace(CLIP, final="post_layernorm")
# By model and stream: the parts, the path of the configuration with the heads, and the answer in the output.
TWINS: Mapping[str, tuple[Parts, str, str]] = {
    "vit": (VIT, "", "logits"),
    "deit": (replace(VIT, body="deit"), "", "logits"),
    "dinov2": (DINOV2, "", "logits"),
    "dinov2_gated": (replace(DINOV2, **GATED), "", "logits"),
    "dinov2_registers": (replace(DINOV2, body="dinov2_with_registers"), "", "logits"),
    "dinov2_registers_gated": (replace(DINOV2, body="dinov2_with_registers", **GATED), "", "logits"),
    "clip_vision": (replace(CLIP, body="vision_model"), "", "image_embeds"),
    "siglip_vision": (SIGLIP, "", "pooler_output"),
    "clip_text": (replace(CLIP, body="text_model"), "", "text_embeds"),
    "siglip_text": (CLIP, "", "pooler_output"),
    "clip/vision": (replace(CLIP, body="vision_model"), "vision_config", "logits_per_image"),
    "clip/text": (replace(CLIP, body="text_model"), "text_config", "logits_per_text"),
    "siglip/vision": (replace(SIGLIP, body="vision_model"), "vision_config", "logits_per_image"),
    "siglip/text": (replace(CLIP, body="text_model"), "text_config", "logits_per_text"),
    "llava": (replace(LLAMA, body="model.language_model"), "text_config", "logits"),
    "llava/vision": (replace(CLIP, body="model.vision_tower"), "vision_config", "logits"),
}


class Twin(Plain):
    """A tiny model that sees, or one stream of it, as its author's own attributes name it."""

    def __init__(self, module: nn.Module, case: str) -> None:
        self.parts, config, self.answer = TWINS[case]
        self.family, self.inside, self._fresh = case, Inside(), copy.deepcopy(module)
        self._take(self._fresh)
        own = getattr(module.config, config) if config else module.config
        self.n_heads = own.num_attention_heads
        self.n_kv_heads = getattr(own, "num_key_value_heads", None) or self.n_heads
        self.sees = hasattr(self.body.embeddings, "cls_token") if hasattr(self.body, "embeddings") else False
        self.sees = self.sees or hasattr(getattr(self.body, "embeddings", None), "patch_embedding")

    def _take(self, module: nn.Module) -> None:
        self.module, self.config = module, module.config
        self.body = self.module.get_submodule(self.parts.body)
        self.layers = self.body.get_submodule(self.parts.layers)

    def _renew(self) -> None:
        """Take a copy that never ran: where one did, transformers notes what a tower returns before it is changed."""
        if self.family == "llava/vision":
            self._take(copy.deepcopy(self._fresh))

    def logits(self, ids: Mapping[str, Any], edits: Sequence[Edit] = ()) -> Tensor:
        self._renew()
        return super().logits(ids, edits)

    def value(self, ids: Mapping[str, Any], site: tuple[str, int | None, int | None]) -> Tensor:
        self._renew()
        return super().value(ids, site)

    def _call(self, given: Mapping[str, Any]) -> Tensor:
        output = self.module(**{name: torch.as_tensor(value) for name, value in given.items()})
        return getattr(output, self.answer)[0]

    def _hook(self, site: tuple[str, int | None, int | None], change: Change) -> list:
        if self.sees and site[0] in ("embed", "pos_embed"):
            return [on_output(self.body.embeddings, self._placed(site[0], change))]
        return super()._hook(site, change)

    def _placed(self, name: str, change: Change) -> Change:
        """Return a change of what is added to each token of a picture for its place, or of what that is added to."""
        embeddings = self.body.embeddings
        held = getattr(embeddings, "position_embeddings", None)
        held = (embeddings.position_embedding.weight if held is None else held[0]).detach()
        registers = getattr(embeddings, "register_tokens", None)
        if registers is not None:
            held = torch.cat([held[:1], torch.zeros_like(registers[0]), held[1:]])
        if name == "embed":
            return lambda whole: change(whole - held) + held
        return lambda whole: (whole - held) + change(held.clone())


def twins(case: str, **options: Any) -> tuple[cp.Model, Twin]:
    """Return a tiny model and the plain twin of it, or of one of its streams, such as ``clip/text``."""
    module = tiny_seer(case.partition("/")[0], **options)
    return cp.open_model(module), Twin(module, case)


def pairs_for(model: cp.Model, case: str, n_pairs: int = 3) -> cp.Pairs:
    """Return random pairs of pictures, or of prompts, for a tiny model or one of its streams."""
    name, _, stream = case.partition("/")
    drawn = np.random.default_rng(5)
    answers = {
        "answer": [n % N_CLASSES for n in range(n_pairs)],
        "wrong_answer": [(n + 1) % N_CLASSES for n in range(n_pairs)],
    }
    shape = (3, 12, 8) if name in ("vit", "deit") else (3, 12, 12)
    pictures = drawn.normal(size=(2, n_pairs, *shape))
    texts = drawn.integers(1, END_ID, size=(2, max(n_pairs, N_CLASSES), 5))
    texts[:, :, -1] = END_ID
    if name == "llava":
        ids = [[0, *[PICTURE_ID] * 9, *text.tolist()] for text in texts[0, :n_pairs]]
        other = ids if stream else [[*each[:10], *text.tolist()] for each, text in zip(ids, texts[1], strict=False)]
        rows = [
            {"clean": one, "corrupt": two, "answer_id": 3, "wrong_answer_id": 7}
            for one, two in zip(ids, other, strict=True)
        ]
        beside = (pictures[0], pictures[1]) if stream else pictures[0]
        return cp.load_pairs(rows, model).with_beside(pixel_values=beside)
    if stream == "text" or name.endswith("_text"):
        rows = [
            {"clean": texts[0, n], "corrupt": texts[1, n], "answer_id": 0, "wrong_answer_id": 1} for n in range(n_pairs)
        ]
        pairs = cp.load_pairs(rows, model)
        return pairs.with_common(pixel_values=pictures[0, :2]) if stream else pairs
    pairs = cp.Pairs.from_arrays(*pictures, **answers)
    return pairs.with_common(input_ids=texts[0, :N_CLASSES]) if stream else pairs


def given(pairs: cp.Pairs, number: int, role: str) -> dict[str, Any]:
    """Return the arguments of the model for one side of a pair, with an axis for the row."""
    pair = pairs[number]
    main = "pixel_values" if pairs.kind == "arrays" else "input_ids"
    own = {main: np.array(pair.input(role))[None]}
    own |= {name: np.array(array)[None] for name, array in pair.besides(role).items()}
    return own | {name: np.array(array) for name, array in pairs.common.items()}


def gap(answer: Tensor, pair: cp.Pair) -> float:
    """Return the logit of the right answer less that of the wrong one, at the last token where there are several."""
    last = answer[-1] if answer.ndim > 1 else answer
    return float(last[pair.answer[0][0]] - last[pair.wrong_answer[0][0]])


__all__ = ["PICTURE_ID", "TWINS", "VOCAB", "Twin", "gap", "given", "pairs_for", "twins"]
