"""Transfers to the device and back: values arrive unchanged, and no buffer is reused too early."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from searchr1_fast.rollout.transfers import Transfers, pack

CPU = torch.device("cpu")
HAS_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]


@pytest.mark.parametrize("device", [CPU, pytest.param("cuda", marks=HAS_GPU)])
def test_transfers_change_nothing(device):
    transfers = Transfers(torch.device(device))
    generator = np.random.default_rng(0)
    for count in (3, 9000, 5):  # 9000: more than the buffers had
        ids = generator.integers(-(2**63), 2**63 - 1, count)
        fractions = generator.random(count // 2)
        target = torch.zeros(3 * count, dtype=torch.int64, device=device)
        for memory in (None, target):
            sent = transfers.send([ids, fractions, ids[:0], ids[::3]], memory)
            for tensor, array in zip(sent, (ids, fractions, ids[:0], ids[::3]), strict=True):
                np.testing.assert_array_equal(tensor.cpu().numpy(), array, strict=True)
            assert memory is None or sent[0].data_ptr() == target.data_ptr()
        tokens = torch.from_numpy(generator.integers(0, 2**31 - 1, count)).to(device)
        logprobs = torch.tensor([-0.0, -torch.inf, torch.nan, *[-1e-30] * count])[:count].to(device)
        received, bits = transfers.fetch(pack(tokens, logprobs)).wait()
        np.testing.assert_array_equal(received, tokens.cpu().numpy(), strict=True)
        np.testing.assert_array_equal(bits.view(np.int32), logprobs.cpu().numpy().view(np.int32), strict=True)


def test_buffers_are_used_again_when_the_device_is_done_with_them(monkeypatch):
    """Stand-ins for events record the waits: each step's own, once, before another step gets its buffers."""
    waited = []

    class Event:
        def record(self, stream):
            self.number = len(made)
            made.append(self)

        def synchronize(self):
            waited.append(self.number)

    made: list[Event] = []
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    transfers = Transfers(CPU)
    transfers._is_cuda = True

    def launch(number):
        (sent,) = transfers.send([np.array([number])])
        receipt = transfers.fetch(pack(sent, torch.tensor([-float(number)])))
        return sent, receipt

    def read(receipt):
        return [float(values[0]) for values in receipt.wait()]

    (first, one), (second, other) = launch(10), launch(11)
    assert first.data_ptr() != second.data_ptr()
    assert waited == []
    assert (read(one), waited) == ([10, -10], [0])
    third, _dropped = launch(12)
    assert third.data_ptr() == first.data_ptr()
    assert (read(other), waited) == ([11, -11], [0, 1])
    fourth, late = launch(13)
    assert (fourth.data_ptr(), waited) == (second.data_ptr(), [0, 1])
    launch(14)  # into the buffers of the step that nobody read: it is waited for first
    assert waited == [0, 1, 2]
    launch(15)
    with pytest.raises(AssertionError, match="another step's"):
        late.wait()
    transfers.finish()
    assert waited == [0, 1, 2, 3, 4, 5]


def test_what_a_failed_step_has_sent_arrives_before_its_buffers_are_filled_again(monkeypatch):
    """A step that finds no memory sends inputs and fetches nothing, so no event tells when they have arrived."""
    waited = []

    class Stream:
        def synchronize(self):
            waited.append("stream")

    class Event:
        def record(self, stream):
            assert isinstance(stream, Stream)

        def synchronize(self):
            waited.append("event")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    transfers = Transfers(CPU)
    transfers._is_cuda = True
    (first,) = transfers.send([np.array([10])])
    receipt = transfers.fetch(pack(first, torch.zeros(1)))  # not read yet
    (failed,) = transfers.send([np.array([11])])
    assert (first.data_ptr() != failed.data_ptr(), waited) == (True, [])
    (again,) = transfers.send([np.array([12])])
    assert (again.data_ptr(), again.tolist(), waited) == (failed.data_ptr(), [12], ["stream"])
    other = transfers.fetch(pack(again, torch.zeros(1)))
    assert [one.wait()[0].tolist() for one in (receipt, other)] == [[10], [12]]
    transfers.finish()
    assert waited == ["stream", "event", "event"]
