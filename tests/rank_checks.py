"""What must hold on every rank of a world; ``ranks.py`` runs it, ``test_torch_distributed.py`` reports it."""

from __future__ import annotations

import rank_dtensors
import rank_hooks
import rank_layers
import rank_models
import rank_shards
from rank_support import checks_for

__all__ = ["checks_for", "rank_dtensors", "rank_hooks", "rank_layers", "rank_models", "rank_shards"]
