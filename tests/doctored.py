"""Models that look like Llama and are not: each has one trait that breaks an engine which replays layers on rows."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, LlamaForCausalLM
from transformers.masking_utils import eager_mask
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaMLP,
    LlamaModel,
    apply_rotary_pos_emb,
)

from causalpatch.testing.tiny import MAX_POSITIONS, VOCAB, tiny_model

PREFIX = 3  # tokens of a prefix that see one another


class Body(LlamaModel):
    """A body whose loop over layers can be tampered with."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids=None, **_: Any):
        x = self.embed_tokens(input_ids)
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if position_ids is None:
            position_ids = torch.arange(x.shape[1])[None].expand(len(x), -1)
        mask = _additive(self.visible(attention_mask.bool()), x.dtype)
        rotary = self.rotary_emb(x, position_ids=position_ids)
        more = self.more(input_ids)
        for number, layer in enumerate(self.layers):
            x = self.between(number, x, position_ids)
            x = layer(x, attention_mask=mask, position_embeddings=rotary, position_ids=position_ids, **more)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(x))

    def visible(self, is_real: Tensor) -> Tensor:
        """Say which keys each query sees, (row, query, key)."""
        n = is_real.shape[1]
        return torch.ones(n, n, dtype=torch.bool).tril() & is_real[:, None]

    def between(self, number: int, x: Tensor, position_ids: Tensor) -> Tensor:
        """Return what the layer of this number is given."""
        return x

    def more(self, input_ids: Tensor) -> dict[str, Any]:
        """Return what else every layer is given."""
        return {}


def _additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    itself = torch.eye(visible.shape[-1], dtype=torch.bool)  # a pad sees itself, so that nothing is NaN
    return torch.zeros(visible.shape, dtype=dtype).masked_fill(~(visible | itself), torch.finfo(dtype).min)[:, None]


class FeaturesBetween(Body):
    """Adds features of the position between its layers, as models do that see pictures."""

    def between(self, number: int, x: Tensor, position_ids: Tensor) -> Tensor:
        table = torch.sin(torch.arange(MAX_POSITIONS * x.shape[-1], dtype=x.dtype)).view(MAX_POSITIONS, -1)
        return x + table[position_ids] if number == 1 else x


class ScaledBetween(Body):
    """Multiplies the stream between its layers."""

    def between(self, number: int, x: Tensor, position_ids: Tensor) -> Tensor:
        return 0.7 * x if number == 1 else x


class PrefixLM(Body):
    """Lets the first tokens of a prompt see one another: a real key stands after its query."""

    def visible(self, is_real: Tensor) -> Tensor:
        is_prefix = is_real & (is_real.cumsum(1) <= PREFIX)
        return super().visible(is_real) | (is_prefix[:, :, None] & is_prefix[:, None])


class Encoder(Body):
    """Lets all tokens see one another."""

    def visible(self, is_real: Tensor) -> Tensor:
        return is_real[:, None] & is_real[:, :, None]


class PerToken(Body):
    """Gives every layer a tensor of its own for each token."""

    def more(self, input_ids: Tensor) -> dict[str, Any]:
        return {"extra": torch.cos(input_ids[..., None] * torch.arange(1, self.config.hidden_size + 1)).double()}


class Remembering(Body):
    """Gives all layers one dictionary, in which they leave things for one another."""

    def more(self, input_ids: Tensor) -> dict[str, Any]:
        return {"memo": {}}


class AddsExtra(LlamaAttention):
    """Looks at what it is given for each token, too."""

    def forward(self, hidden_states: Tensor, extra: Tensor, **given: Any):
        return super().forward(hidden_states + 0.3 * extra, **given)


class Recalls(LlamaAttention):
    """Looks at what the layer before left in the dictionary, too."""

    def forward(self, hidden_states: Tensor, memo: dict[str, Tensor], **given: Any):
        seen = hidden_states + 0.5 * memo["kept"] if "kept" in memo else hidden_states
        memo["kept"] = hidden_states
        return super().forward(seen, **given)


class Shifting(LlamaMLP):
    """Mixes each token with the one before, outside of attention."""

    def forward(self, x: Tensor) -> Tensor:
        before = torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1)
        return super().forward(x + 0.5 * before)


class CountsTokens(LlamaMLP):
    """Multiplies by a number that depends on how many tokens there are."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1 + 0.1 * x.shape[1])


class Blurring(nn.Module):
    """An activation, without any parameter, that mixes each token with the one before."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.silu(x) + 0.5 * nn.functional.pad(x[:, :-1], (0, 0, 1, 0))


class Tilting(LlamaAttention):
    """Hands its kernel an argument that only this kernel knows."""

    def forward(self, hidden_states: Tensor, position_embeddings, attention_mask=None, **_: Any):
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (projection(hidden_states).view(shape).transpose(1, 2) for projection in projections)
        q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
        interface = AttentionInterface()[self.config._attn_implementation]
        z, pattern = interface(self, q, k, v, attention_mask, dropout=0.0, scaling=self.scaling, tilt=0.4)
        return self.o_proj(z.reshape(*hidden_states.shape[:-1], -1)), pattern


def _tilted(module, query, key, value, attention_mask, scaling, tilt=0.0, bias=None, **_: Any):
    groups = query.shape[1] // key.shape[1]
    scores = scaling * query @ key.repeat_interleave(groups, 1).transpose(-1, -2)
    scores = scores * (1 - tilt) + tilt * torch.tanh(scores) + (0 if attention_mask is None else attention_mask)
    if bias is not None:
        scores = scores + bias(query)
    pattern = scores.softmax(-1)
    return (pattern @ value.repeat_interleave(groups, 1)).transpose(1, 2).contiguous(), pattern


def _of_queries(query: Tensor) -> Tensor:
    return torch.tanh(query.sum(-1))[..., None] * torch.linspace(-1, 1, query.shape[1])[:, None, None]


def _own(module, query, key, value, attention_mask, scaling, **_: Any):
    return _tilted(module, query, key, value, attention_mask, scaling, tilt=0.5, bias=_of_queries)


for _name, _function in (("tests_tilted", _tilted), ("tests_own", _own)):
    AttentionInterface.register(_name, _function)
    AttentionMaskInterface.register(_name, eager_mask)


class DoubleHead(nn.Linear):
    """An unembedding that does more than multiply."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + torch.tanh(x[..., :1])


class SineLogits(LlamaForCausalLM):
    """Bends its logits after the unembedding."""

    def forward(self, *given: Any, **named: Any):
        output = super().forward(*given, **named)
        output.logits = torch.sin(output.logits)
        return output


class CentredLogits(LlamaForCausalLM):
    """Subtracts from every logit the mean over the vocabulary, so that no column stands alone."""

    def forward(self, *given: Any, **named: Any):
        output = super().forward(*given, **named)
        output.logits = output.logits - output.logits[..., : VOCAB // 2].amax(-1, keepdim=True)
        return output


def llama(**settings: Any) -> LlamaForCausalLM:
    """Build the Llama that the others are made from."""
    return tiny_model("llama", **({"layers": 3, "heads": 4, "kv_heads": 2, "seed": 5} | settings))


def _classes(**classes: type[nn.Module]) -> Callable[[LlamaForCausalLM], None]:
    """Return what gives parts of a model another class, and attention a kernel."""

    def doctor(module: LlamaForCausalLM) -> None:
        places = {"": module, "model": module.model, "lm_head": module.lm_head}
        for name, kind in classes.items():
            name = name.removeprefix("whole")
            parts = [places[name]] if name in places else [getattr(layer, name) for layer in module.model.layers]
            for part in parts:
                part.__class__ = kind

    return doctor


def _kernel(name: str, attention: type[nn.Module] | None = None) -> Callable[[LlamaForCausalLM], None]:
    def doctor(module: LlamaForCausalLM) -> None:
        module.config._attn_implementation = name
        if attention:
            _classes(self_attn=attention)(module)

    return doctor


def _activation(module: LlamaForCausalLM) -> None:
    for layer in module.model.layers:
        layer.mlp.act_fn = Blurring()


# What layers on rows would get wrong.
REFUSED: Mapping[str, Callable[[LlamaForCausalLM], None]] = {
    "features between its layers": _classes(model=FeaturesBetween),
    "a factor between its layers": _classes(model=ScaledBetween),
    "a prefix that sees itself": _classes(model=PrefixLM),
    "no causal mask": _classes(model=Encoder),
    "a dictionary that layers share": _classes(model=Remembering, self_attn=Recalls),
    "an MLP that mixes tokens": _classes(mlp=Shifting),
    "an MLP that counts tokens": _classes(mlp=CountsTokens),
    "an activation that mixes tokens": _activation,
    "an argument that only its kernel knows": _kernel("tests_tilted", Tilting),
    "a kernel of its own": _kernel("tests_own"),
}
# What layers on rows may take or refuse, but never get wrong.
ODD: Mapping[str, Callable[[LlamaForCausalLM], None]] = {
    "a loop of its own": _classes(model=Body),
    "a tensor for each token": _classes(model=PerToken, self_attn=AddsExtra),
    "an unembedding that does more": _classes(lm_head=DoubleHead),
    "bent logits": _classes(whole=SineLogits),
    "centred logits": _classes(whole=CentredLogits),
}


def doctored(name: str) -> LlamaForCausalLM:
    """Build the model of this name."""
    module = llama()
    (REFUSED | ODD)[name](module)
    return module
