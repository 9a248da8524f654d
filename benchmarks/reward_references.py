"""Reward models written out in plain torch under their original names, to compare ours with.

They follow the papers and the published checkpoints' layouts: open_clip's CLIP (HPSv2), and BLIP with a timm ViT and a
BERT that reads the image by cross-attention (ImageReward). Slow and simple on purpose.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Block(nn.Module):
    """A pre-norm transformer block of open_clip, (B, L, D) -> (B, L, D)."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, num_heads, batch_first=True)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(width, 4 * width))
        self.mlp.add_module("gelu", nn.GELU())
        self.mlp.add_module("c_proj", nn.Linear(4 * width, width))

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        normed = self.ln_1(x)
        x = x + self.attn(normed, normed, normed, need_weights=False, attn_mask=mask)[0]
        result: Tensor = x + self.mlp(self.ln_2(x))
        return result


class Transformer(nn.Module):
    """Blocks one after the other."""

    def __init__(self, width: int, depth: int, num_heads: int) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList([Block(width, num_heads) for _ in range(depth)])

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for block in self.resblocks:
            x = block(x, mask)
        return x


class OpenClipVision(nn.Module):
    """open_clip's image tower: (B, 3, size, size) -> (B, projection)."""

    def __init__(self, size: int, patch: int, width: int, depth: int, num_heads: int, projection: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width) * 0.02)
        self.positional_embedding = nn.Parameter(torch.randn((size // patch) ** 2 + 1, width) * 0.02)
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = Transformer(width, depth, num_heads)
        self.proj = nn.Parameter(torch.randn(width, projection) * width**-0.5)

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.conv1(pixels).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.class_embedding.expand(len(pixels), 1, -1), patches], dim=1)
        tokens = self.transformer(self.ln_pre(tokens + self.positional_embedding))
        features: Tensor = self.ln_post(tokens[:, 0]) @ self.proj
        return features


class OpenClip(nn.Module):
    """open_clip's CLIP; HPSv2's score is the cosine of both features. `depth` is that of image and text tower."""

    def __init__(
        self,
        vocabulary: int,
        *,
        size: int,
        patch: int,
        vision_width: int,
        text_width: int,
        depth: tuple[int, int],
        projection: int,
        num_heads: int = 16,
        length: int = 77,
    ) -> None:
        super().__init__()
        self.visual = OpenClipVision(size, patch, vision_width, depth[0], num_heads, projection)
        self.token_embedding = nn.Embedding(vocabulary, text_width)
        self.positional_embedding = nn.Parameter(torch.randn(length, text_width) * 0.01)
        self.transformer = Transformer(text_width, depth[1], num_heads)
        self.ln_final = nn.LayerNorm(text_width)
        self.text_projection = nn.Parameter(torch.randn(text_width, projection) * text_width**-0.5)
        self.logit_scale = nn.Parameter(torch.tensor(4.6))

    def encode_text(self, ids: Tensor) -> Tensor:
        """Features at the end of the text, the token with the largest number; (B, projection)."""
        length = ids.shape[1]
        mask = torch.full((length, length), -torch.inf).triu(1)
        tokens = self.transformer(self.token_embedding(ids) + self.positional_embedding[:length], mask)
        return self.ln_final(tokens)[torch.arange(len(ids)), ids.argmax(1)] @ self.text_projection

    def forward(self, pixels: Tensor, ids: Tensor) -> Tensor:
        return F.cosine_similarity(self.visual(pixels), self.encode_text(ids))


class TimmAttention(nn.Module):
    """Self-attention with one matrix for queries, keys and values, of heads 64 wide."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (split_heads(part) for part in self.qkv(x).chunk(3, -1))
        result: Tensor = self.proj(attend(q, k, v))
        return result


class TimmBlock(nn.Module):
    """A block of timm's ViT."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn = TimmAttention(width)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)})

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        result: Tensor = x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))
        return result


class TimmViT(nn.Module):
    """timm's ViT: (B, 3, size, size) -> (B, 1 + patches, width)."""

    def __init__(self, size: int, patch: int, width: int, depth: int) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.pos_embed = nn.Parameter(torch.randn(1, (size // patch) ** 2 + 1, width) * 0.02)
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, patch, patch)})
        self.blocks = nn.ModuleList([TimmBlock(width) for _ in range(depth)])
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.patch_embed["proj"](pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(pixels), -1, -1), patches], dim=1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        result: Tensor = self.norm(x)
        return result


def split_heads(x: Tensor, head_width: int = 64) -> Tensor:
    """(B, L, D) -> (B, heads, L, head_width)."""
    return x.unflatten(-1, (-1, head_width)).transpose(1, 2)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Softmax attention of (B, heads, L, W), heads joined again: (B, L, D)."""
    weights = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    if mask is not None:
        weights = weights.masked_fill(mask[:, None, None, :] == 0, -torch.inf)
    return (weights.softmax(-1) @ v).transpose(1, 2).flatten(2)
