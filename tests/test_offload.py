"""Offloading between uses: the memory is really freed, and not a bit of a run changes.

A CPU stands in for the GPU: the same memory is freed and restored, and moments pass through the same buffers.
"""

from __future__ import annotations

import json
import random
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

from searchr1_fast import host_adamw
from searchr1_fast import policy as policy_module
from searchr1_fast.checkpoint import Checkpoint
from searchr1_fast.distributed import Ranks, process
from searchr1_fast.host_adamw import ALIGNMENT, HostAdamW
from searchr1_fast.models import Decoder, load_model
from searchr1_fast.offload import DeviceMemory, FrozenWeights, leaves, local
from searchr1_fast.packing import pack
from searchr1_fast.policy import Policy, empty_replica
from searchr1_fast.rollout import Engine
from searchr1_fast.train import train

ALL = {"optimizer": True, "reference": True, "replica": True}
ALGORITHMS = {
    "grpo": {"kl_coefficient": 0.05},
    "ppo": {"name": "ppo", "group_size": 2, "critic_learning_rate": 1e-3, "kl_coefficient": 0.05, "kl_in_reward": True},
}
TRAIN = {"num_steps": 2, "num_minibatches": 2}


@pytest.fixture
def as_if_on_a_gpu(monkeypatch):
    monkeypatch.setattr(policy_module, "leaves", lambda device: True)
    # The loops that generate on a CPU view weights through numpy, which never lets go of memory it has viewed.
    monkeypatch.setattr(Decoder, "fused_generation", False)


def test_a_cpu_has_nowhere_to_go():
    assert not leaves(torch.device("cpu"))
    assert leaves(torch.device("cuda", 1))


# ---------------------------------------------------------------------------------------------------------- the memory


def num_bytes(module: torch.nn.Module) -> int:
    """Bytes that a module's weights really occupy."""
    storages = {id(storage): storage for storage in (local(p).untyped_storage() for p in module.parameters())}
    return sum(storage.nbytes() for storage in storages.values())


def test_weights_that_share_memory_go_once_and_come_back_together(make_decoder):
    """Three projections share one storage side by side, and a tied head shares the embedding's."""
    whole = make_decoder(0, tied=True)
    replica = empty_replica(whole, torch.float32, torch.device("cpu"))
    size = num_bytes(replica)
    assert size == sum(p.numel() * p.element_size() for p in replica.parameters())
    memory = DeviceMemory(replica, beside=whole)
    assert not memory.is_away
    memory.release()
    memory.release()
    assert memory.is_away and num_bytes(replica) == 0
    memory.restore()
    memory.restore()
    assert num_bytes(replica) == size
    for (name, own), parameter in zip(replica.named_parameters(), whole.parameters(), strict=True):
        own.copy_(parameter.detach())  # all are as large as before, and none overlap
        assert torch.equal(own, parameter), name
    assert all(torch.equal(own, p) for own, p in zip(replica.parameters(), whole.parameters(), strict=True))


@pytest.mark.parametrize("kind", [DeviceMemory, FrozenWeights])
def test_what_another_module_uses_stays(kind):
    """For example a frozen base under two adapters."""
    base, own = torch.nn.Linear(4, 3), torch.nn.Linear(3, 2)
    expected = base.weight.detach().clone()
    memory = kind(torch.nn.Sequential(base, own), beside=torch.nn.Sequential(base))
    memory.release()
    assert num_bytes(own) == 0 and torch.equal(base.weight, expected)
    nothing = kind(base, beside=base)
    nothing.release()
    nothing.restore()
    assert torch.equal(base.weight, expected)


def test_frozen_weights_are_there_inside_and_only_there(make_decoder):
    decoder = make_decoder(1).requires_grad_(False)
    expected = {name: parameter.clone() for name, parameter in decoder.named_parameters()}
    size = num_bytes(decoder)
    at_hand = FrozenWeights(decoder, beside=make_decoder(0))
    for _ in range(2):
        assert num_bytes(decoder) == 0
        with at_hand:
            with at_hand:
                assert num_bytes(decoder) == size
            assert num_bytes(decoder) == size
            for name, parameter in decoder.named_parameters():
                assert torch.equal(parameter, expected[name]), name
    with pytest.raises(ValueError, match="a mistake inside"), at_hand:
        raise ValueError("a mistake inside")
    assert num_bytes(decoder) == 0


def test_without_room_to_come_back_all_stays_away(make_decoder):
    """Until there is room; nothing is restored halfway."""
    decoder = make_decoder(1).requires_grad_(False)
    expected = {name: parameter.clone() for name, parameter in decoder.named_parameters()}
    at_hand = FrozenWeights(decoder, beside=make_decoder(0))
    real = at_hand._away
    at_hand._away = [*real[:2], (torch.UntypedStorage(0), 2**60), *real[2:]]  # more than there is
    with pytest.raises(RuntimeError), at_hand:
        pytest.fail("there are no weights")
    assert at_hand.is_away and num_bytes(decoder) == 0
    at_hand._away = real
    with at_hand:
        for name, parameter in decoder.named_parameters():
            assert torch.equal(parameter, expected[name]), name
    assert at_hand.is_away and num_bytes(decoder) == 0


def test_without_host_memory_all_stays(monkeypatch):
    def refuse(num_bytes, device):
        raise ValueError(f"{num_bytes} bytes could not be page-locked")

    module = torch.nn.Linear(4, 3).requires_grad_(False)
    at_hand = FrozenWeights(module, beside=module)  # nothing to take away
    at_hand._beside, expected = torch.nn.Identity(), module.weight.clone()
    monkeypatch.setattr("searchr1_fast.offload.host_memory", refuse)
    with pytest.raises(ValueError, match="60 bytes"):
        at_hand.release()
    assert not at_hand.is_away and torch.equal(module.weight, expected)


def test_weights_that_were_replaced_are_copied_anew():
    """As FSDP does with a shard that it pads: the parameter is the same, but its memory is not."""
    module = torch.nn.Linear(4, 3).requires_grad_(False)
    at_hand = FrozenWeights(module, beside=torch.nn.Identity())
    with at_hand:
        module.weight.data = torch.full((3, 4), 7.0)
    with at_hand:
        assert (module.weight == 7).all()


# ------------------------------------------------------------------------------------------------------- the optimizer


@pytest.mark.parametrize("piece", [ALIGNMENT, 4 * ALIGNMENT, 1 << 20])
def test_moments_in_pieces_are_adamw_to_the_bit(piece):
    """Parameters of several pieces, and several in one piece; one has no gradient at first, and so lags behind."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(7, 33), (64,), (), (100, 17), (0, 5), (3,)]
    plain, moved = (
        [torch.nn.Parameter(torch.randn(shape, generator=generator.manual_seed(1))) for shape in shapes]
        for _ in range(2)
    )
    optimizers = (
        torch.optim.AdamW(plain, 1e-2, (0.9, 0.99), weight_decay=0.1, fused=True),
        HostAdamW(moved, 1e-2, (0.9, 0.99), 0.1, piece=piece),
    )
    for number in range(5):
        for place, pair in enumerate(zip(plain, moved, strict=True)):
            gradient = torch.randn(shapes[place], generator=generator)
            for parameter in pair:
                parameter.grad = None if place == 1 and number < 2 else gradient.clone()
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = 1e-2 / (number + 1)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        for one, other in zip(plain, moved, strict=True):
            assert torch.equal(one, other)
            expected, state = (optimizer.state[p] for optimizer, p in zip(optimizers, (one, other), strict=True))
            assert expected.keys() == state.keys()
            assert all(torch.equal(state[key], tensor) for key, tensor in expected.items())
    assert moved[1] in optimizers[1].state and optimizers[1].state[moved[1]]["step"] == 3
    optimizers[1].step()  # without any gradient, a step does nothing
    assert optimizers[1].state[moved[0]]["step"] == 5


class Stream:
    """A queue of work in order: functions, and waits (stream, number) for that much of another stream's work."""

    def __init__(self) -> None:
        self.work: list = []
        self.done = 0

    def wait_stream(self, other: Stream) -> None:
        self.work.append((other, len(other.work)))

    def wait_event(self, event: tuple[Stream, int]) -> None:
        self.work.append(event)

    def record_event(self) -> tuple[Stream, int]:
        return self, len(self.work)

    @property
    def is_ready(self) -> bool:
        """Whether its next work can be done."""
        if self.done == len(self.work):
            return False
        work = self.work[self.done]
        return not isinstance(work, tuple) or work[0].done >= work[1]

    def advance(self) -> None:
        work = self.work[self.done]
        if not isinstance(work, tuple):
            work()
        self.done += 1


@pytest.mark.parametrize("favoured", ["compute", "arrive", "leave", "none"])
@pytest.mark.parametrize("piece", [ALIGNMENT, 16 * ALIGNMENT])  # more pieces than buffers, and fewer
def test_streams_may_be_as_fast_as_they_like(monkeypatch, favoured, piece):
    """Three steps are queued before any of their work is done; then one stream runs ahead as far as it may, or the
    order is random. Each of the five waits is needed: without it something is read too early or written too late."""
    streams = {name: Stream() for name in ("compute", "arrive", "leave")}
    current = [streams["compute"]]

    @contextmanager
    def on(stream: Stream):
        current.append(stream)
        yield
        current.pop()

    def later(function):
        return lambda *arguments: current[-1].work.append(partial(function, *arguments))

    generator = torch.Generator().manual_seed(0)
    shapes = [(7, 33), (64,), (40, 17)]
    plain, moved = (
        [torch.nn.Parameter(torch.randn(shape, generator=generator.manual_seed(1))) for shape in shapes]
        for _ in range(2)
    )
    expected = torch.optim.AdamW(plain, 1e-2, (0.9, 0.99), weight_decay=0.1, fused=True)
    optimizer = HostAdamW(moved, 1e-2, (0.9, 0.99), 0.1, piece=piece)
    optimizer._streams = [streams["arrive"], streams["leave"]]
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current[-1])
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(host_adamw, "_copy", later(host_adamw._copy))
    monkeypatch.setattr(host_adamw, "adamw", lambda *lists, **options: later(partial(adamw, **options))(*lists))
    for _ in range(3):
        for one, other in zip(plain, moved, strict=True):
            one.grad = torch.randn(one.shape, generator=generator)
            other.grad = one.grad.clone()
        expected.step()
        optimizer.step()
    lot = random.Random(0)
    while ready := [stream for stream in streams.values() if stream.is_ready]:
        first = streams.get(favoured)
        (first if first in ready else lot.choice(ready)).advance()
    assert all(stream.done == len(stream.work) > 0 for stream in streams.values())
    for one, other in zip(plain, moved, strict=True):
        assert torch.equal(one, other)
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(optimizer.state[other][key], expected.state[one][key])


def test_sharded_moments_are_sharded_likewise(make_config, make_decoder, as_if_on_a_gpu):
    """Over a mesh of CPUs, so that a checkpoint equals that of a run that keeps the moments on the device."""
    config = make_config(model={"dtype": "bfloat16", "offload": ALL})
    with process("cpu", 1) as ranks:
        policy = Policy(make_decoder(0), config, ranks)
        assert isinstance(policy.optimizer, HostAdamW)
        for parameter in policy.parameters.values():
            state = policy.optimizer.new_state(parameter)
            assert isinstance(state["exp_avg"], DTensor)
            assert state["exp_avg"].shape == parameter.shape and state["exp_avg"].placements == parameter.placements
            assert state["exp_avg"].device_mesh.device_type == "cpu"


# ------------------------------------------------------------------------------------------------------------- the run


def test_memory_is_away_while_others_need_it(make_config, make_console, monkeypatch, as_if_on_a_gpu):
    seen = []
    update, logprobs, hand_over = Policy.update, Policy.reference_logprobs, Engine.update_weights

    def watched_update(self, *arguments, **options):
        seen.append(("update", num_bytes(self.replica) == 0, num_bytes(self.reference) == 0))
        return update(self, *arguments, **options)

    def watched_logprobs(self, batches):
        seen.append(("reference", num_bytes(self.replica) == 0, num_bytes(self.reference) == 0))
        return logprobs(self, batches)

    def watched_hand_over(self):  # vLLM reads the replica here
        seen.append(("hand-over", num_bytes(self.model) == 0, True))
        return hand_over(self)

    monkeypatch.setattr(Engine, "update_weights", watched_hand_over)
    monkeypatch.setattr(Policy, "update", watched_update)
    monkeypatch.setattr(Policy, "reference_logprobs", watched_logprobs)
    model = {"path": make_config().model.path, "dtype": "bfloat16", "offload": ALL}
    algorithm = {"kl_coefficient": 0.05, "group_size": 4, "drop_zero_variance_groups": False}
    train(make_config(algorithm=algorithm, model=model, train=TRAIN), make_console())
    expected = [*[("reference", True, False)] * 2, *[("update", True, True)] * 2, ("hand-over", False, True)]
    assert seen == expected * 2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_run_is_the_same_to_the_bit(make_config, make_console, as_if_on_a_gpu, algorithm, dtype):
    """Runs with and without offloading also resume each other's checkpoints.

    In fp32 one rank generates with the trained module itself, which stays on the device.
    """
    path = make_config().model.path
    configs = {}
    for name, offload in (("here", {}), ("away", ALL)):
        model = {"path": path, "dtype": dtype, "offload": offload}
        configs[name] = make_config(run={"name": name}, algorithm=ALGORITHMS[algorithm], model=model, train=TRAIN)
        train(configs[name], make_console())
    check_same(*configs.values(), step=2)
    for name, offload in (("here", ALL), ("away", {})):
        model = {"path": path, "dtype": dtype, "offload": offload}
        longer, run = TRAIN | {"num_steps": 3}, {"name": name, "resume": True}
        configs[name] = make_config(run=run, algorithm=ALGORITHMS[algorithm], model=model, train=longer)
        console = make_console()
        train(configs[name], console)
        assert "model.offload" in console.notes[0]  # a setting that differs
    check_same(*configs.values(), step=3)


def check_same(one, other, step: int) -> None:
    """Compare metrics, exported weights and every tensor of the checkpoint."""
    for theirs, ours in zip(rows(one), rows(other), strict=True):
        assert theirs.keys() == ours.keys()
        assert {k: v for k, v in theirs.items() if is_exact(k)} == {k: v for k, v in ours.items() if is_exact(k)}
    folders = [config.run_directory / "checkpoints" / f"step_{step:06d}" for config in (one, other)]
    models = [dict(load_model(folder / "hf").named_parameters()) for folder in folders]
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])
    tensors = [saved(folder) for folder in folders]
    assert tensors[0].keys() == tensors[1].keys() and any(key.endswith("exp_avg_sq") for key in tensors[0])
    assert [key for key in tensors[0] if not torch.equal(tensors[0][key], tensors[1][key])] == []


def is_exact(key: str) -> bool:
    """Whether a metric is neither a time nor depends on times."""
    return not key.startswith(("time_", "search/")) and not key.endswith("_per_second")


def saved(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, unsharded."""
    checkpoint = Checkpoint(folder, Ranks(0, 1, torch.device("cpu")))
    tensors = {key: torch.empty(tuple(size)) for key, size in checkpoint._shapes.items()}
    checkpoint.read(tensors)
    return tensors


def rows(config) -> list[dict]:
    return [json.loads(line) for line in (config.run_directory / "metrics.jsonl").read_text().splitlines()]


def test_two_ranks_are_the_same_to_the_bit(make_config, tmp_path, on_two_ranks):
    """FSDP over two ranks with padded shards; both hold whole weights between passes, and reduce gradients once."""
    configs, files = {}, []
    for name, offload in (("here", {}), ("away", ALL)):
        model = {"path": make_config().model.path, "offload": offload}
        settings = TRAIN | {"reshard_after": "update", "reduce_after": "update"}
        configs[name] = make_config(run={"name": name}, algorithm=ALGORITHMS["ppo"], model=model, train=settings)
        files.append(tmp_path / f"{name}.yaml")
        files[-1].write_text(configs[name].to_yaml())
    on_two_ranks(Path(__file__).parent / "two_ranks_offload.py", *files)
    check_same(*configs.values(), step=2)


def test_an_update_reads_no_weights_that_are_away(make_config, make_decoder, make_trajectory, as_if_on_a_gpu):
    """Reference, update and replica without a run around them, in any order that a caller may use."""
    config = make_config(model={"dtype": "bfloat16", "offload": ALL}, algorithm={"kl_coefficient": 0.1})
    batches = pack([make_trajectory(seed, [(False, 5), (True, 6)]) for seed in range(3)], [1.0, -1.0, 0.5], 20)
    with process("cpu", 1) as ranks:
        policy = Policy(make_decoder(0), config, ranks, make_decoder(1).bfloat16())
        before = [parameter.clone() for parameter in policy.replica.parameters()]
        policy.release_replica()
        policy.update(batches, 18, policy.reference_logprobs(batches))
        policy.sync_replica()
        policy.sync_replica()
        after = list(policy.replica.parameters())
        assert not all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        for replica, parameter in zip(after, policy.module.decoder.parameters(), strict=True):
            assert torch.equal(replica, parameter.full_tensor().bfloat16())
