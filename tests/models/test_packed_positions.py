"""Which position_ids mean that a row holds several packed texts, and which are only positions."""

import itertools
import logging

import pytest
import torch
from small_models import spread_decays, text_config

import lion_hf
from lion_hf.ops.backend import warn_once


def build(mask_type="selective", **options):
    """Return a model with noise added to all weights, and with different decays."""
    model = lion_hf.LionModel(text_config(mask_type, **options)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return spread_decays(model).eval()


def warned(caplog):
    return sum("read as one text" in record.message for record in caplog.records)


@pytest.mark.parametrize(
    "positions",
    [
        [0, 1, 2, 3, 4, 5],
        [3, 4, 5, 6, 7, 8],
        [0, 2, 4, 6, 8, 10],
        [0, 1, 2, 0, 2, 3],
        [5, 4, 3, 2, 1, 0],
        [0, 1, 1, 2, 0, 1],
        [0, 0, 0, 1, 2, 3],
        [0, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 1, 2],
        [0, 1, 2, 0, 0, 0],
    ],
    ids=str,
)
def test_positions_that_do_anything_but_start_again_are_positions(positions, caplog):
    """Positions that repeat or fall are ambiguous, so a warning explains how they are read."""
    warn_once.cache_clear()
    unclear = any(b <= a for a, b in itertools.pairwise(positions))
    model, ids = build(pos_emb=True), torch.randint(1, 61, (1, 6))
    positions = torch.tensor([positions])
    embedded = model.embeddings(ids, None, positions)
    for layer in model.layers:
        embedded = layer(embedded)
    for _ in range(2):
        torch.testing.assert_close(model(ids, position_ids=positions).last_hidden_state, embedded)
    assert warned(caplog) == unclear


@pytest.mark.parametrize("pos_emb", [False, True], ids=["no-table", "table"])
@pytest.mark.parametrize(
    "positions, lengths",
    [
        ([2, 3, 4, 2, 3], [3, 2]),
        ([0, 1, 2, 0, 1, 0, 1], [3, 2, 2]),
        ([7, 8, 9, 7, 8, 9], [3, 3]),
        ([5, 6, 7, 0, 1, 2, 3, 0, 1], [3, 4, 2]),  # starts inside a text
        ([1, 2, 0, 1, 0, 1], [2, 2, 2]),
    ],
    ids=str,
)
def test_texts_begin_where_positions_fall_whatever_they_start_with(positions, lengths, pos_emb, caplog):
    warn_once.cache_clear()
    model, ids, positions = build(pos_emb=pos_emb), torch.randint(1, 61, (1, len(positions))), torch.tensor([positions])
    parts = zip(ids.split(lengths, 1), positions.split(lengths, 1), strict=True)
    separate = [model(part, position_ids=place).last_hidden_state for part, place in parts]
    found = model(ids, position_ids=positions)
    torch.testing.assert_close(found.last_hidden_state, torch.cat(separate, 1), rtol=1e-9, atol=1e-12)
    assert len(found.pooler_output) == len(lengths)
    assert not warned(caplog)


@pytest.mark.parametrize("positions", [[0, 0, 0, 1, 2, 3], [2, 3, 4, 2, 3, 4], [0, 1, 2, 3, 4, 5]], ids=str)
def test_bounds_overrule_positions(positions, caplog):
    warn_once.cache_clear()
    model, ids, positions = build(mask_type="lit"), torch.randint(1, 61, (1, 6)), torch.tensor([positions])
    parts = zip(ids.split([2, 4], 1), positions.split([2, 4], 1), strict=True)
    beside_a_mask = [model(part, torch.ones_like(part), position_ids=place) for part, place in parts]
    separate = torch.cat([outputs.last_hidden_state for outputs in beside_a_mask], 1)
    for told in ({"cu_seq_lens_q": torch.tensor([0, 2, 6])}, {"seq_idx": torch.tensor([[0, 0, 1, 1, 1, 1]])}):
        found = model(ids, position_ids=positions, **told).last_hidden_state
        torch.testing.assert_close(found, separate, rtol=1e-9, atol=1e-12)
    assert not warned(caplog)


def test_positions_that_count_the_tokens_are_not_told_to_be_ignored(caplog):
    """A packing collator returns positions for a single text, too. Ignoring them without a table loses nothing."""
    logging.Logger.warning_once.cache_clear()
    model, ids = build(), torch.randint(1, 61, (2, 6))
    for start in (0, 3):
        for rows in (1, 2):
            model(ids[:rows], position_ids=torch.arange(start, start + 6)[None].expand(rows, -1))
    assert "are ignored" not in caplog.text
    model(ids, position_ids=torch.tensor([[0, 1, 2, 4, 5, 6]]))
    assert "are ignored" in caplog.text
