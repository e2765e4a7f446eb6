"""Small transformers with weight names that rules by role recognise."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention

HEADS = 4


class Attention(nn.Module):
    """Self-attention of four heads.

    Args:
        width: width of the states.
        norm: whether LayerNorm is applied to queries and keys.
        causal: whether a position attends only to itself and earlier positions.
    """

    def __init__(self, width: int, norm: bool, causal: bool) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            nn.Linear(width, width) for _ in range(4)
        )
        self.q_norm, self.k_norm = (
            nn.LayerNorm(width // HEADS) if norm else nn.Identity() for _ in range(2)
        )
        self.causal = causal

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns queries, keys and values, each (batch, heads, positions, width // heads)."""
        query, key, value = (
            linear(x).unflatten(2, (HEADS, -1)).transpose(1, 2)
            for linear in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.q_norm(query), self.k_norm(key), value

    def forward(self, x: Tensor) -> Tensor:
        heads = scaled_dot_product_attention(*self.split(x), is_causal=self.causal)
        changed: Tensor = self.o_proj(heads.transpose(1, 2).flatten(2))
        return changed

    def largest_logit(self, x: Tensor) -> Tensor:
        """Returns the largest |<q, k>| / √(head width) over pairs of attended positions."""
        query, key, _ = self.split(x)
        logits = (query @ key.mT).abs() / query.shape[-1] ** 0.5
        return (logits.tril() if self.causal else logits).amax()


class MLP(nn.Module):
    """An MLP with GELU; the hidden layer is four times as wide."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up_proj, self.down_proj = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        changed: Tensor = self.down_proj(gelu(self.up_proj(x)))
        return changed


class Block(nn.Module):
    """Attention and an MLP, each after a LayerNorm."""

    def __init__(self, width: int, norm: bool, causal: bool = False) -> None:
        super().__init__()
        self.before_attention, self.before_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention, self.mlp = Attention(width, norm, causal), MLP(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.before_attention(x))
        changed: Tensor = x + self.mlp(self.before_mlp(x))
        return changed


class ImageTransformer(nn.Module):
    """A transformer over the 16 patches of an image.

    Args:
        side: side of the image; pixels beyond the last full patch are ignored.
        norm: whether LayerNorm is applied to queries and keys.
        width: width of the states.
        blocks: number of blocks.
    """

    def __init__(self, side: int, norm: bool, width: int = 64, blocks: int = 2) -> None:
        super().__init__()
        self.cut = nn.Unfold(side // 4, stride=side // 4)
        self.embedding = nn.Linear((side // 4) ** 2, width)
        self.position = nn.Parameter(0.02 * torch.randn(16, width))
        self.blocks = nn.Sequential(*(Block(width, norm) for _ in range(blocks)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)
        self.side = side

    def forward(self, x: Tensor) -> Tensor:
        squares = self.cut(x.view(-1, 1, self.side, self.side)).transpose(1, 2)
        states = self.blocks(self.embedding(squares) + self.position)
        logits: Tensor = self.head(self.norm(states).mean(1))
        return logits


class TextTransformer(nn.Module):
    """Predicts the next character of a text.

    Args:
        characters: number of different characters.
        places: context length.
        norm: whether LayerNorm is applied to queries and keys.
        width: width of the states.
        blocks: number of blocks.
    """

    def __init__(
        self, characters: int, places: int, norm: bool, width: int = 64, blocks: int = 2
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, width)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.position = nn.Parameter(0.02 * torch.randn(places, width))
        self.blocks = nn.Sequential(*(Block(width, norm, causal=True) for _ in range(blocks)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, characters)

    def embed(self, x: Tensor) -> Tensor:
        """Returns the states before the first block, (batch, positions, width)."""
        states: Tensor = self.embedding(x) + self.position[: x.shape[1]]
        return states

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.norm(self.blocks(self.embed(x))))
        return logits

    @torch.no_grad()
    def largest_logit(self, x: Tensor) -> float:
        """Returns the largest attention logit of all blocks; nan if any is nan."""
        states, found = self.embed(x), []
        for block in self.blocks:
            found.append(block.attention.largest_logit(block.before_attention(states)))
            states = block(states)
        return float(torch.stack(found).max())
