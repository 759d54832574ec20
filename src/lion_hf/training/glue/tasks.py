"""The GLUE tasks and the paper's fine-tuning recipe for each."""

from dataclasses import dataclass


# Common to all tasks: warm-up over 6 % of the steps, then linear decay to 0; 128 tokens; no attention dropout; AdamW
# with betas (0.9, 0.98) and eps 1e-6; bf16, but float32 for STS-B. These are defaults of run_glue.py.
LEARNING_RATE = 1e-5
PAPER_WIDTH = 768  # width of its smallest models, for which this rate was chosen


def suited_rate(task: "GlueTask", width: int) -> float:
    """Return the default learning rate.

    GLUE tasks have their own rate for models of width 768 or more. For narrower models, and for custom data sets, it is
    5e-5 * (768 / width) ** 1.5, at most 3e-3: 5e-5 at width 768, 4e-4 at 192.
    """
    if task.name in TASKS and width >= PAPER_WIDTH:
        return task.learning_rate
    return float(f"{min(3e-3, 5e-5 * (PAPER_WIDTH / width) ** 1.5):.2g}")


@dataclass(frozen=True)
class GlueTask:
    """One task.

    Attributes:
        name, title: the name in `evaluate` and the Hub's nyu-mll/glue, and the name in GLUE.
        columns: the one or two text columns.
        labels: names of the classes, in the order of their numbers; none for a regression.
        score: the metrics whose mean is the score of the task.
        epochs, batch_size, weight_decay, seeds: the recipe; batch_size over all devices, seeds is their number.
        validation: parts to evaluate on, by the prefix of their metrics.
        test: parts to predict, by the name of their prediction file.
        names_in_submission: whether the submission holds names of classes instead of numbers.
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
        """Test parts by the name of their prediction file."""
        return dict(self.test or ((self.title, "test"),))

    @property
    def metric_config(self) -> str:
        """Configuration of the metric `glue`."""
        return self.name if self.name in TASKS else "sst2" if self.labels else "stsb"

    @property
    def evaluated(self) -> tuple[str, ...]:
        """Metrics of an evaluation that belong to the score, with the prefix of their part."""
        return tuple(f"{word}_{metric}" if word else metric for word, _ in self.validation for metric in self.score)


SENTENCE, PAIR = ("sentence",), ("sentence1", "sentence2")
ENTAILED = ("entailment", "not_entailment")

# The largest first, so that parallel runs end at about the same time.
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
    # The paper leaves WNLI out; using RTE's values is our choice.
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
# Tasks that can start from a model fine-tuned on MNLI.
AFTER_MNLI = ("stsb", "mrpc", "rte")

# A custom data set, with SST-2's values (our choice) except for the learning rate. Its columns and labels come from
# the data.
CUSTOM = GlueTask(
    "custom", "custom", (), ("unknown",), ("accuracy",), epochs=3, batch_size=16, weight_decay=3e-6, seeds=3
)
