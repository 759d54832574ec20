"""GLUE's metrics as a local module of `evaluate`, for machines without a network.

    evaluate.load("src/lion_hf/training/glue/offline.py", "mrpc").compute(predictions=[0, 1], references=[0, 1])

Names, arguments and numbers are those of `evaluate.load("glue", "mrpc")`, computed by scikit-learn and SciPy.
"""

import datasets
import evaluate
import numpy as np
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import f1_score, matthews_corrcoef


ACCURACY = ("sst2", "mnli", "mnli_matched", "mnli_mismatched", "qnli", "rte", "wnli", "hans")
CONFIGURATIONS = (*ACCURACY, "mrpc", "qqp", "cola", "stsb")


def _accuracy(predictions, references):
    return float((np.asarray(predictions) == np.asarray(references)).mean())


class Glue(evaluate.Metric):
    """Accuracy; and F1 for MRPC and QQP; Matthews' correlation for CoLA; Pearson's and Spearman's for STS-B."""

    def _info(self):
        if self.config_name not in CONFIGURATIONS:
            raise KeyError(f"the configuration is {self.config_name!r}; allowed are {', '.join(CONFIGURATIONS)}")
        value = datasets.Value("float32" if self.config_name == "stsb" else "int64")
        return evaluate.MetricInfo(
            description=__doc__,
            citation="",
            inputs_description="predictions and references: class numbers, or numbers for stsb",
            features=datasets.Features({"predictions": value, "references": value}),
            format="numpy",
        )

    def _compute(self, predictions, references):
        if self.config_name == "stsb":
            return {
                "pearson": float(pearsonr(predictions, references)[0]),
                "spearmanr": float(spearmanr(predictions, references)[0]),
            }
        if self.config_name == "cola":
            return {"matthews_correlation": float(matthews_corrcoef(references, predictions))}
        result = {"accuracy": _accuracy(predictions, references)}
        if self.config_name in ("mrpc", "qqp"):
            result["f1"] = float(f1_score(y_true=references, y_pred=predictions))
        return result
