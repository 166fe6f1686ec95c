"""The language model as two graphs over one set of weights.

`CachedDecoder` is what the worker runs, for prefill and for every decode step: fused operators,
a KV cache that the caller owns, logits of each row's last valid token only. M-RoPE positions and the
places of images are its inputs. No operator combines a value computed from a shape with a tensor's
values: shapes are on the host, so on a GPU that would be a copy between host and device, and a graph
with such a copy cannot be captured.

`FullDecoder` is the plain form: token ids, mask and image embeddings in, all logits out, standard
operators only. For images of one fixed size, M-RoPE positions are derived inside; else they are an
input. Quantization tools calibrate on it, and the parity gate compares its logits.

B rows, S tokens, D hidden size, V vocabulary, L_max tokens in a row's cache. In both, `image_embeds`
(B, S, D) replaces a token's embedding at the image's tokens, and is ignored elsewhere.

The residual stream can be divided by a unit, a power of two: every update is divided by it, and the
norms, which depend only on direction, divide their epsilon by its square. The results are the same,
and updates in fp16 have that much more range before they overflow.

This module knows nothing of tokenizers or of files.
"""

import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from export.half import stream_unit
from export.layers import GatedMlp, Linear, Scope
from export.operators import group_query_attention, rms_norm, rotary_embedding, skip_rms_norm
from export.standard import attend, rotate
from qvl_batch.bundle.manifest import HALVES, Dtype

#: Each token's row in two tables, and the tables of cosines and sines.
Rotary = tuple[Tensor, Tensor, Tensor]
#: Cosines and sines of each token, (B, 1, S, head_dim / 2).
Rotation = tuple[Tensor, Tensor]


class Attention(Scope):
    """Projections of one layer's attention: queries, keys and values by three products, or in half precision by one."""

    def __init__(self, attention: Any, dtype: Dtype) -> None:
        super().__init__()
        qkv = (attention.q_proj, attention.k_proj, attention.v_proj)
        if dtype in HALVES:
            self.qkv = Linear.joined(qkv)
        else:
            self.q, self.k, self.v = map(Linear.of, qkv)
        self.out = Linear.of(attention.o_proj).in_unit(stream_unit(dtype))
        self.head_dim = int(attention.head_dim)


class Layer(Scope):
    """Weights of one decoder layer, with matrix products in `dtype`."""

    def __init__(self, layer: Any, dtype: Dtype = "fp32") -> None:
        super().__init__()
        self.norm1, self.norm2 = layer.input_layernorm.weight, layer.post_attention_layernorm.weight
        self.attention = Attention(layer.self_attn, dtype)
        self.mlp = GatedMlp(layer.mlp, stream_unit(dtype))


class Embedding(nn.Module):
    """The table of tokens, (V, D)."""

    __call__: Callable[..., Tensor]

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = cast("nn.Parameter", weight)

    def forward(self, input_ids: Tensor, is_image: Tensor, image_embeds: Tensor) -> Tensor:
        """int64 (B, S), bool (B, S) and (B, S, D) to (B, S, D)."""
        return torch.where(is_image[..., None], image_embeds, F.embedding(input_ids, self.weight))


class TiedHead(nn.Module):
    """A head that has the table of tokens for its weight: one initializer, read by a Gather and a Gemm."""

    __call__: Callable[..., Tensor]

    def forward(self, hidden: Tensor, embedding: Embedding) -> Tensor:
        """(N, D) to (N, V), a Gemm on the table as it is stored."""
        return F.linear(hidden, embedding.weight)


class _Decoder(nn.Module):
    """Base of the two graphs: their weights, under the same names; sizes, embedding, rotary tables.

    Args:
        model: `Qwen2_5_VLForConditionalGeneration`.
        dtype: of the matrix products.
    """

    inv_freq: Tensor
    axis: Tensor

    def __init__(self, model: Any, dtype: Dtype = "fp32") -> None:
        super().__init__()
        text = model.model.language_model
        config, rotary = model.config.text_config, text.rotary_emb
        self.unit, self.has_fused_qkv = stream_unit(dtype), dtype in HALVES
        self.embed = Embedding(text.embed_tokens.weight)
        self.layers = cast("list[Layer]", nn.ModuleList(Layer(layer, dtype) for layer in text.layers))
        self.norm = text.norm.weight
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.hidden_size // self.heads
        self.eps = config.rms_norm_eps / self.unit**2
        self.image_token_id = model.config.image_token_id
        self.rotary_scale = float(rotary.attention_scaling)
        self.register_buffer("inv_freq", rotary.inv_freq)
        self.register_buffer("axis", _axis_of_frequency(rotary.mrope_section))

    def _embed(self, input_ids: Tensor, is_image: Tensor, image_embeds: Tensor) -> Tensor:
        hidden = self.embed(input_ids, is_image, image_embeds)
        return hidden if self.unit == 1 else hidden / self.unit

    def _rotary_tables(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """M-RoPE (3, ...) to cosines and sines, each (..., head_dim / 2).

        Frequency i is multiplied by the position along the axis (time, row, column) of the section that
        i is in: Qwen2-VL, arXiv 2409.12191, section 2.1.
        """
        angles = positions.float().index_select(0, self.axis).movedim(0, -1) * self.inv_freq
        cos, sin = angles.cos(), angles.sin()
        # YaRN (Peng et al. 2023, arXiv 2309.00071) scales logits of attention so; it is 1 without.
        return (cos, sin) if self.rotary_scale == 1 else (cos * self.rotary_scale, sin * self.rotary_scale)


class CachedDecoder(_Decoder):
    """Prefill of whole rows (S > 1, empty cache), prefill of the rest of one row whose prefix is cached, or one decode
    step (S = 1).

    Args:
        model: `Qwen2_5_VLForConditionalGeneration`.
        max_seq_len: tokens that a row of the cache holds (L_max).
        dtype: of the matrix products.
        standard_attention: attention over the cache in standard operators, for a device whose fused operator
            has no fp32 kernel.
        penalty: repetition penalty; 1 leaves it out of the graph.
        for_cuda: the graph runs on a GPU.
    """

    columns: Tensor

    def __init__(
        self,
        model: Any,
        max_seq_len: int,
        dtype: Dtype = "fp32",
        *,
        standard_attention: bool = False,
        penalty: float = 1.0,
        for_cuda: bool = False,
    ) -> None:
        super().__init__(model, dtype)
        is_tied = model.lm_head.weight is model.model.language_model.embed_tokens.weight
        self.head = TiedHead() if is_tied else Linear.of(model.lm_head)
        self.penalty, self._for_cuda = penalty, for_cuda
        self.standard_attention = standard_attention
        self.register_buffer("columns", torch.arange(max_seq_len))

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        cache_position: Tensor,
        image_embeds: Tensor,
        image_mask: Tensor,
        seqlens_k: Tensor,
        total_sequence_length: Tensor,
        past: list[Tensor],
        seen: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Run B rows, right-padded to S.

        Args:
            input_ids: int64 (B, S).
            position_ids: int64 (3, B, S), M-RoPE positions along time, rows and columns.
            cache_position: int64 (B, S), each token's index in its row, from 0.
            image_embeds: (B, S, D).
            image_mask: bool (B, S), tokens that take their embedding from `image_embeds`.
            seqlens_k: int32 (B,), valid tokens of each row after this call, minus one.
            total_sequence_length: int32 scalar, the largest number of valid tokens.
            past: key and value of layer 0, of layer 1, ..., each (B, kv_heads, L_max, head_dim).
            seen: bool (B, V), tokens that each row held before this call, where there is a penalty.

        Returns:
            `next_token` int64 (B,), the argmax at each row's last valid token, after the penalty, or -1
            where a logit or a hidden state of the row is not finite; `logits` (B, V) there, before the
            penalty; then the present keys and values in the order of `past`, and the tokens seen so far.
            After the last layer's attention only that last token is computed.
        """
        end = seqlens_k.long()
        is_valid = cache_position <= end[:, None]
        hidden = self._embed(input_ids, image_mask, image_embeds)
        rotary = self._rotary(position_ids, cache_position)
        present: list[Tensor] = []
        normed = rms_norm(hidden, self.layers[0].norm1, self.eps)
        for index, layer in enumerate(self.layers):
            cache = (past[2 * index], past[2 * index + 1])
            update, cache = layer.attention(
                self._attention, normed, rotary, cache, cache_position, seqlens_k, total_sequence_length
            )
            present += cache
            if index == len(self.layers) - 1:
                # Quantization to integers can hide values that are not finite from the logits, but not from the
                # hidden states. Those of padding are ignored.
                states = torch.where(is_valid[..., None], hidden, 0.0).mean((1, 2))
                last = end - cache_position[:, 0]
                update, hidden = _at(update, last), _at(hidden, last)
            following = self.layers[index + 1].norm1 if index + 1 < len(self.layers) else self.norm
            normed, hidden = layer(self._after_attention, update, hidden, following)
        normed = normed[:, 0]
        logits = self.head(normed, self.embed) if isinstance(self.head, TiedHead) else self.head(normed)
        # A mean is not finite if any value is not. argmax returns a token even among NaNs.
        is_finite = (states + logits.mean(-1)).abs() < math.inf
        scores = logits
        if seen is not None:
            seen = self._seen(seen, input_ids, is_valid)
            scores = torch.where(seen, torch.where(logits < 0, logits * self.penalty, logits / self.penalty), logits)
            present.append(seen)
        return torch.where(is_finite, self._most_probable(scores), -1), logits, *present

    def _most_probable(self, scores: Tensor) -> Tensor:
        """The token with the largest score of each row, int64 (B,); of several, the first."""
        # On a CPU, ONNX Runtime's TopK is the faster one (2.7 and 4.1 ms for 32 rows of 151,936, on an EPYC of Zen 5),
        # and the graph for guided answers takes more than one token from it.
        return scores.argmax(-1) if self._for_cuda else scores.topk(1).indices.select(-1, 0)

    def _rotary(self, position_ids: Tensor, cache_position: Tensor) -> Rotary:
        """Each token's row, int64 (B, S), in tables of cosines and sines, (B * S, head_dim / 2)."""
        cos, sin = (table.flatten(0, 1) for table in self._rotary_tables(position_ids))
        # 0, 1, 2, ... in order of rows and tokens, counted from values: shapes are on the host.
        ones = cache_position.clamp(1, 1)
        count = ones.sum(1, keepdim=True)
        return ones.cumsum(1) - 1 + count.cumsum(0) - count, cos, sin

    def _after_attention(
        self, layer: Layer, update: Tensor, hidden: Tensor, following: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Attention output and residual stream to inputs of the next layer: normed stream, and stream."""
        normed, hidden = skip_rms_norm(layer.attention.out(update), hidden, layer.norm2, self.eps)
        return skip_rms_norm(layer.mlp(normed), hidden, following, self.eps)

    def _queries_keys_values(
        self, attention: Attention, normed: Tensor, rotary: Rotary
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Each (B, S, heads * head_dim), queries and keys rotated."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        if self.has_fused_qkv:
            both, v = torch.split(attention.qkv(normed), [queries + keys, keys], dim=-1)
            rotated = rotary_embedding(both, *rotary, self.heads + self.kv_heads)
            q, k = torch.split(rotated, [queries, keys], dim=-1)
            return q, k, v
        q, k, v = attention.q(normed), attention.k(normed), attention.v(normed)
        return rotary_embedding(q, *rotary, self.heads), rotary_embedding(k, *rotary, self.kv_heads), v

    def _seen(self, seen: Tensor, input_ids: Tensor, is_valid: Tensor) -> Tensor:
        """Tokens seen (B, V) including those of this call, prompt and answer alike; the penalty applies to them.

        A logit becomes `logit / penalty` if positive, else `logit * penalty`: Keskar et al. 2019,
        arXiv 1909.05858, section 4.1, as transformers' `RepetitionPenaltyLogitsProcessor` has it.
        """
        ids = torch.where(is_valid, input_ids, input_ids[:, :1])
        return seen.scatter(1, ids, ids >= 0)

    def _attention(
        self,
        attention: Attention,
        normed: Tensor,
        rotary: Rotary,
        cache: tuple[Tensor, Tensor],
        cache_position: Tensor,
        seqlens_k: Tensor,
        total_sequence_length: Tensor,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Attention over the cache and the new tokens, and the cache with these appended."""
        q, k, v = self._queries_keys_values(attention, normed, rotary)
        if self.standard_attention:
            return self._attend(q, k, v, cache, cache_position)
        heads = (self.heads, self.kv_heads)
        return group_query_attention(q, k, v, cache, seqlens_k, total_sequence_length, heads)

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, cache: tuple[Tensor, Tensor], cache_position: Tensor
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """The same as `group_query_attention`, in standard operators."""
        first, last = cache_position[:, :1], cache_position[:, -1:]
        is_new = (self.columns >= first) & (self.columns <= last)
        source = torch.minimum(torch.maximum(self.columns - first, torch.tensor(0)), last - first)

        def appended(new: Tensor, past: Tensor) -> Tensor:
            new = self._by_heads(new, self.kv_heads)
            index = source[:, None, :, None].expand(-1, self.kv_heads, -1, self.head_dim)
            return torch.where(is_new[:, None, :, None], new.gather(2, index), past)

        key, value = appended(k, cache[0]), appended(v, cache[1])
        visible = self.columns <= cache_position[..., None]
        # Values that an earlier row left in the cache are masked, but can be NaN.
        written = torch.where((self.columns <= last)[:, None, :, None], value, 0.0)
        attended = attend(self._by_heads(q, self.heads), key, written, visible[:, None])
        return attended.transpose(1, 2).reshape(q.shape), (key, value)

    def _by_heads(self, x: Tensor, heads: int) -> Tensor:
        """(B, S, heads * head_dim) to (B, heads, S, head_dim)."""
        return x.reshape(x.shape[0], -1, heads, self.head_dim).transpose(1, 2)


class FullDecoder(_Decoder):
    """All logits of whole rows, without a cache and without contrib operators.

    Args:
        model: `Qwen2_5_VLForConditionalGeneration`.
        merged_side: image tokens along a side of the one square image of every row, from which positions are derived;
            None if they are an input, for any images.
    """

    def __init__(self, model: Any, merged_side: int | None) -> None:
        super().__init__(model)
        self.head = Linear.of(model.lm_head)
        self.merged_side = merged_side

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, image_embeds: Tensor, position_ids: Tensor | None = None
    ) -> Tensor:
        """int64 (B, S), int64 (B, S) of ones and zeros, (B, S, D), int64 (3, B, S) or None to logits (B, S, V)."""
        hidden, *context = self.begin(input_ids, attention_mask, image_embeds, position_ids)
        for layer in self.layers:
            hidden = layer(self.run_layer, hidden, *context)
        return self.head(rms_norm(hidden, self.norm, self.eps))

    def begin(
        self, input_ids: Tensor, attention_mask: Tensor, image_embeds: Tensor, position_ids: Tensor | None
    ) -> tuple[Tensor, Rotation, Tensor]:
        """Inputs of the first layer: hidden states (B, S, D), and what all layers take, rotary tables and the mask."""
        length = input_ids.shape[1]
        if position_ids is None:
            is_image, positions = self.image_and_positions(input_ids, attention_mask)
        else:
            is_image, positions = input_ids == self.image_token_id, position_ids
        cos, sin = self._rotary_tables(positions)
        cos, sin = cos[:, None], sin[:, None]
        visible = torch.ones(length, length, dtype=torch.bool).tril() & attention_mask.bool()[:, None, None]
        return self._embed(input_ids, is_image, image_embeds), (cos, sin), visible

    def run_layer(self, layer: Layer, hidden: Tensor, rotary: Rotation, visible: Tensor) -> Tensor:
        """Hidden states (B, S, D) after a layer."""
        normed = rms_norm(hidden, layer.norm1, self.eps)
        hidden = hidden + layer.attention(self._attention, normed, rotary, visible)
        return hidden + layer.mlp(rms_norm(hidden, layer.norm2, self.eps), F.silu)

    def _attention(self, attention: Attention, normed: Tensor, rotary: Rotation, visible: Tensor) -> Tensor:
        batch, length, _ = normed.shape
        qkv = (attention.q(normed), attention.k(normed), attention.v(normed))
        q, k, v = (t.reshape(batch, length, -1, self.head_dim).transpose(1, 2) for t in qkv)
        update = attend(rotate(q, *rotary), rotate(k, *rotary), v, visible)
        return attention.out(update.transpose(1, 2).reshape(batch, length, -1))

    def image_and_positions(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Mask of the image's tokens (B, S), and M-RoPE positions (3, B, S), of rows with at most one image.

        Rows may be padded on either side. Image tokens beyond the first side**2 are text. Positions of
        text increase by one; merged patch k of an image that starts at p has the position
        (p, p + k / side, p + k % side); text after the image continues at p + side.
        """
        assert self.merged_side is not None
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


def _axis_of_frequency(mrope_section: list[int]) -> Tensor:
    """int64 (head_dim / 2,): 0, 1 or 2, the axis of each rotary frequency."""
    return torch.cat([torch.full((n,), i % 3) for i, n in enumerate(mrope_section)])


def _at(hidden: Tensor, index: Tensor) -> Tensor:
    """(B, S, D) to (B, 1, D), each row's token at `index` (B,)."""
    return hidden.gather(1, index[:, None, None].expand(-1, 1, hidden.shape[2]))
