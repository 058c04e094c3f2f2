"""Packing: every token but the first is a target exactly once, and rows know their documents."""

import numpy as np
import pytest
import torch

from picotron_mini.config import ModelConfig
from picotron_mini.data.packing import IGNORED, full_rows, pack, read_rows
from picotron_mini.model.gpt import GPT, init_weights

END = 9
DOCUMENTS = [np.array(ids) for ids in ([1, 1, 1], [2] * 6, [3, 3], [], [4])]


def test_pack_closes_each_document() -> None:
    stream = pack(iter(DOCUMENTS), END, np.uint16)
    assert stream.tolist() == [1, 1, 1, 9, 2, 2, 2, 2, 2, 2, 9, 3, 3, 9, 9, 4, 9]
    assert stream.dtype == np.uint16
    assert pack([], END).tolist() == []


def test_rows_overlap_by_one() -> None:
    stream = pack(DOCUMENTS, END, np.uint16)
    assert full_rows(len(stream), 4) == 4
    batch = read_rows(stream, np.arange(4), 4, END)
    for field in (batch.tokens, batch.targets, batch.positions, batch.documents):
        assert field.shape == (4, 4) and field.dtype == torch.int64 and field.is_contiguous()
    assert batch.tokens.flatten().tolist() == stream[:16].tolist()
    assert batch.targets.flatten().tolist() == stream[1:17].tolist()
    assert batch.positions.tolist() == [[0, 1, 2, 3]] * 4
    assert batch.documents.tolist() == [[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1], [0, 0, 1, 2]]


def test_documents_apart_have_no_target_in_each_other():
    stream = pack(DOCUMENTS, END, np.uint16)
    whole, apart = (read_rows(stream, np.arange(4), 4, END, apart) for apart in (False, True))
    ends = whole.tokens == END
    assert ends.sum() == 4 and (apart.targets[ends] == IGNORED).all()
    assert (apart.targets[~ends] == whole.targets[~ends]).all()
    for field in ("tokens", "positions", "documents"):
        assert torch.equal(getattr(apart, field), getattr(whole, field))


def test_packed_documents_that_are_apart_learn_as_they_would_alone():
    """One row of three documents, against one row for each of them."""
    model = GPT(ModelConfig(vocab_size=END + 1, hidden_size=8, intermediate_size=8, num_layers=2, num_heads=2,
                            num_kv_heads=2, head_dim=4))  # fmt: skip
    init_weights(model, 0)
    model.double()
    documents = [np.array(ids) for ids in ([1, 4, 2], [2, 5, 8, 8], [3, 3])]

    def learn(rows):
        model.zero_grad()
        loss = sum(model.loss(model(b.tokens, b.positions, b.documents), b.targets) for b in rows)
        loss.backward()
        return [loss.detach(), *(p.grad.clone() for p in model.parameters())]

    alone = learn([read_rows(pack([each], END), np.array([0]), len(each), END) for each in documents])
    stream = pack(documents, END)
    packed = learn([read_rows(stream, np.array([0]), len(stream) - 1, END, apart=True)])
    for one, other in zip(packed, alone, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)
    crossing = learn([read_rows(stream, np.array([0]), len(stream) - 1, END)])
    assert abs(crossing[0] - alone[0]) > 1


@pytest.mark.parametrize("seq_len", [2, 3, 5, 7, 16, 40])
def test_every_token_but_the_first_is_a_target_once(seq_len: int) -> None:
    stream = np.arange(17, dtype=np.uint32)
    rows = -(-16 // seq_len)
    batch = read_rows(stream, np.arange(rows + 2), seq_len, 99)  # two rows behind the end
    targets = batch.targets[batch.targets != IGNORED]
    assert targets.tolist() == list(range(1, 17))
    assert (batch.tokens[batch.targets != IGNORED] + 1).tolist() == targets.tolist()
    assert (batch.targets[rows:] == IGNORED).all() and (batch.tokens[rows + 1 :] == 99).all()


def test_full_rows_needs_one_token_more() -> None:
    assert [full_rows(n, 4) for n in (0, 1, 4, 5, 8, 9)] == [0, 0, 0, 1, 1, 2]


def test_batch_moves_whole() -> None:
    batch = read_rows(np.arange(9), np.arange(2), 4, 99).to("meta")
    assert {x.device.type for x in (batch.tokens, batch.targets, batch.positions, batch.documents)} == {"meta"}
