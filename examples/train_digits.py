"""Ten lines: a batch-normalized network learns scikit-learn's 8×8 digits."""

import numpy as np
from sklearn.datasets import load_digits

from fastbn import nn

rng = np.random.default_rng(0)
x, labels = load_digits(return_X_y=True)
x = (x / 16).astype(np.float32)
model = nn.Sequential(nn.Linear(64, 64, rng=rng), nn.BatchNorm(64), nn.ReLU(), nn.Linear(64, 10, rng=rng))
losses = nn.fit(model, x[:1500], labels[:1500], nn.Adam(model, lr=0.01), epochs=10, rng=rng).losses
print(f"loss {losses[0]:.3f} → {losses[-1]:.3f}, test accuracy {nn.accuracy(model, x[1500:], labels[1500:]):.3f}")
