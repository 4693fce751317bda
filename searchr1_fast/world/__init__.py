"""The embedded world: a generated encyclopedia with questions, for training without any download."""

from searchr1_fast.world.world import Chain, Entity, Fact, World, build_world

__all__ = ["Chain", "Entity", "Fact", "World", "build_world"]
