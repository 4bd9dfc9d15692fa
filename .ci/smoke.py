"""A short look at an installed gradclip, with nothing but NumPy: does this Python run it?"""

import platform

import numpy as np

import gradclip
from gradclip import _core

rng = np.random.default_rng(0)
grads = {f"layer{i}": rng.standard_normal(200_000).astype(np.float32) for i in range(10)}
expected = np.sqrt(sum(np.sum(g.astype(np.float64) ** 2) for g in grads.values()))

bits = set()
for isa in _core.supported_isas():
    _core.set_isa(isa)
    for threads in (1, 2, 5):
        gradclip.set_num_threads(threads)
        bits.add(gradclip.global_norm(grads))
assert len(bits) == 1, bits
assert abs(bits.pop() / expected - 1) < 1e-7

result = gradclip.clip_by_global_norm_(grads, max_norm=1.0)
assert result.clipped
assert set(result.named_norms()) == set(grads)
assert abs(gradclip.global_norm(grads) - 1.0) < 1e-6

grads["layer3"][7] = np.nan
told = ""
try:
    gradclip.clip_by_global_norm_(grads, max_norm=1.0)
except gradclip.NonFiniteGradientError as error:
    told = str(error)
assert "layer3" in told, told
try:
    from gradclip import _cuda
except ImportError:
    cuda = "no CUDA engine"
else:
    cuda = f"CUDA for {_cuda.architectures()}, here {_cuda.missing() or 'with a GPU'}"
print(f"Python {platform.python_version()}, NumPy {np.__version__}: fine; {cuda}")
