"""The image tower, which the text encoder and the judge are trained against."""

import torch.nn.functional as F
from torch import Tensor, nn


class ImageTower(nn.Module):
    """Pictures (B, 3, 128, 128) in [-1, 1] -> unit vectors (B, 128)."""

    def __init__(self, widths=(48, 96, 160, 224, 224), dim: int = 128):
        super().__init__()
        layers, c = [], 3
        for i, width in enumerate(widths):
            layers += [nn.Conv2d(c, width, 3, stride=2 if i < 4 else 1, padding=1), nn.GroupNorm(8, width), nn.SiLU()]
            c = width
        self.features = nn.Sequential(*layers)
        self.projection = nn.Linear(c, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = F.avg_pool2d(x, 2)  # 64 x 64 is enough to name a picture
        return F.normalize(self.projection(self.features(x).mean(dim=(2, 3))), dim=-1)
