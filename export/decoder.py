"""The language model as two graphs over one set of weights.

`CachedDecoder` is what the worker runs, for prefill and for every decode step: fused operators,
a KV cache that the caller owns, logits of each row's last valid token only.

`FullDecoder` is the plain contract: token ids, mask and image embeddings in, all logits out,
standard operators alone, M-RoPE positions derived inside. Quantization tools calibrate on it and
parity is argued from it.

B rows, S tokens, D hidden size, V vocabulary, L_max tokens a row's cache holds. In both,
`image_embeds` (B, S, D) takes the place of a token's embedding at the image's tokens, and is
ignored elsewhere.

This module knows nothing of tokenizers or of files.
"""

import math
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from export.layers import GatedMlp, Linear
from export.operators import group_query_attention, rms_norm, rotary_embedding, skip_rms_norm


class DecoderWeights(nn.Module):
    """Weights of both graphs, under names that both share.

    Args:
        model: `Qwen2_5_VLForConditionalGeneration`.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        text = model.model.language_model
        self.embed = text.embed_tokens.weight
        self.stack = nn.ModuleList(Layer(layer) for layer in text.layers)
        self.norm = text.norm.weight
        # A tied head stays tied: one initializer, read by the Gather and by the last product.
        self.head = model.lm_head.weight

    @property
    def layers(self) -> "list[Layer]":
        """The decoder's layers, in order."""
        return cast("list[Layer]", self.stack)

    def logits(self, hidden: Tensor) -> Tensor:
        """(N, D) to (N, V), a Gemm that takes the weight as it lies, (V, D)."""
        return F.linear(hidden, self.head)


class Layer(nn.Module):
    """Weights of one decoder layer."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        attention = layer.self_attn
        self.norm1, self.norm2 = layer.input_layernorm.weight, layer.post_attention_layernorm.weight
        self.qkv = nn.ModuleList(map(Linear.of, (attention.q_proj, attention.k_proj, attention.v_proj)))
        self.out = Linear.of(attention.o_proj)
        self.mlp = GatedMlp(layer.mlp)


class _Decoder(nn.Module):
    """What the two graphs have in common: embedding, sizes, rotary tables."""

    inv_freq: Tensor
    axis: Tensor

    def __init__(self, weights: DecoderWeights, model: Any) -> None:
        super().__init__()
        config, rotary = model.config.text_config, model.model.language_model.rotary_emb
        self.weights = weights
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.hidden_size // self.heads
        self.eps = config.rms_norm_eps
        self.image_token_id = model.config.image_token_id
        self.register_buffer("inv_freq", rotary.inv_freq)
        self.register_buffer("axis", _axis_of_frequency(rotary.mrope_section))

    def _embed(self, input_ids: Tensor, is_image: Tensor, image_embeds: Tensor) -> Tensor:
        return torch.where(is_image[..., None], image_embeds, F.embedding(input_ids, self.weights.embed))

    def _rotary_tables(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """M-RoPE (3, B, S) to cosines and sines, each (B, S, head_dim / 2).

        Frequency i turns by the position along the axis (time, row, column) whose section it
        falls in: Qwen2-VL, arXiv 2409.12191, section 2.1.
        """
        turns = position_ids.float().index_select(0, self.axis).permute(1, 2, 0) * self.inv_freq
        return turns.cos(), turns.sin()


class CachedDecoder(_Decoder):
    """Prefill of whole rows (S > 1, empty cache) or one decode step (S = 1)."""

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        image_embeds: Tensor,
        seqlens_k: Tensor,
        total_sequence_length: Tensor,
        past: list[Tensor],
    ) -> tuple[Tensor, ...]:
        """Run B rows, right-padded to S.

        Args:
            input_ids: int64 (B, S).
            position_ids: int64 (3, B, S), M-RoPE.
            image_embeds: (B, S, D).
            seqlens_k: int32 (B,), valid tokens of each row after this call, less one.
            total_sequence_length: int32 scalar, the largest number of valid tokens.
            past: key and value of layer 0, of layer 1, ..., each (B, kv_heads, L_max, head_dim).

        Returns:
            `next_token` int64 (B,), the argmax at each row's last valid token, or -1 where a logit or
            a hidden state of the row is not finite; `logits` (B, V) there; then the present keys and
            values in the order of `past`. After the last layer's attention only that token goes on.
        """
        # An image token that the model itself answers with is a token like any other.
        is_prefill = torch.tensor(input_ids.shape[1]) > 1
        hidden = self._embed(input_ids, (input_ids == self.image_token_id) & is_prefill, image_embeds)
        cos, sin = (t.reshape(-1, self.head_dim // 2) for t in self._rotary_tables(position_ids))
        rows = torch.arange(input_ids.numel()).reshape(input_ids.shape)
        layers = self.weights.layers
        present: list[Tensor] = []
        normed = rms_norm(hidden, layers[0].norm1, self.eps)
        for index, layer in enumerate(layers):
            q, k, v = (linear(normed) for linear in layer.qkv)
            q = rotary_embedding(q, rows, cos, sin, self.heads)
            k = rotary_embedding(k, rows, cos, sin, self.kv_heads)
            cache = (past[2 * index], past[2 * index + 1])
            heads = (self.heads, self.kv_heads)
            update, cache = group_query_attention(q, k, v, cache, seqlens_k, total_sequence_length, heads)
            present += cache
            if index == len(layers) - 1:
                # Rounding to integers can hide what is not finite from the logits, but not from here.
                states = hidden.mean((1, 2))
                update, hidden = _last_valid(update, seqlens_k), _last_valid(hidden, seqlens_k)
            normed, hidden = skip_rms_norm(layer.out(update), hidden, layer.norm2, self.eps)
            following = layers[index + 1].norm1 if index + 1 < len(layers) else self.weights.norm
            normed, hidden = skip_rms_norm(layer.mlp(normed), hidden, following, self.eps)
        logits = self.weights.logits(normed[:, 0])
        # A mean is finite if all are; argmax gives a token among NaNs too.
        is_finite = (states + logits.mean(-1)).abs() < math.inf
        return torch.where(is_finite, logits.argmax(-1), -1), logits, *present


class FullDecoder(_Decoder):
    """All logits of whole rows, without a cache and without contrib operators."""

    def __init__(self, weights: DecoderWeights, model: Any, merged_side: int) -> None:
        super().__init__(weights, model)
        self.merged_side = merged_side

    def forward(self, input_ids: Tensor, attention_mask: Tensor, image_embeds: Tensor) -> Tensor:
        """int64 (B, S), int64 (B, S) of ones and zeros, (B, S, D) to logits (B, S, V)."""
        batch, length = input_ids.shape
        is_image, positions = self._image_and_positions(input_ids, attention_mask)
        cos, sin = self._rotary_tables(positions)
        cos, sin = cos[:, None], sin[:, None]
        visible = torch.ones(length, length, dtype=torch.bool).tril() & attention_mask.bool()[:, None, None]
        hidden = self._embed(input_ids, is_image, image_embeds)
        for layer in self.weights.layers:
            normed = rms_norm(hidden, layer.norm1, self.eps)
            qkv = (linear(normed) for linear in layer.qkv)
            q, k, v = (t.reshape(batch, length, -1, self.head_dim).transpose(1, 2) for t in qkv)
            update = self._attend(_rotate(q, cos, sin), _rotate(k, cos, sin), v, visible)
            hidden = hidden + layer.out(update.transpose(1, 2).reshape(batch, length, -1))
            hidden = hidden + layer.mlp(rms_norm(hidden, layer.norm2, self.eps))
        normed = rms_norm(hidden, self.weights.norm, self.eps)
        return self.weights.logits(normed.reshape(batch * length, -1)).reshape(batch, length, -1)

    def _image_and_positions(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Where the image is (B, S), and M-RoPE positions (3, B, S), of rows with at most one.

        Rows may be padded on either side. Image tokens beyond the first side**2 are text. Text
        counts on by one; the k-th merged patch of an image that starts at p stands at
        (p, p + k / side, p + k % side); text after the image goes on at p + side.
        """
        side = self.merged_side
        is_image = input_ids == self.image_token_id
        seen = is_image.long().cumsum(-1).clamp(max=side * side + 1)
        is_image = is_image & (seen <= side * side)
        index = attention_mask.cumsum(-1) - 1
        patch = torch.clamp(seen - 1, min=0)
        start = index - patch
        text = index - torch.where(seen > 0, side * side - side, 0)
        image = torch.stack([start, start + patch // side, start + patch % side])
        return is_image, torch.where(is_image, image, text)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
        """Grouped-query attention on (B, heads, S, head_dim), softmax in fp32."""
        batch, _, length, head_dim = q.shape
        q = q.reshape(batch, self.kv_heads, -1, length, head_dim)
        scores = q @ k[:, :, None].transpose(-1, -2) / math.sqrt(head_dim)
        scores = torch.where(visible[:, None], scores.float(), torch.finfo(torch.float32).min)
        mixed = scores.softmax(-1).to(v.dtype) @ v[:, :, None]
        return mixed.reshape(batch, self.heads, length, head_dim)


def _axis_of_frequency(mrope_section: list[int]) -> Tensor:
    """int64 (head_dim / 2,): 0, 1 or 2, the axis that each rotary frequency follows."""
    return torch.cat([torch.full((n,), i % 3) for i, n in enumerate(mrope_section)])


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of (B, heads, S, head_dim) in two halves by (B, 1, S, head_dim / 2)."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def _last_valid(hidden: Tensor, seqlens_k: Tensor) -> Tensor:
    """(B, S, D) to (B, 1, D): token `seqlens_k` of a prefill, the only token of a decode step."""
    last = torch.minimum(seqlens_k.long(), torch.tensor(hidden.shape[1] - 1))
    return hidden.gather(1, last[:, None, None].expand(-1, 1, hidden.shape[2]))
