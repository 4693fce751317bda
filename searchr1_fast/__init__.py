"""searchr1_fast: reinforcement learning of search agents, one process per GPU.

Importing the package imports nothing else; `searchr1 --help` and `searchr1_fast.config` stay free of torch.
"""

__version__ = "0.1.0"
