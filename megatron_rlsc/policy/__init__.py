"""The trained policy on megatron-core: the only package that imports it."""

import warnings

# Said by megatron-core at import, on every rank: that apex and TE are absent (kernels.py chooses, and refuses with the
# reason), and that defaults of its own are deprecated.
warnings.filterwarnings("ignore", message=".*Apex (is|are) not installed.*")
warnings.filterwarnings("ignore", message="full scope is deprecated.*")
# Said by torch of what megatron-core's checkpoints call.
warnings.filterwarnings("ignore", message=".*DTensor instead and we are deprecating ShardedTensor.*")
warnings.filterwarnings("ignore", message="`load_state_dict` is deprecated.*", category=FutureWarning)
