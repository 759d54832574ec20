"""The tasks of GLUE, and how each is fine-tuned: the table of the paper's recipe."""

from dataclasses import dataclass


# The same for every task: warm-up over 6 % of the steps, then linearly to 0; 128 tokens; no attention dropout; AdamW
# with betas (0.9, 0.98) and eps 1e-6; bf16, but float32 for STS-B. These are defaults of run_glue.py.
LEARNING_RATE = 1e-5
PAPER_WIDTH = 768  # of its smallest models, for which this rate was chosen


def suited_rate(task: "GlueTask", width: int) -> float:
    """The task's rate for models as wide as the paper's or wider. For narrower ones, and for data sets that are not of
    GLUE, 5e-5 at width 768 and more for narrower models, by the power 1.5 of the width: at 192 4e-4, at most 3e-3."""
    if task.name in TASKS and width >= PAPER_WIDTH:
        return task.learning_rate
    return float(f"{min(3e-3, 5e-5 * (PAPER_WIDTH / width) ** 1.5):.2g}")


@dataclass(frozen=True)
class GlueTask:
    """One task.

    Attributes:
        name, title: as `evaluate` and the Hub's nyu-mll/glue spell it, and as GLUE does.
        columns: the columns with the one or two texts.
        labels: names of the classes, in the order of their numbers; none for a regression.
        score: the metrics whose mean is the task's score.
        epochs, batch_size, weight_decay, seeds: the recipe; batch_size over all devices, seeds is how many.
        validation: parts to evaluate on, by the word that their metrics carry.
        test: parts to predict, by the name of their file of predictions.
        names_in_submission: whether that file holds names of classes instead of their numbers.
    """

    name: str
    title: str
    columns: tuple[str, ...]
    labels: tuple[str, ...]
    score: tuple[str, ...]
    epochs: float
    batch_size: int
    weight_decay: float
    seeds: int = 1
    learning_rate: float = LEARNING_RATE
    validation: tuple[tuple[str, str], ...] = (("", "validation"),)
    test: tuple[tuple[str, str], ...] | None = None
    names_in_submission: bool = False

    @property
    def test_parts(self) -> dict[str, str]:
        """Test part by the name of its file of predictions."""
        return dict(self.test or ((self.title, "test"),))

    @property
    def metric_config(self) -> str:
        """The configuration of the metric `glue`."""
        return self.name if self.name in TASKS else "sst2" if self.labels else "stsb"

    @property
    def evaluated(self) -> tuple[str, ...]:
        """Every metric of an evaluation that belongs to the score; those of a part carry its word."""
        return tuple(f"{word}_{metric}" if word else metric for word, _ in self.validation for metric in self.score)


SENTENCE, PAIR = ("sentence",), ("sentence1", "sentence2")
ENTAILED = ("entailment", "not_entailment")

# The largest first, so that several at a time end together.
_TASKS = (
    GlueTask(
        "mnli",
        "MNLI",
        ("premise", "hypothesis"),
        ("entailment", "neutral", "contradiction"),
        ("accuracy",),
        epochs=3,
        batch_size=48,
        weight_decay=5e-6,
        validation=(("matched", "validation_matched"), ("mismatched", "validation_mismatched")),
        test=(("MNLI-m", "test_matched"), ("MNLI-mm", "test_mismatched")),
        names_in_submission=True,
    ),
    GlueTask(
        "qqp",
        "QQP",
        ("question1", "question2"),
        ("not_duplicate", "duplicate"),
        ("accuracy", "f1"),
        epochs=5,
        batch_size=16,
        weight_decay=3e-6,
    ),
    GlueTask(
        "qnli",
        "QNLI",
        ("question", "sentence"),
        ENTAILED,
        ("accuracy",),
        epochs=10,
        batch_size=16,
        weight_decay=1e-6,
        names_in_submission=True,
    ),
    GlueTask(
        "sst2",
        "SST-2",
        SENTENCE,
        ("negative", "positive"),
        ("accuracy",),
        epochs=3,
        batch_size=16,
        weight_decay=3e-6,
        seeds=3,
    ),
    GlueTask(
        "cola",
        "CoLA",
        SENTENCE,
        ("unacceptable", "acceptable"),
        ("matthews_correlation",),
        epochs=10,
        batch_size=32,
        weight_decay=1e-6,
        seeds=4,
    ),
    GlueTask("stsb", "STS-B", PAIR, (), ("spearmanr",), epochs=8, batch_size=32, weight_decay=3e-6, seeds=5),
    GlueTask(
        "mrpc",
        "MRPC",
        PAIR,
        ("not_equivalent", "equivalent"),
        ("f1",),
        epochs=10,
        batch_size=32,
        weight_decay=8e-6,
        seeds=5,
    ),
    GlueTask(
        "rte",
        "RTE",
        PAIR,
        ENTAILED,
        ("accuracy",),
        epochs=2,
        batch_size=16,
        weight_decay=1e-6,
        seeds=5,
        names_in_submission=True,
    ),
    # Not in the paper, which leaves WNLI out: RTE's values are our choice.
    GlueTask(
        "wnli",
        "WNLI",
        PAIR,
        ("not_entailment", "entailment"),
        ("accuracy",),
        epochs=2,
        batch_size=16,
        weight_decay=1e-6,
        seeds=5,
    ),
)
TASKS = {task.name: task for task in _TASKS}
SCORED = tuple(name for name in TASKS if name != "wnli")
# May start from a model fine-tuned on MNLI.
AFTER_MNLI = ("stsb", "mrpc", "rte")

# A data set that is not of GLUE, with SST-2's values (our choice) but for the learning rate; its columns and labels
# come from the data.
CUSTOM = GlueTask(
    "custom", "custom", (), ("unknown",), ("accuracy",), epochs=3, batch_size=16, weight_decay=3e-6, seeds=3
)
