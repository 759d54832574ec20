"""Check docs/contributing/head.patch: the new head trains, has an Auto class, and its code is stored in a folder."""

import subprocess
import sys
import tempfile

import torch
from small_models import text_config, text_inputs
from transformers import AutoModelForNextSentencePrediction

import lion_hf


WITHOUT_PACKAGE = """
import sys
sys.modules["lion_hf"] = None
import torch
from transformers import AutoModelForNextSentencePrediction
model = AutoModelForNextSentencePrediction.from_pretrained(sys.argv[1], trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules."), type(model).__module__
torch.save(model(torch.arange(1, 9)[None]).logits, sys.argv[2])
"""

torch.manual_seed(0)
inputs, labels = text_inputs(), torch.tensor([0, 1, 1])
model = AutoModelForNextSentencePrediction.from_config(text_config())
assert type(model) is lion_hf.LionForNextSentencePrediction
output = model(**inputs, labels=labels)
expected = -output.logits.log_softmax(-1)[torch.arange(3), labels].mean()
torch.testing.assert_close(output.loss, expected)
output.loss.backward()
assert all(p.grad is not None for p in model.parameters())
assert isinstance(model(**inputs, return_dict=False), tuple)
model.eval()
with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    loaded = AutoModelForNextSentencePrediction.from_pretrained(folder)
    torch.testing.assert_close(loaded(**inputs).logits, model(**inputs).logits)
    lion_hf.save_with_code(model, folder)
    logits = f"{folder}/logits.pt"
    subprocess.run([sys.executable, "-c", WITHOUT_PACKAGE, folder, logits], check=True)
    there = torch.load(logits, weights_only=True)
torch.testing.assert_close(there, model(torch.arange(1, 9)[None]).logits)
