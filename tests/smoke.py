"""Check a bare installation: import, forward, gradients, save, load. Run by .ci/run in environments without pytest.

python tests/smoke.py FOLDER
"""

import sys

import torch
import transformers

import lion_hf


def main(folder: str) -> None:
    small = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "chunk_size": 4,
    }
    for mask_type in ("lit", "decay", "selective"):
        config = lion_hf.LionConfig(vocab_size=50, mask_type=mask_type, **small)
        image = lion_hf.LionVisionConfig(image_size=12, patch_size=4, order="s", mask_type=mask_type, **small)
        ids = torch.randint(0, 50, (2, 11))
        pixels = torch.randn(2, 3, 12, 12)
        for model, auto, inputs in (
            (lion_hf.LionForMaskedLM(config), transformers.AutoModelForMaskedLM, {"input_ids": ids, "labels": ids}),
            (
                lion_hf.LionForImageClassification(image),
                transformers.AutoModelForImageClassification,
                {"pixel_values": pixels, "labels": torch.tensor([0, 1])},
            ),
        ):
            model(**inputs).loss.backward()
            model.eval().save_pretrained(folder)
            loaded = auto.from_pretrained(folder).eval()
            outputs = []
            for form in ("attention", "rnn", "chunk"):
                loaded.config.format = form
                outputs.append(loaded(**inputs, output_hidden_states=True).logits)
                torch.testing.assert_close(outputs[-1], outputs[0], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(outputs[0], model(**inputs).logits, rtol=1e-4, atol=1e-5)
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, python {sys.version.split()[0]}"
    sys.stdout.write(f"lion_hf {lion_hf.__version__} works with {versions}\n")


if __name__ == "__main__":
    main(sys.argv[1])
