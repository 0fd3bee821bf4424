"""The shapes that the benchmarks run over."""

# (N, C, H, W) of ResNet-50's batch-norm layers at batch 32 (He et al. 2016, table 1), and how many layers have each.
RESNET50 = {
    (32, 64, 112, 112): 1,
    (32, 256, 56, 56): 4,
    (32, 64, 56, 56): 6,
    (32, 512, 28, 28): 5,
    (32, 128, 28, 28): 8,
    (32, 1024, 14, 14): 7,
    (32, 256, 14, 14): 12,
    (32, 2048, 7, 7): 4,
    (32, 512, 7, 7): 6,
}

# Three of them, for what need not be seen on all: far out of cache, about its size, and in it.
FEW = [(32, 256, 56, 56), (32, 128, 28, 28), (32, 512, 7, 7)]

# (N, C) of fully connected networks.
DENSE = [(4096, 256), (128, 1024), (32, 64)]

LAYOUTS = ["NCHW", "NHWC"]


def name(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
