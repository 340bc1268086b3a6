__version__ = "0.1.0"

# The names that a full run needs, loaded when asked for: `import emo_r3.rewards` alone must not import torch.
_HOME = {"TrainConfig": "config", "make_config": "config", "load_examples": "data", "make_scenes": "scenes", "load_policy": "policy", "load_processor": "policy",
         "RewardWeights": "rewards", "run": "cli", "RunReport": "explore"}
__all__ = sorted(_HOME)


def __getattr__(name: str):
    if name not in _HOME: raise AttributeError(f"module 'emo_r3' has no attribute {name!r}")
    from importlib import import_module
    return getattr(import_module(f"emo_r3.{_HOME[name]}"), name)
