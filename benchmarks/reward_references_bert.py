"""ImageReward's text half in plain torch under its original names: a BERT that reads the image by cross-attention."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.reward_references import TimmViT, attend, split_heads


def layers(**modules: nn.Module) -> nn.ModuleDict:
    """A named group of modules, for checkpoint names such as `self.query`."""
    return nn.ModuleDict(modules)


class BertAttention(nn.Module):
    """Post-norm attention of BERT to itself, or to the image; names `self.query`, ..., `output.LayerNorm`."""

    def __init__(self, width: int, source_width: int) -> None:
        super().__init__()
        query, key, value = nn.Linear(width, width), nn.Linear(source_width, width), nn.Linear(source_width, width)
        self.add_module("self", layers(query=query, key=key, value=value))
        self.output = layers(dense=nn.Linear(width, width), LayerNorm=nn.LayerNorm(width, eps=1e-12))

    def forward(self, x: Tensor, source: Tensor, mask: Tensor | None = None) -> Tensor:
        projections = self.get_submodule("self")
        q, k, v = (
            split_heads(projections.get_submodule(name)(y))
            for name, y in zip(("query", "key", "value"), (x, source, source))
        )
        result: Tensor = self.output["LayerNorm"](x + self.output["dense"](attend(q, k, v, mask)))
        return result


class BertLayer(nn.Module):
    """Self-attention, cross-attention, feed-forward."""

    def __init__(self, width: int, image_width: int) -> None:
        super().__init__()
        self.attention, self.crossattention = BertAttention(width, width), BertAttention(width, image_width)
        self.intermediate = layers(dense=nn.Linear(width, 4 * width))
        self.output = layers(dense=nn.Linear(4 * width, width), LayerNorm=nn.LayerNorm(width, eps=1e-12))

    def forward(self, x: Tensor, mask: Tensor, image: Tensor) -> Tensor:
        x = self.attention(x, x, mask)
        x = self.crossattention(x, image)
        wide = self.output["dense"](F.gelu(self.intermediate["dense"](x)))
        result: Tensor = self.output["LayerNorm"](x + wide)
        return result


class BertReader(nn.Module):
    """BERT with cross-attention to image tokens: ids, mask (B, L) and image (B, P, W) -> (B, L, D)."""

    def __init__(self, vocabulary: int, width: int, depth: int, image_width: int) -> None:
        super().__init__()
        self.embeddings = layers(
            word_embeddings=nn.Embedding(vocabulary, width),
            position_embeddings=nn.Embedding(512, width),
            LayerNorm=nn.LayerNorm(width, eps=1e-12),
        )
        self.embeddings.register_buffer("position_ids", torch.arange(512)[None])
        self.encoder = layers(layer=nn.ModuleList([BertLayer(width, image_width) for _ in range(depth)]))

    def forward(self, ids: Tensor, mask: Tensor, image: Tensor) -> Tensor:
        places = self.embeddings["position_embeddings"](torch.arange(ids.shape[1]))
        x: Tensor = self.embeddings["LayerNorm"](self.embeddings["word_embeddings"](ids) + places)
        for layer in self.encoder["layer"].children():
            x = layer(x, mask, image)
        return x


class ReferenceImageReward(nn.Module):
    """The whole of ImageReward, with its checkpoint's 621 names at full depth (24 image and 12 text layers)."""

    def __init__(
        self, vocabulary: int, *, size: int, patch: int, vision_width: int, text_width: int, depth: tuple[int, int]
    ) -> None:
        super().__init__()
        self.blip = layers(
            visual_encoder=TimmViT(size, patch, vision_width, depth[0]),
            text_encoder=BertReader(vocabulary, text_width, depth[1], vision_width),
        )
        widths = [text_width, 1024, 128, 64, 16, 1]
        heads = {str(n): nn.Linear(a, b) for n, a, b in zip((0, 2, 4, 6, 7), widths, widths[1:], strict=False)}
        self.mlp = layers(layers=nn.ModuleDict(heads))

    def forward(self, pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """(B,) standardised scores."""
        x = self.blip["text_encoder"](ids, mask, self.blip["visual_encoder"](pixels))[:, 0]
        for layer in self.mlp["layers"].children():
            x = layer(x)
        scores: Tensor = (x[:, 0] - 0.16717183) / 1.03334
        return scores
