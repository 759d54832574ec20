"""A converted model is verified before it is written."""

import pytest
import torch
from checkpoints import IMAGE, TEXT, bare_text, save

from lion_hf.convert import plan as convert_plan
from lion_hf.convert.source import ConversionError, interpret, read_source


@pytest.mark.parametrize("source", [IMAGE, TEXT], ids=["image", "text"])
def test_every_tensor_is_used_once_or_listed_and_no_value_changes(source):
    source = read_source(source)
    plan = convert_plan.plan_conversion(source)
    assert plan.renamed.keys() | plan.dropped.keys() == source.weights.keys()
    assert not plan.renamed.keys() & plan.dropped.keys()
    state = plan.model.state_dict()
    for old, parts in plan.renamed.items():
        stacked = torch.cat([state[new] for new in parts])
        assert stacked.dtype == source.weights[old].dtype and torch.equal(stacked, source.weights[old]), old
    assert plan.model.num_parameters() == sum(source.weights[name].numel() for name in plan.renamed)


def test_the_model_does_not_hang_on_the_file(tmp_path):
    weights, _ = bare_text("decay")
    path = save(weights, tmp_path / "source.pt")
    model = convert_plan.plan_conversion(read_source(path)).model
    before = {name: x.clone() for name, x in model.state_dict().items()}
    with open(path, "r+b") as file:
        file.write(bytes(path.stat().st_size))
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


def test_a_tensor_counted_twice_is_noticed(monkeypatch):
    weights, _ = bare_text("decay")
    reason = convert_plan._reason_to_drop
    monkeypatch.setattr(
        convert_plan,
        "_reason_to_drop",
        lambda name, *rest: None if name == "cls.predictions.bias" else reason(name, *rest),
    )
    with pytest.raises(ConversionError, match="parameters, but the model has"):
        convert_plan.plan_conversion(interpret(weights, "source.pt"))
